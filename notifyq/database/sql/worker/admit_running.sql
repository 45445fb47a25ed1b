-- The tasks that worker $1 runs in the queues $2 count against these queues' limits from now on: the worker has just
-- learned of the limits.
SELECT notifyq.admit_running($2::text[], $1::integer)
