-- After a claim of suspects that PostgreSQL refused (left_out.py): up to $4 of those of types $2 at the keys $1 that
-- have crashed $3 times, without the tasks $5. Returns ids.
SELECT s.id
FROM unnest($1::text[]) AS q (key)
CROSS JOIN LATERAL (
    SELECT r.id
    FROM notifyq.task r
    WHERE r.waiting_on = q.key AND r.withheld AND r.worker IS NULL AND r.type = ANY ($2::text[])
      AND coalesce(r.crashes, 0) + coalesce(r.crashes_alone, 0) = $3::integer
      AND r.id <> ALL ($5::bigint[])
    ORDER BY r.priority DESC, r.id
    LIMIT $4::integer
) AS s
LIMIT $4
