-- Of cron $1: enqueue its slot $2, if $4, and go on to the next one, $3. Only if $2 is still what it waits for: of all who
-- have seen that it is due, one does it, and the others, who waited for the lock of its row, look at the row as it is then.
-- The id comes first, since the row is to have it, and one statement writes a row once. Returns whether it applied.
WITH moved AS (
    UPDATE notifyq.cron c
    SET next_at = $3::timestamptz,
        last_at = CASE WHEN $4::boolean THEN $2 ELSE c.last_at END,
        recent = CASE WHEN $4 THEN (nextval('notifyq.task_id_seq') || c.recent)[1:5] ELSE c.recent END
    WHERE c.name = $1 AND c.next_at IS NOT DISTINCT FROM $2::timestamptz AND NOT c.paused
    RETURNING c.type, c.payload, c.queue, c.priority, c.options, c.recent
), put AS (
    INSERT INTO notifyq.task (id, type, payload, queue, priority, options, run_at)
    OVERRIDING SYSTEM VALUE
    SELECT m.recent[1], m.type, m.payload, m.queue, m.priority, m.options, $2 FROM moved m WHERE $4
)
SELECT EXISTS (SELECT FROM moved) AS moved
