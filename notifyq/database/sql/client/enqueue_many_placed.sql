-- Enqueue as enqueue_many.sql does, but each task has a queue, a priority and options of its own: $3, $6 and $8 are
-- arrays too.
INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
SELECT t.type, t.payload::jsonb, t.queue, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()),
       t.priority, $7, t.options::jsonb
FROM unnest($1::text[], $2::text[], $3::text[], $6::smallint[], $8::text[])
    AS t (type, payload, queue, priority, options)
RETURNING id
