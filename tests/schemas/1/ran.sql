-- For tests: the tasks that had an attempt end, or were cancelled, since $1; and where each stands now.
SELECT id, state FROM notifyq.all_tasks WHERE processed_at >= $1::timestamptz
