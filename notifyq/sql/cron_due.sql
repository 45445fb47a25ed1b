-- Which of the crons $1 have a slot within the next $2 seconds, or don't know their next one; and those whose next slot
-- was not yet found plausible: the crons $3 had the slots $4 when that was looked at, the last time at $5, and a clock that
-- was set back since makes all of them doubtful. And what time it is. A cron that doesn't know its next slot is reckoned from
-- `since`: from now, or from a slot that was put ahead before the schedule was changed and still waits.
SELECT name, expression, tz, missed, next_at, clock_timestamp() AS now,
       CASE WHEN next_at IS NULL AND last_at BETWEEN clock_timestamp() AND '9999-12-30Z'
                 AND (SELECT t.id FROM notifyq.task t WHERE t.id = c.recent[1]) IS NOT NULL
            THEN last_at ELSE clock_timestamp() END AS since
FROM notifyq.cron c
WHERE name = ANY ($1::text[]) AND NOT paused
  AND (next_at IS NULL OR next_at <= clock_timestamp() + make_interval(secs => $2::float8)
       OR clock_timestamp() < $5::timestamptz
       OR NOT EXISTS (SELECT FROM unnest($3::text[], $4::timestamptz[]) AS p (name, next_at)
                      WHERE p.name = c.name AND p.next_at = c.next_at))
