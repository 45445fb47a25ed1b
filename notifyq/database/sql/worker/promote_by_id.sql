-- Make those of the tasks $1 ready that are due, as check_due.sql does. finish.sql explains the lookup by id.
UPDATE notifyq.task t SET promoted = true
WHERE t.id = ANY (ARRAY(
    SELECT r.id
    FROM unnest($1::bigint[]) AS o (id)
    JOIN notifyq.task r ON r.id = ANY (ARRAY[o.id])
    -- CASE, as the planner might take the conditions of index task_scheduled for the way.
    WHERE CASE WHEN r.worker IS NULL AND NOT r.promoted
               THEN r.run_at > r.created_at AND r.run_at <= statement_timestamp() END
    FOR UPDATE OF r SKIP LOCKED
))
RETURNING t.id, t.promoted
