-- List what the next claim would take, after PostgreSQL refused a claim (left_out.py). It locks nothing. Returns ids.
--
--     $1, $2   queues, and how many tasks of each at most
--     $3       how many tasks in all at most
--     $4       ids of tasks to leave out
--     $5       NULL: ready tasks, as claim.sql; or types: of these the unhandled tasks, as claim_unhandled.sql
--     $6       types to leave out of what was found
SELECT ready.id
FROM (
    SELECT ready.id, ready.type
    FROM unnest($1::text[], $2::integer[]) AS q (queue, capacity)
    CROSS JOIN LATERAL (
        (SELECT r.id, r.type
         FROM notifyq.task r
         WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
           AND r.id <> ALL ($4::bigint[]) AND $5::text[] IS NULL
         ORDER BY r.priority DESC, r.id + 0
         LIMIT q.capacity)
        UNION ALL
        (SELECT r.id, r.type
         FROM unnest($5) AS k (type)
         CROSS JOIN LATERAL (
             SELECT r.id, r.type
             FROM notifyq.task r
             WHERE r.type = k.type AND r.queue = q.queue AND r.worker IS NULL AND r.withheld AND r.parked IS NULL
               AND r.id <> ALL ($4)
             ORDER BY r.priority DESC, r.id
             LIMIT q.capacity
         ) AS r
         LIMIT q.capacity)
    ) AS ready
    LIMIT $3::integer
) AS ready
WHERE ready.type <> ALL ($6::text[])
