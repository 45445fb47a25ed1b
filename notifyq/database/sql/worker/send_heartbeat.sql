-- Send the heartbeat of worker $1, which runs $2 tasks and is in status $3. Returns:
--
--     registered     whether the worker is still registered
--     lost           which of its tasks (ids $4, attempts $5) it has lost
--     others         which other workers there are
--     seen           their last heartbeats, as numbers: the receiver checks only whether they change
--     unhandled      whether other workers released tasks that this worker could run (queues $6, types $7)
--     suspects       whether tasks whose workers vanished wait to run isolated
--     slot_released  whether notifyq.slot_released has a row that no worker has handled, or a dependency is unconfirmed
--     wanted         if this worker sleeps ($8): whether another session waits for the bell's lock
--
-- finish.sql explains the lookup by id.
WITH beat AS (
    UPDATE notifyq.worker SET seen_at = clock_timestamp(), running = $2, status = $3 WHERE id = $1 RETURNING 1
)
SELECT EXISTS (SELECT FROM beat) AS registered,
       ARRAY(SELECT h.id
             FROM unnest($4::bigint[], $5::smallint[]) AS h (id, attempt)
             WHERE NOT EXISTS (
                 SELECT FROM notifyq.task t
                 WHERE t.id = ANY (ARRAY[h.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = h.attempt
             )) AS lost,
       ARRAY(SELECT w.id
             FROM notifyq.worker w
             WHERE w.id <> $1
             ORDER BY w.id) AS others,
       ARRAY(SELECT extract(epoch FROM w.seen_at)::float8
             FROM notifyq.worker w
             WHERE w.id <> $1
             ORDER BY w.id) AS seen,
       EXISTS (SELECT
               FROM unnest($6::text[]) AS q (queue)
               CROSS JOIN unnest($7::text[]) AS k (type)
               CROSS JOIN LATERAL (
                   SELECT
                   FROM notifyq.task r
                   WHERE r.type = k.type AND r.queue = q.queue AND r.worker IS NULL AND r.withheld AND r.parked IS NULL
                   LIMIT 1
               ) AS s) AS unhandled,
       EXISTS (SELECT
               FROM unnest($6::text[]) AS q (queue)
               CROSS JOIN LATERAL (
                   SELECT
                   FROM notifyq.task r
                   WHERE r.waiting_on = 'crashed:' || q.queue AND r.withheld AND r.type = ANY ($7::text[])
                   LIMIT 1
               ) AS s) AS suspects,
       EXISTS (SELECT FROM notifyq.slot_released)
       OR EXISTS (SELECT FROM notifyq.dependency d WHERE NOT d.confirmed) AS slot_released,
       CASE WHEN $8::boolean THEN notifyq.bell_wanted() ELSE false END AS wanted
