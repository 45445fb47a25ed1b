-- Which of the tasks $2, attempts $3, still have the lease of worker $1, though a statement has just written their
-- outcomes and returned nothing of them. A row that is there as it was has been kept by a BEFORE trigger that returned
-- NULL, or by a policy. Of the lookup by id: finish.sql.
SELECT t.id
FROM unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
WHERE t.worker IS NOT DISTINCT FROM $1::integer AND t.attempts = o.attempt
