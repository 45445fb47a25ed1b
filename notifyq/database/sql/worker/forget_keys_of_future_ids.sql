-- When ids will be given twice: delete the unique keys whose task no longer exists and has an id that is still to be
-- given. Otherwise the new task with that id would be in the way of the key. It waits for no enqueuer: what one has
-- locked is left for the next time.
DELETE FROM notifyq.unique_key k
WHERE k.key = ANY (ARRAY(
    SELECT f.key
    FROM notifyq.unique_key f
    WHERE f.task > (SELECT s.last_value FROM notifyq.task_id_seq s)
      AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.id = ANY (ARRAY[f.task]))
    FOR UPDATE OF f SKIP LOCKED))
