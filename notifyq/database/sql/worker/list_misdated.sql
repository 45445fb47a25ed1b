-- List tasks of queue $1 that wait for a time which was computed while the server's clock was ahead. It looks at those
-- 1000 scheduled tasks that are to run last. Its answer goes to correct_misdated.sql, whose UPDATE rings even if it
-- changes no row.
--
--     failed     tasks that failed at a time that is now in the future
--     granted    tasks that were granted a slot of a rate further ahead than that rate's window
--
-- The first run_at of a task is left alone: nothing tells a delay from a time that an enqueuer chose.
WITH latest AS MATERIALIZED (
    SELECT r.id, r.run_at, r.processed_at, r.waiting_on, r.withheld, r.options
    FROM notifyq.task r
    WHERE r.queue = $1 AND r.worker IS NULL AND r.run_at > r.created_at AND NOT r.promoted
    ORDER BY r.run_at DESC
    LIMIT 1000
)
SELECT ARRAY(SELECT l.id FROM latest l
             WHERE l.processed_at > statement_timestamp() + interval '2 seconds' AND l.run_at > l.processed_at
               AND l.waiting_on IS NULL AND isfinite(l.processed_at) AND isfinite(l.run_at)) AS failed,
       ARRAY(SELECT l.id
             FROM latest l
             CROSS JOIN LATERAL notifyq.parse_limits(l.options) AS o
             LEFT JOIN notifyq.queue q ON l.waiting_on = 'queue:' || q.name
             WHERE l.waiting_on IS NOT NULL AND NOT l.withheld AND isfinite(l.run_at)
               AND l.run_at > statement_timestamp() + interval '2 seconds'
                              + make_interval(secs => greatest(o.limit_seconds, q.limit_seconds, 0))) AS granted
