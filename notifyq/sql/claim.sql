-- Take up to $4 ready tasks under the lease of worker $1: from each queue of $2 at most its room in $3.
-- Returns what a handler needs, the payload as NULL if it is too large to hold hundreds of, or if $5.
--
-- * = ANY(ARRAY(...)) is run once, before the UPDATE. As a join or an IN the planner may run the LIMIT again
--   for each outer row and so claim more than asked for; and a CTE costs twice as much for a single row.
-- * The inner WHERE and ORDER BY are index task_ready's, word for word: it reads as many entries as it takes,
--   whatever else is in the table.
-- * least, greatest and left: somebody's odd row must not fail a claim, nor have an answer that Python can't read or hold.
-- * A payload's size is that on disk, compressed up to 87 times (by lz4 up to 255): so of those above 64 kB the whole
--   is looked at, as an array's element isn't compressed. That is up to four times the length of the text, where it is
--   digits; the worker checks the length itself.
-- * The EXISTS is for a worker that was given up for dead: what it claims now nobody would rescue.
UPDATE notifyq.task t
SET worker = $1, attempts = least(t.attempts, 32766) + 1, processing_at = clock_timestamp()
WHERE t.id = ANY (ARRAY(
    SELECT ready.id
    FROM unnest($2::text[], $3::integer[]) AS q (queue, room)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.aside AND (r.run_at <= r.created_at OR r.promoted)
        ORDER BY r.priority DESC, r.id + 0
        LIMIT q.room
        FOR UPDATE SKIP LOCKED
    ) AS ready
    LIMIT $4::integer
))
AND EXISTS (SELECT FROM notifyq.worker w WHERE w.id = $1)
RETURNING t.id, t.attempts, left(t.type, 201) AS type, t.queue, t.priority, t.max_attempts,
          greatest(least(t.created_at, '9999-12-30Z'), '0001-01-03Z') AS created_at,
          CASE WHEN NOT $5::boolean
            AND (pg_column_size(t.payload) <= 65536
                 OR pg_column_size(t.payload) <= 16777216 AND pg_column_size(ARRAY[t.payload]) <= 67108864)
       THEN t.payload END AS payload,
       t.limit_key IS NOT NULL OR t.order_key IS NOT NULL OR t.after IS NOT NULL AS judged
