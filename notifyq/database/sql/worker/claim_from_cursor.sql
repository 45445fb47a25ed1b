-- Claim, as claim.sql does, but only from the cursors on: of queue $5 and priority $6 the tasks from id $7 on. The
-- cursors of a queue come with its highest priority first. $8 is claim.sql's $5.
--
-- The priority is compared with =, since only then the scan begins at the cursor and skips the dead index entries
-- before it. cursors.py says why that matters, and which claim finds the tasks before the cursors.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp()
WHERE t.id = ANY (ARRAY(
    SELECT ready.id
    FROM unnest($2::text[], $3::integer[]) AS q (queue, capacity)
    CROSS JOIN LATERAL (
        SELECT level.id
        FROM unnest($5::text[], $6::smallint[], $7::bigint[]) AS m (queue, priority, cursor)
        CROSS JOIN LATERAL (
            SELECT r.id
            FROM notifyq.task r
            WHERE r.queue = m.queue AND r.priority = m.priority AND r.id + 0 >= m.cursor
              AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
            ORDER BY r.id + 0
            LIMIT q.capacity
            FOR UPDATE SKIP LOCKED
        ) AS level
        WHERE m.queue = q.queue
        LIMIT q.capacity
    ) AS ready
    LIMIT $4::integer
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, left(t.type, 201) AS type, t.queue, t.priority, t.max_attempts,
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $8) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after, t.expires_at) END
              AS needs_admission,
          t.crashes
