-- As claim.sql, for a worker whose free threads may be fewer than the tasks that it asks for (capacity.py): it takes
-- only tasks that fit into its threads. A task that doesn't fit is locked until this statement ends, and stays ready.
--
--     $6   types that have plain handlers
--     $7   how many tasks of each of these types share a thread
--     $8   how many tasks of each of these types the worker holds
--     $9   how many threads are free
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp()
WHERE t.id = ANY ((
    SELECT notifyq.choose_fitting(array_agg(found.id), array_agg(found.type), $6::text[], $7::integer[], $8::integer[],
                                  $9::integer)
    FROM (
        SELECT ready.id, ready.type
        FROM unnest($2::text[], $3::integer[]) AS q (queue, capacity)
        CROSS JOIN LATERAL (
            SELECT r.id, r.type
            FROM notifyq.task r
            WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
            ORDER BY r.priority DESC, r.id + 0
            LIMIT q.capacity
            FOR UPDATE SKIP LOCKED
        ) AS ready
        LIMIT $4::integer
    ) AS found
)::bigint[])
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, left(t.type, 201) AS type, t.queue, t.priority, t.max_attempts,
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $5) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after, t.expires_at) END
              AS needs_admission,
          t.crashes
