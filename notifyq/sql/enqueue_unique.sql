-- As enqueue.sql, for one with the unique_key $15, its states $16 and seconds $17 (NULL: the defaults), and what if there is
-- another, $18. Returns the id, and whether it is the other's. unique_task is asked once the INSERT is over, and looks anew:
-- this statement's own snapshot may be older than the other.
WITH new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, order_key, limit_key, limit_running,
                              limit_rate, limit_seconds, after, on_dead,
                              unique_key, unique_states, unique_for, on_conflict)
    VALUES ($1, $2::text::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4), now()), $6, $7, $8, $9, $10,
            $11, $12, $13, $14, $15::text, $16::text[], $17, $18)
    RETURNING id
)
SELECT coalesce((SELECT id FROM new), notifyq.unique_task($15::text)) AS id, NOT EXISTS (SELECT FROM new) AS existed
