-- Cancel task $1 if it was created at $2. Returns whether it was cancelled (NULL: a task with this id exists, but was
-- created at another time), and when the task was created. Returns no row if there is no such task.
SELECT CASE WHEN a.created_at = $2::timestamptz THEN notifyq.cancel(a.id) END AS cancelled,
       greatest(least(a.created_at, '9999-12-30Z'), '0001-01-03Z') AS created_at
FROM notifyq.all_tasks a
WHERE a.id = $1::bigint
