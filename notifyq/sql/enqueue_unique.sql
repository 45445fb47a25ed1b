-- As enqueue.sql, for one with a unique_key among its options. Returns the id, its created_at as there, and whether it
-- is that of another, which stands in the way; of that one the time is NULL. unique_task is asked once the INSERT is
-- over, and looks anew: this statement's own snapshot may be older than the other.
WITH new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    VALUES ($1, $2::text::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), $6, $7,
            $8::text::jsonb)
    RETURNING id, (extract(epoch FROM created_at) * 1000000)::bigint AS created
)
SELECT coalesce((SELECT id FROM new), notifyq.unique_task($8::text::jsonb ->> 'unique_key')) AS id,
       (SELECT created FROM new) AS created, NOT EXISTS (SELECT FROM new) AS existed
