-- Enqueue as enqueue_many_placed.sql does, if some of the tasks are unique. Send the rows sorted by key, so that
-- concurrent calls can't deadlock. Returns id, key, existed: first a row for each task that was inserted, in their
-- order, whose key is NULL if it has none; then a row with the existing task for each given one whose key was in the
-- way. Given tasks that share a new key share its one row. enqueue_unique.sql explains find_unique_task.
WITH given AS (
    SELECT t.type, t.payload, t.queue, t.priority, t.options::jsonb AS options
    FROM unnest($1::text[], $2::text[], $3::text[], $6::smallint[], $8::text[])
        AS t (type, payload, queue, priority, options)
), new AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    SELECT g.type, g.payload::jsonb, g.queue,
           coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), g.priority, $7, g.options
    FROM given g
    RETURNING id, options ->> 'unique_key' AS key
)
SELECT id, key, false AS existed FROM new
UNION ALL
SELECT notifyq.find_unique_task(k.key), k.key, true
FROM (SELECT g.options ->> 'unique_key' AS key FROM given g) AS k
WHERE k.key IS NOT NULL AND NOT EXISTS (SELECT FROM new WHERE new.key = k.key)
