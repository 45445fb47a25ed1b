-- Take up to $4 ready tasks under the lease of worker $1: from each queue of $2 at most its room in $3. Returns what a
-- handler needs. A payload of more than $5 bytes is left out (NULL): the runner that gets to the task fetches it, see
-- large_payloads.py. So an answer is a few MB at most, whatever was enqueued.
--
-- * = ANY(ARRAY(...)) is run once, before the UPDATE. As a join or an IN the planner may run the LIMIT again
--   for each outer row and so claim more than asked for; and a CTE costs twice as much for a single row.
-- * The inner WHERE and ORDER BY are index task_ready's, word for word: it reads as many entries as it takes,
--   whatever else is in the table.
-- * least, greatest and left: somebody's odd row must not fail a claim, nor have an answer that Python can't read or hold.
-- * inline_payload (schema.sql) measures the binary form. The text is up to four times as long where it is made of
--   digits. Numbers such as 1e131071 make it longer still; then the claim fails or times out, and the next claim leaves
--   out all payloads.
-- * needs_admission is NULL where a BEFORE trigger of somebody's returned OLD: the row is returned, and its lease isn't written.
-- * The EXISTS is for a worker that was given up for dead: what it claims now nobody would rescue.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp()
WHERE t.id = ANY (ARRAY(
    SELECT ready.id
    FROM unnest($2::text[], $3::integer[]) AS q (queue, room)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld AND (r.run_at <= r.created_at OR r.promoted)
        ORDER BY r.priority DESC, r.id + 0
        LIMIT q.room
        FOR UPDATE SKIP LOCKED
    ) AS ready
    LIMIT $4::integer
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, left(t.type, 201) AS type, t.queue, t.priority, t.max_attempts,
          notifyq.readable_time(t.created_at) AS created_at,
          notifyq.inline_payload(t.payload, $5) AS payload,
          CASE WHEN t.worker = $1 THEN notifyq.needs_admission(t.limit_key, t.order_key, t.after) END
              AS needs_admission,
          t.crashes
