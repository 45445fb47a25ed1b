-- For people: a row for each cron: the cron as JSON, with the state of its last task if that is still known; its name;
-- the seconds until its next slot; and the seconds since the last one. Its slots are enqueued only while a live worker
-- serves it ("served").
SELECT to_json(t)::text AS cron, t.name,
       extract(epoch FROM t.next_at - statement_timestamp())::float8 AS next_seconds,
       CASE WHEN isfinite(t.last_at)
            THEN extract(epoch FROM statement_timestamp() - t.last_at)::float8 END AS last_seconds
FROM (
    SELECT c.name, c.expression, c.tz, c.type, c.queue, c.priority, c.missed, c.paused,
           EXISTS (SELECT FROM notifyq.worker w
                   WHERE c.name = ANY (w.crons) AND notifyq.is_alive(w.seen_at, w.lease)) AS served,
           CASE WHEN NOT c.paused THEN c.next_at END AS next_at, c.last_at, c.recent[1] AS last_task,
           (SELECT a.state FROM notifyq.all_tasks a WHERE a.id = c.recent[1]) AS last_state
    FROM notifyq.cron c
) AS t
ORDER BY t.name
