-- Leave tasks $2, attempts $3, to another worker, since worker $1 has no handler for their types. They move to an index
-- of their own, so that claims needn't step over them. Sleeping workers are told to look there, unless the queue of
-- notifications is nearly full. A task that was granted a slot gives it back. Returns the ids that it applied to, and
-- for each whether it left a row in notifyq.slot_released.
WITH moved AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, withheld = true, parked = NULL, waiting_on = NULL
    FROM unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
    WHERE t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt
    RETURNING t.id, t.watched AND notifyq.note_lease_given_up(t) AS slot_released
)
SELECT moved.id, moved.slot_released
FROM moved, (SELECT notifyq.notify_unless_full('notifyq', 'unhandled')::text) AS told
