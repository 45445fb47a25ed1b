-- As claim.sql, but from the tasks that other workers set aside because they had no handler for the type: those of the
-- types $5. $6 is claim.sql's $5.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp(), withheld = false
WHERE t.id = ANY (ARRAY(
    SELECT ready.id
    FROM unnest($2::text[], $3::integer[]) AS q (queue, room)
    CROSS JOIN unnest($5::text[]) AS k (type)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.type = k.type AND r.queue = q.queue AND r.worker IS NULL AND r.withheld AND r.parked IS NULL
        ORDER BY r.priority DESC, r.id
        LIMIT q.room
        FOR UPDATE SKIP LOCKED
    ) AS ready
    LIMIT $4::integer
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
