-- As enqueue_many.sql, and the last of the types and payloads is of a task that runs when all the others have ended; $9 is its
-- on_dead. Returns its id, and the others' as after, NULL if there are none.
WITH given AS (
    SELECT t.type, t.payload::jsonb AS payload, t.n, t.n = cardinality($1::text[]) AS last
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (type, payload, n)
), grouped AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    SELECT g.type, g.payload, $3, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()), $6, $7,
           $8::text::jsonb
    FROM given g
    WHERE NOT g.last
    RETURNING id
), ids AS (
    SELECT array_agg(g.id) AS ids FROM grouped g  -- in their order, and before the id of the last is drawn
), callback AS (
    INSERT INTO notifyq.task (type, payload, queue, priority, max_attempts, options)
    SELECT g.type, g.payload, $3, $6, $7,
           CASE WHEN i.ids IS NOT NULL THEN jsonb_build_object('after', i.ids, 'on_dead', $9::text) END
    FROM given g, ids i
    WHERE g.last
    RETURNING id
)
SELECT callback.id, ids.ids AS after FROM callback, ids
