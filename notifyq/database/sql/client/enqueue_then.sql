-- Enqueue as enqueue_many_placed.sql does; the last item of each array is a task that runs when all others have ended,
-- and $9 is its on_dead. The delay $4 and the time $5 are for the others only. Returns that task's id, its created_at
-- as enqueue.sql returns it, and the others' ids as after, or NULL if there are none.
WITH given AS (
    SELECT t.type, t.payload::jsonb AS payload, t.queue, t.priority, t.options::jsonb AS options,
           t.n = cardinality($1::text[]) AS last
    FROM unnest($1::text[], $2::text[], $3::text[], $6::smallint[], $8::text[]) WITH ORDINALITY
        AS t (type, payload, queue, priority, options, n)
), grouped AS (
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    SELECT g.type, g.payload, g.queue, coalesce($5, clock_timestamp() + make_interval(secs => $4::float8), now()),
           g.priority, $7, g.options
    FROM given g
    WHERE NOT g.last
    RETURNING id
), ids AS (
    SELECT array_agg(g.id) AS ids FROM grouped g  -- in their order, and before the id of the last is drawn
), callback AS (
    INSERT INTO notifyq.task (type, payload, queue, priority, max_attempts, options)
    SELECT g.type, g.payload, g.queue, g.priority, $7,
           CASE WHEN i.ids IS NULL THEN g.options
                ELSE coalesce(g.options, '{}') || jsonb_build_object('after', i.ids, 'on_dead', $9::text) END
    FROM given g, ids i
    WHERE g.last
    RETURNING id, (extract(epoch FROM created_at) * 1000000)::bigint AS created
)
SELECT callback.id, callback.created, ids.ids AS after FROM callback, ids
