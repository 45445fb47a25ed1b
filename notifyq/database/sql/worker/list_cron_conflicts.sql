-- Of the crons of an app, as register_crons.sql gets them: those that the database has with another schedule and that a
-- live worker other than $10 serves too. Returns the database's version of each, and that worker.
SELECT c.name, c.expression, c.tz, c.type, c.queue, w.name AS worker
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[], $8::text[],
            $9::text[])
    AS n (name, expression, tz, type, payload, queue, priority, missed, options)
JOIN notifyq.cron c ON c.name = n.name
CROSS JOIN LATERAL (
    SELECT w.name FROM notifyq.worker w
    WHERE c.name = ANY (w.crons) AND w.id <> $10::integer
      AND notifyq.is_alive(w.seen_at, w.lease)
    LIMIT 1
) AS w
WHERE (c.expression, c.tz, c.type, c.payload, c.queue, c.priority, c.missed, c.options)
      IS DISTINCT FROM (n.expression, n.tz, n.type, n.payload::jsonb, n.queue, n.priority, n.missed, n.options::jsonb)
