-- As enqueue.sql, for a task with a unique_key in its options. Returns the id, created_at as enqueue.sql does, and
-- whether the id is that of an existing task which is in the way (then created_at is NULL). unique_task is called after
-- the INSERT, and takes a new snapshot: this statement's own may be older than the existing task.
WITH new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    VALUES ($1, $2::text::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), $6, $7,
            $8::text::jsonb)
    RETURNING id, (extract(epoch FROM created_at) * 1000000)::bigint AS created
)
SELECT coalesce((SELECT id FROM new), notifyq.unique_task($8::text::jsonb ->> 'unique_key')) AS id,
       (SELECT created FROM new) AS created, NOT EXISTS (SELECT FROM new) AS existed
