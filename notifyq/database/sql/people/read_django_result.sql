-- id. What a Django TaskResult is made of, JSON as text, since each driver and each project has its own jsonb.
SELECT t.type, t.queue, t.priority, t.state, t.attempts, c.created_at, c.run_at, c.processing_at, c.processed_at,
       t.payload::text, t.result::text, t.worker, t.errors::text
FROM notifyq.all_tasks t
CROSS JOIN LATERAL (  -- within the times that Python knows
    SELECT least(greatest(t.created_at, '0001-01-03Z'), '9999-12-30Z') AS created_at,
           least(greatest(t.run_at, '0001-01-03Z'), '9999-12-30Z') AS run_at,
           CASE WHEN t.processing_at IS NOT NULL
                THEN least(greatest(t.processing_at, '0001-01-03Z'), '9999-12-30Z') END AS processing_at,
           CASE WHEN t.processed_at IS NOT NULL
                THEN least(greatest(t.processed_at, '0001-01-03Z'), '9999-12-30Z') END AS processed_at
) AS c
WHERE t.id = $1
-- An older task may have had the same id: see read_highest_ids.sql.
ORDER BY t.state IN ('done', 'dead', 'cancelled') LIMIT 1
