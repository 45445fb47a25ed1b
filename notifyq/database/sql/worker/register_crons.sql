-- A worker that starts writes the crons of its app, over those of workers that started earlier. If the expression or
-- the time zone has changed, the new one counts from now on.
INSERT INTO notifyq.cron AS c (name, expression, tz, type, payload, queue, priority, missed, options)
SELECT n.name, n.expression, n.tz, n.type, n.payload::jsonb, n.queue, n.priority, n.missed,
       n.options::jsonb
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[], $8::text[],
            $9::text[])
    AS n (name, expression, tz, type, payload, queue, priority, missed, options)
ORDER BY n.name
ON CONFLICT (name) DO UPDATE
SET expression = excluded.expression, tz = excluded.tz, type = excluded.type, payload = excluded.payload,
    queue = excluded.queue, priority = excluded.priority, missed = excluded.missed,
    options = excluded.options,
    next_at = CASE WHEN (c.expression, c.tz) = (excluded.expression, excluded.tz) THEN c.next_at END
