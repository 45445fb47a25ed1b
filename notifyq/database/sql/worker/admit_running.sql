-- Count the tasks that worker $1 runs in the queues $2 against these queues' limits. The worker runs it when it learns
-- of the limits.
SELECT notifyq.admit_running($2::text[], $1::integer)
