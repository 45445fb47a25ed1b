-- Which of the crons $1 have a slot within the next $2 seconds, or don't know their next one; and what time it is. Who doesn't
-- know it reckons from `since`: from now, or from a slot that was put ahead before the schedule was changed and still waits.
SELECT name, expression, tz, missed, next_at, clock_timestamp() AS now,
       CASE WHEN next_at IS NULL AND last_at > clock_timestamp()
                 AND (SELECT t.id FROM notifyq.task t WHERE t.id = c.recent[1]) IS NOT NULL
            THEN last_at ELSE clock_timestamp() END AS since
FROM notifyq.cron c
WHERE name = ANY ($1::text[]) AND NOT paused
  AND (next_at IS NULL OR next_at <= clock_timestamp() + make_interval(secs => $2::float8))
