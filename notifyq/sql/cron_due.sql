-- Which of the crons $1 have a slot within the next $2 seconds, or don't know their next one; and those whose next
-- slot was not yet found plausible: the crons $3 had the slots $4 when that was looked at, the last time at $5, and a
-- clock that was set back since makes all of them doubtful. And what time it is. Where the next slot isn't known, or
-- isn't plausible, it is the first one after `since`: after now, or after the last slot that was put ahead and still
-- waits, so that no slot is enqueued twice.
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
