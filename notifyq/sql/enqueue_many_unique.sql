-- As enqueue_many.sql, for tasks of which some are unique: beside types and payloads, arrays of keys $15, states $16 (joined by
-- commas), seconds $17 and what if there is another $18. Who sends them sorted by key waits for nobody who waits for him.
-- Returns for each key the id and whether it was there before, and the ids of those without one, in their order. Of
-- unique_task: enqueue_unique.sql.
WITH new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, order_key, limit_key, limit_running,
                              limit_rate, limit_seconds, after, on_dead,
                              unique_key, unique_states, unique_for, on_conflict)
    SELECT t.type, t.payload::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4), now()), $6, $7, $8, $9,
           $10, $11, $12, $13, $14, t.key, string_to_array(t.states, ','), t.seconds, t.conflict
    FROM unnest($1::text[], $2::text[], $15::text[], $16::text[], $17::float8[], $18::text[])
        AS t (type, payload, key, states, seconds, conflict)
    RETURNING id, unique_key
)
SELECT id, unique_key AS key, false AS existed FROM new
UNION ALL
SELECT notifyq.unique_task(k.key), k.key, true
FROM unnest($15::text[]) AS k (key)
WHERE k.key IS NOT NULL AND NOT EXISTS (SELECT FROM new WHERE new.unique_key = k.key)
