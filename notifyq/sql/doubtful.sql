-- After the server's clock was set back: which tasks of queue $1 wait for a time that was reckoned while it was ahead? Of
-- those that are scheduled, it looks at the 1000 that are to run last. For set_back.sql, whose UPDATE rings even for no row.
--
-- failed: it failed in the future. granted: the slot of a rate was granted to it further ahead than that rate's window.
-- A first run_at is left alone: nothing tells a delay from a time that somebody meant.
WITH latest AS MATERIALIZED (
    SELECT r.id, r.run_at, r.processed_at, r.waits_at, r.aside, r.options
    FROM notifyq.task r
    WHERE r.queue = $1 AND r.worker IS NULL AND r.run_at > r.created_at AND NOT r.promoted
    ORDER BY r.run_at DESC
    LIMIT 1000
)
SELECT ARRAY(SELECT l.id FROM latest l
             WHERE l.processed_at > statement_timestamp() + interval '2 seconds' AND l.run_at > l.processed_at
               AND l.waits_at IS NULL AND isfinite(l.processed_at) AND isfinite(l.run_at)) AS failed,
       ARRAY(SELECT l.id
             FROM latest l
             CROSS JOIN LATERAL notifyq.limits(l.options) AS o
             LEFT JOIN notifyq.queue q ON l.waits_at = 'queue:' || q.name
             WHERE l.waits_at IS NOT NULL AND NOT l.aside AND isfinite(l.run_at)
               AND l.run_at > statement_timestamp() + interval '2 seconds'
                              + make_interval(secs => greatest(o.limit_seconds, q.limit_seconds, 0))) AS granted
