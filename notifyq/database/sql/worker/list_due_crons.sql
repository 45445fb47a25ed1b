-- Of the crons $1: those that have a slot within the next $2 seconds, those whose next slot isn't known, and those
-- whose next slot must be checked again. The last are crons $3 with slots $4 that were checked at $5: if the clock was
-- set back since then, all of them are doubtful.
--
-- Returns also the time, and `since`: the next slot of a cron that needs a new one is the first after `since`. It is
-- now, or the last slot that was enqueued ahead and still waits, so that no slot is enqueued twice.
SELECT name, expression, tz, missed, next_at, clock_timestamp() AS now,
       greatest(clock_timestamp(), (
           SELECT max(t.run_at) FROM notifyq.task t
           WHERE t.id = ANY (c.recent) AND t.attempts = 0
             AND t.run_at <= clock_timestamp() + make_interval(secs => $2::float8))) AS since
FROM notifyq.cron c
WHERE name = ANY ($1::text[]) AND NOT paused
  AND (next_at IS NULL OR next_at <= clock_timestamp() + make_interval(secs => $2::float8)
       OR clock_timestamp() < $5::timestamptz
       OR NOT EXISTS (SELECT FROM unnest($3::text[], $4::timestamptz[]) AS p (name, next_at)
                      WHERE p.name = c.name AND p.next_at = c.next_at))
