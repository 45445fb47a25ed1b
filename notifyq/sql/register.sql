-- A new worker: name, queues, types and what each allows, concurrency, lease in seconds. Returns its id, or no row if the
-- id that was drawn for it is another worker's.
INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)
VALUES ($1, $2, $3, $4, $5, make_interval(secs => $6::float8))
ON CONFLICT (id) DO NOTHING
RETURNING id
