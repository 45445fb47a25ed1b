-- How the tasks $1 ended, as far as they have. What a worker has lost was cancelled, or is another worker's now. The
-- state is no condition, since then a partial index would do for the planner too.
SELECT f.id, f.state FROM notifyq.finished f WHERE f.id = ANY ($1::bigint[])
