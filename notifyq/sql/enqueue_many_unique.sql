-- As enqueue_many.sql, for tasks of which some are unique: $8 is an array too, of each one's options. Who sends them sorted by
-- key waits for nobody who waits for him. Returns for each key the id and whether it was there before, and the ids of those
-- without one, in their order. Of unique_task: enqueue_unique.sql.
WITH new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    SELECT t.type, t.payload::jsonb, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4), now()), $6, $7,
           t.options::jsonb
    FROM unnest($1::text[], $2::text[], $8::text[]) AS t (type, payload, options)
    RETURNING id, options ->> 'unique_key' AS key
)
SELECT id, key, false AS existed FROM new
UNION ALL
SELECT notifyq.unique_task(k.key), k.key, true
FROM (SELECT o.options::jsonb ->> 'unique_key' AS key FROM unnest($8::text[]) AS o (options)) AS k
WHERE k.key IS NOT NULL AND NOT EXISTS (SELECT FROM new WHERE new.key = k.key)
