-- Delete outcomes of older tasks whose ids were given a second time, to the tasks $2, attempts $3, that worker $1 runs.
-- Otherwise the new outcomes couldn't be written. Returns the ids. finish.sql explains the lookup by id.
DELETE FROM notifyq.finished f
USING unnest($2::bigint[], $3::smallint[]) AS o (id, attempt)
WHERE f.id = ANY (ARRAY[o.id])
  AND EXISTS (SELECT FROM notifyq.task t
              WHERE t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt)
RETURNING f.id
