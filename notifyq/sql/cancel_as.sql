-- Cancel task $1, if it is the one that was created at $2. Returns whether it did that, NULL if it is another one, and when it
-- was created; no row: there is no such task.
SELECT CASE WHEN a.created_at = $2::timestamptz THEN notifyq.cancel(a.id) END AS cancelled, a.created_at
FROM notifyq.all_tasks a
WHERE a.id = $1::bigint
