-- Hand back tasks that were not run, or not to their end: give up the lease of worker $1 on the tasks $2, attempts $3.
-- The attempts don't count. Returns the ids that it applied to, and for each whether it left a row in
-- notifyq.slot_released. It sets run_at to its own value, so that the bell rings.
UPDATE notifyq.task t
SET worker = NULL, attempts = t.attempts - 1, run_at = t.run_at, progress = NULL, note = NULL
FROM unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
WHERE t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt
RETURNING t.id, t.watched AND notifyq.note_lease_given_up(t) AS slot_released
