-- What became of the tasks that task $1 has waited for, in their order. Of one that nobody knows any more, or that lives
-- once more, only the id.
SELECT a.id, left(f.type, 200) AS type, f.state, f.result, f.errors -> -1 ->> 'error' AS error
FROM notifyq.task t
CROSS JOIN jsonb_array_elements(t.options -> 'after') WITH ORDINALITY AS o (id, n)
CROSS JOIN LATERAL (SELECT o.id::bigint) AS a (id)
LEFT JOIN notifyq.finished f ON f.id = ANY (ARRAY[a.id])
WHERE t.id = $1::bigint
ORDER BY o.n
