-- For tests: the queues, of $1 (NULL: of all), with a task that could run now; the seconds until the next scheduled
-- task is due; and the time. Parked tasks and those in paused queues don't count; unhandled tasks do.
SELECT coalesce(array_agg(DISTINCT queue) FILTER (
           WHERE state = 'ready' OR state = 'scheduled' AND run_at <= statement_timestamp()), '{}') AS queues,
       extract(epoch FROM min(run_at) FILTER (
           WHERE state = 'scheduled' AND run_at > statement_timestamp() AND isfinite(run_at))
           - statement_timestamp())::float8 AS next_seconds,
       clock_timestamp() AS at
FROM notifyq.all_tasks
WHERE ($1::text[] IS NULL OR queue = ANY ($1)) AND waits_for IS NULL
  AND queue NOT IN (SELECT name FROM notifyq.queue WHERE paused)
