-- Enqueue as enqueue.sql does, arrays of types and payloads: one statement, so the bell rings at most once.
INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
SELECT t.type, t.payload::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), $6, $7,
       $8::text::jsonb
FROM unnest($1::text[], $2::text[]) AS t (type, payload)
RETURNING id
