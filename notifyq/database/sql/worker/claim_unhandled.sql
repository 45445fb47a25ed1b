-- Claim, as claim.sql does, tasks of the types $5 that other workers released because they had no handler for the type.
-- $6 is claim.sql's $5.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp(), withheld = false
WHERE t.id = ANY (ARRAY(
    SELECT ready.id
    FROM unnest($2::text[], $3::integer[]) AS q (queue, capacity)
    CROSS JOIN unnest($5::text[]) AS k (type)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.type = k.type AND r.queue = q.queue AND r.worker IS NULL AND r.withheld AND r.parked IS NULL
        ORDER BY r.priority DESC, r.id
        LIMIT q.capacity
        FOR UPDATE SKIP LOCKED
    ) AS ready
    LIMIT $4::integer
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, t.type, t.queue, t.priority, t.max_attempts,
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $6) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after, t.expires_at) END
              AS needs_admission,
          t.crashes
