-- As claim.sql, of what find_fewest_crashes.sql has found: up to $5 that have crashed $4 times. $6 is claim.sql's $5.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp(),
    withheld = false, parked = NULL, waiting_on = NULL
WHERE t.id = ANY (ARRAY(
    SELECT s.id
    FROM unnest($2::text[]) AS q (key)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.waiting_on = q.key AND r.withheld AND r.worker IS NULL AND r.type = ANY ($3::text[])
          AND coalesce(r.crashes, 0) + coalesce(r.crashes_alone, 0) = $4::integer
        ORDER BY r.priority DESC, r.id
        LIMIT $5::integer
        FOR UPDATE SKIP LOCKED
    ) AS s
    LIMIT $5
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, t.type, t.queue, t.priority, t.max_attempts,
          greatest(least(t.created_at, '9999-12-30Z'), '0001-01-03Z') AS created_at,
          CASE WHEN pg_column_size(t.payload) <= $6::integer / 8
                 OR pg_column_size(t.payload) <= $6 AND pg_column_compression(t.payload) IS NULL THEN t.payload
               WHEN pg_column_size(t.payload) <= $6 THEN
                    (SELECT p.whole[1] FROM (SELECT ARRAY[t.payload] AS whole OFFSET 0) AS p
                     WHERE pg_column_size(p.whole) <= $6) END AS payload,
          CASE WHEN t.worker = $1 THEN t.limit_key IS NOT NULL OR t.order_key IS NOT NULL OR t.after IS NOT NULL END
              AS needs_admission,
          t.crashes
