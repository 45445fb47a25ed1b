-- Enqueue a task.
--
--     $1, $2   type, payload
--     $3       queue
--     $4, $5   seconds from now, or a time; both NULL: at once
--     $6, $7   priority, max_attempts
--     $8       options
--
-- Returns the id, and created_at in microseconds since 1970: an integer needs no codec. The payload and the options
-- come as text, so that a caller's own codecs for jsonb don't matter.
INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
VALUES ($1, $2::text::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), $6, $7,
        $8::text::jsonb)
RETURNING id, (extract(epoch FROM created_at) * 1000000)::bigint AS created
