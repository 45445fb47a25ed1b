-- Claim: put ready tasks under the lease of worker $1, and return what their handlers need.
--
--     $2, $3   queues, and how many tasks to take from each at most
--     $4       how many tasks to take in all at most
--     $5       a payload of more bytes is NULL in the answer; the task's runner fetches it (large_payloads.py)
--
-- So an answer is a few MB at most, whatever was enqueued. needs_admission is NULL where a BEFORE trigger returned OLD:
-- then the row is returned, and its lease wasn't written.
--
-- * = ANY (ARRAY(...)) runs once, before the UPDATE. With a join or an IN the planner may run the LIMIT again for each
--   outer row, and so claim more than it should. A CTE costs twice as much for a single row.
-- * The inner WHERE and ORDER BY are those of index task_ready, word for word. So the scan reads as many entries as it
--   takes, whatever else is in the table.
-- * least, readable_time and left: one odd row must not make a claim fail, nor its answer unreadable for Python.
-- * inline_payload (schema.sql) measures the binary form. The text is up to four times as long where it is made of
--   digits. Numbers such as 1e131071 make it longer still. Then the claim fails or times out, and the next claim leaves
--   out all payloads.
-- * EXISTS: a worker that was given up for dead claims nothing, since nothing would rescue what it claims.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp()
WHERE t.id = ANY (ARRAY(
    SELECT ready.id
    FROM unnest($2::text[], $3::integer[]) AS q (queue, capacity)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
        ORDER BY r.priority DESC, r.id + 0
        LIMIT q.capacity
        FOR UPDATE SKIP LOCKED
    ) AS ready
    LIMIT $4::integer
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, left(t.type, 201) AS type, t.queue, t.priority, t.max_attempts,
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $5) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after, t.expires_at) END
              AS needs_admission,
          t.crashes
