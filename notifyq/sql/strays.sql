-- After worker $1 lost the connection that it claims on, and before it claims on another (end_claims.sql comes first:
-- a claim may still be under way): what a claim took whose answer never came is ready again, and the attempt doesn't
-- count. $2 are the tasks it knows of. Returns how many.
WITH back AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, run_at = t.run_at
    WHERE t.worker = $1 AND NOT t.id = ANY ($2::bigint[])
    RETURNING 1
)
SELECT count(*)::integer FROM back
