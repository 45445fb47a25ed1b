-- The type of the next ready task of each of the queues $1 that has one. It locks nothing.
SELECT q.queue, left(s.type, 201) AS type
FROM unnest($1::text[]) AS q (queue)
CROSS JOIN LATERAL (
    SELECT r.type
    FROM notifyq.task r
    WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
    ORDER BY r.priority DESC, r.id + 0
    LIMIT 1
) AS s
