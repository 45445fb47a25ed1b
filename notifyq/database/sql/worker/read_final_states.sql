-- Read in which states the tasks $1 ended, of those that have. A task whose lease a worker lost was cancelled, or is
-- another worker's now. The state is no condition, since the planner might take a partial index for one.
SELECT f.id, f.state FROM notifyq.finished f WHERE f.id = ANY ($1::bigint[])
