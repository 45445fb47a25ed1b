-- Read the outcomes of the tasks that task $1 waited for, in their order, from position $2 on (the first is 1). It
-- stops after the result with which 4 MB are reached, as they are stored. "left" is how many tasks there are from that
-- position on. For a task that was deleted, or that runs again after a retry, only the id is returned.
SELECT r.id, r.type, r.state, r.result, r.error, r.left
FROM (
    SELECT a.id, left(f.type, 200) AS type, f.state, f.result, f.errors -> -1 ->> 'error' AS error, o.n,
           count(*) OVER () AS left,
           sum(coalesce(pg_column_size(f.result), 0)) OVER (ORDER BY o.n)
               - coalesce(pg_column_size(f.result), 0) AS before
    FROM notifyq.task t
    CROSS JOIN jsonb_array_elements(t.options -> 'after') WITH ORDINALITY AS o (id, n)
    CROSS JOIN LATERAL (SELECT o.id::bigint) AS a (id)
    LEFT JOIN notifyq.finished f ON f.id = ANY (ARRAY[a.id])
    WHERE t.id = $1::bigint AND o.n >= $2::bigint
) AS r
WHERE r.before < 4194304
ORDER BY r.n
