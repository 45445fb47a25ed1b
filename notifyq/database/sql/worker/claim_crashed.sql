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
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $6) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after) END
              AS needs_admission,
          t.crashes
