-- For people and monitors: queues, workers and tasks that no worker takes, as one JSON document.
--
-- It counts all tasks that are still known, in one scan: half a second per million, if work_mem allows it to hash. It
-- reads only what the role "may read" can. So it computes what no worker takes from the workers' own rows, not from
-- task.withheld: ready tasks of a queue or a type that no live worker has. A ready task of a paused queue waits for a
-- person, and isn't late. Times are kept within what can be subtracted; before version 17 infinity can't.
WITH counted AS MATERIALIZED (
    SELECT queue, type, state, count(*) AS n,
           min(least(greatest(created_at, run_at, '0001-01-03Z'), statement_timestamp())) FILTER (
               WHERE state = 'ready' AND queue NOT IN (SELECT name FROM notifyq.queue WHERE paused)) AS since,
           min(least(greatest(processing_at, '0001-01-03Z'), statement_timestamp()))
               FILTER (WHERE state = 'running') AS begun
    FROM notifyq.all_tasks
    GROUP BY queue, type, state
), by_queue AS (
    SELECT queue, queue IN (SELECT name FROM notifyq.queue WHERE paused) AS paused,
           coalesce(sum(n) FILTER (WHERE state = 'scheduled'), 0) AS scheduled,
           coalesce(sum(n) FILTER (WHERE state = 'ready'), 0) AS ready,
           coalesce(sum(n) FILTER (WHERE state = 'running'), 0) AS running,
           coalesce(sum(n) FILTER (WHERE state = 'done'), 0) AS done,
           coalesce(sum(n) FILTER (WHERE state = 'dead'), 0) AS dead,
           coalesce(sum(n) FILTER (WHERE state = 'cancelled'), 0) AS cancelled,
           round(extract(epoch FROM statement_timestamp() - min(since))::numeric, 3) AS oldest_ready_seconds,
           round(extract(epoch FROM statement_timestamp() - min(begun))::numeric, 3) AS longest_running_seconds
    FROM counted
    GROUP BY queue
), unserved AS (
    SELECT c.queue, c.type, c.n AS ready,
           round(extract(epoch FROM statement_timestamp() - c.since)::numeric, 3) AS oldest_ready_seconds
    FROM counted c
    WHERE c.state = 'ready' AND c.since IS NOT NULL
      AND NOT EXISTS (SELECT FROM notifyq.worker w
                      WHERE c.queue = ANY (w.queues) AND c.type = ANY (w.types)
                        AND notifyq.is_alive(w.seen_at, w.lease))
), workers AS (
    SELECT id, name, CASE WHEN notifyq.is_alive(seen_at, lease) THEN status
                          ELSE 'silent' END AS status,
           CASE WHEN isfinite(seen_at) THEN round(extract(epoch FROM statement_timestamp() - seen_at)::numeric, 3)
                END AS seen_seconds,
           running, concurrency, queues, types, started_at
    FROM notifyq.worker
)
SELECT json_build_object(
    'queues', (SELECT coalesce(json_agg(q ORDER BY q.queue), '[]') FROM by_queue q),
    'oldest_ready_seconds', (SELECT max(q.oldest_ready_seconds) FROM by_queue q),
    'longest_running_seconds', (SELECT max(q.longest_running_seconds) FROM by_queue q),
    'unserved', (SELECT coalesce(json_agg(u ORDER BY u.queue, u.type), '[]') FROM unserved u),
    'workers', (SELECT coalesce(json_agg(w ORDER BY w.started_at, w.id), '[]') FROM workers w)
)::text
