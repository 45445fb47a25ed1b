-- Which of the crons $1 have a slot within the next $2 seconds, or don't know their next one; and what time it is.
SELECT name, expression, tz, missed, next_at, clock_timestamp() AS now
FROM notifyq.cron
WHERE name = ANY ($1::text[]) AND NOT paused
  AND (next_at IS NULL OR next_at <= clock_timestamp() + make_interval(secs => $2))
