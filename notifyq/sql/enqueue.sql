-- type, payload, queue, seconds from now (NULL: at once) or a time (NULL), priority, max_attempts; order_key; limit_key, how
-- many of it run at once, how many start in how many seconds; ids to wait for, and what if one isn't done. Returns the id.
-- The payload comes as text, so that a caller's own codecs for jsonb don't matter.
INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, order_key, limit_key, limit_running,
                          limit_rate, limit_seconds, after, on_dead)
VALUES ($1, $2::text::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4), now()), $6, $7, $8, $9, $10,
        $11, $12, $13, $14)
RETURNING id
