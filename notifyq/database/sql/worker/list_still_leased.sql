-- List those of the tasks $2, attempts $3, that worker $1 still holds, though a statement has just written their
-- outcomes and returned nothing for them. A BEFORE trigger that returned NULL, or a policy, has kept such a row as it
-- was. finish.sql explains the lookup by id.
SELECT t.id
FROM unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
WHERE t.worker IS NOT DISTINCT FROM $1::integer AND t.attempts = o.attempt
