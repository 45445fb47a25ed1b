-- Register a worker: name $1, queues $2, types $3 and the max_attempts of each $4, concurrency $5, lease in seconds $6.
-- Returns its id, or no row if the id that was drawn for it belongs to another worker. The session's application_name
-- gets the id, as that of the worker's other connections has it.
INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)
VALUES ($1, $2, $3, $4, $5, make_interval(secs => $6::float8))
ON CONFLICT (id) DO NOTHING
RETURNING id, pg_catalog.set_config('application_name', 'notifyq heartbeat ' || id, false) AS name
