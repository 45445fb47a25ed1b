-- Fetch the payloads of tasks $2, attempts $3, of worker $1. No row for a task: the worker has lost its lease.
-- finish.sql explains the lookup by id.
SELECT t.id, t.payload
FROM unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt
