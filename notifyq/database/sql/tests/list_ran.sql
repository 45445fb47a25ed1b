-- For tests: the tasks of which an attempt ended, or that were cancelled, since $1; and their state now.
SELECT id, state FROM notifyq.all_tasks WHERE processed_at >= $1::timestamptz
