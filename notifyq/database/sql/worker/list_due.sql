-- List up to $2 due tasks of each of the queues $1, without the tasks $3, after PostgreSQL refused a promotion
-- (left_out.py). Returns ids.
SELECT s.id
FROM unnest($1::text[]) AS q (queue)
CROSS JOIN LATERAL (
    SELECT r.id
    FROM notifyq.task r
    WHERE r.queue = q.queue AND r.worker IS NULL AND r.run_at > r.created_at AND NOT r.promoted
      AND r.run_at <= statement_timestamp() AND r.id <> ALL ($3::bigint[])
    ORDER BY r.run_at
    LIMIT $2::integer
) AS s
