-- For tests: the tasks that had an attempt end, or that were cancelled, since $1; and their state now.
SELECT id, state FROM notifyq.all_tasks WHERE processed_at >= $1::timestamptz
