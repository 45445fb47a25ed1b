-- Of cron $1: enqueue slot $2, if $4, and set the next slot to $3; but only if the cron still waits for $2. Of all
-- workers that saw the slot become due, one does so. The others wait for the row's lock, and then see the new slot.
-- Returns whether it applied.
--
-- The task's id is drawn first, since the cron's row must name it and one statement can write a row only once.
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
