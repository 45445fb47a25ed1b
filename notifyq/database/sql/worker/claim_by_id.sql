-- Claim, as claim.sql does, those of the tasks $2 that can still be claimed and that no other transaction has locked.
-- list_claimable.sql or list_crashed.sql has found them. $3 is claim.sql's $5. finish.sql explains the lookup by id.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp(),
    withheld = false, parked = NULL, waiting_on = NULL
WHERE t.id = ANY (ARRAY(
    SELECT r.id
    FROM unnest($2::bigint[]) AS o (id)
    JOIN notifyq.task r ON r.id = ANY (ARRAY[o.id])
    -- CASE, as the planner might take the conditions of index task_ready for the way.
    WHERE CASE WHEN r.worker IS NULL
               THEN coalesce(r.parked, 'crashed') = 'crashed'
                    AND (r.withheld OR r.run_at <= r.created_at OR r.promoted) END
    FOR UPDATE OF r SKIP LOCKED
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, left(t.type, 201) AS type, t.queue, t.priority, t.max_attempts,
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $3) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after, t.expires_at) END
              AS needs_admission,
          t.crashes
