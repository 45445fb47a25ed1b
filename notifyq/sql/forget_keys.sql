-- When ids are given a second time: forget the unique keys of tasks that are no more, and whose ids are still to be
-- given. A new task with such an id would stand in the way of that key.
DELETE FROM notifyq.unique_key k
WHERE k.task > (SELECT s.last_value FROM notifyq.task_id_seq s)
  AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.id = ANY (ARRAY[k.task]))
