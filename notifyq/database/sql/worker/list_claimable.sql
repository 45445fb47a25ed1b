-- After a claim that PostgreSQL refused (left_out.py): what the next one would take from each of the queues $1, at most its
-- room in $2 and $3 in all, without the tasks $4. With $5, of those types what others set aside, as in claim_unhandled.sql. Of
-- those found it leaves out the types $6. It locks nothing. Returns ids.
SELECT ready.id
FROM (
    SELECT ready.id, ready.type
    FROM unnest($1::text[], $2::integer[]) AS q (queue, room)
    CROSS JOIN LATERAL (
        (SELECT r.id, r.type
         FROM notifyq.task r
         WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
           AND r.id <> ALL ($4::bigint[]) AND $5::text[] IS NULL
         ORDER BY r.priority DESC, r.id + 0
         LIMIT q.room)
        UNION ALL
        (SELECT r.id, r.type
         FROM unnest($5) AS k (type)
         CROSS JOIN LATERAL (
             SELECT r.id, r.type
             FROM notifyq.task r
             WHERE r.type = k.type AND r.queue = q.queue AND r.worker IS NULL AND r.withheld AND r.parked IS NULL
               AND r.id <> ALL ($4)
             ORDER BY r.priority DESC, r.id
             LIMIT q.room
         ) AS r
         LIMIT q.room)
    ) AS ready
    LIMIT $3::integer
) AS ready
WHERE ready.type <> ALL ($6::text[])
