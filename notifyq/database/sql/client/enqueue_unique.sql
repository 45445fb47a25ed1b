-- Enqueue as enqueue.sql does, a task with a unique_key in its options. Returns:
--
--     id       of the new task, or of the existing task that is in the way
--     created  created_at of the same task, as enqueue.sql returns it. NULL if the existing task has ended, or was
--              inserted after this statement began, or its created_at is out of the bounds of Python's datetime
--     existed  whether the id is that of an existing task
--
-- find_unique_task runs after the INSERT, and takes a new snapshot: this statement's own may be older than the existing
-- task.
WITH new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    VALUES ($1, $2::text::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), $6, $7,
            $8::text::jsonb)
    RETURNING id, (extract(epoch FROM created_at) * 1000000)::bigint AS created
)
SELECT f.id,
       coalesce(
           (SELECT created FROM new),
           (SELECT CASE WHEN t.created_at BETWEEN '0001-01-03Z' AND '9999-12-30Z'
                        THEN (extract(epoch FROM t.created_at) * 1000000)::bigint END
            FROM notifyq.task t WHERE t.id = f.id)
       ) AS created,
       NOT EXISTS (SELECT FROM new) AS existed
FROM (
    SELECT coalesce((SELECT id FROM new), notifyq.find_unique_task($8::text::jsonb ->> 'unique_key')) AS id OFFSET 0
) AS f
