-- Leave tasks whose type worker $1 doesn't know to one that does: ids $2, attempts $3. They move to an index of
-- their own, where no claim steps over them, and whoever sleeps is told to look there, unless
-- the queue of notifications is full (schema.sql). One that was granted a slot leaves it to another.
WITH moved AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, aside = true, parked = NULL, waits_at = NULL
    FROM unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
    WHERE t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt
    RETURNING t.id, t.queue, t.order_key, t.limit_key, t.tracked
), freed AS (
    INSERT INTO notifyq.freed (task, ended, queue, order_key, limit_key)
    SELECT m.id, false, m.queue, m.order_key, m.limit_key FROM moved m
    WHERE m.tracked
)
SELECT moved.id, moved.tracked AS freed
FROM moved, (SELECT notifyq.tell('notifyq', 'aside')::text) AS told
