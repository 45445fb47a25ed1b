-- After worker $1 lost the connection that it claims on, and before it claims on another (end_claims.sql comes first:
-- a claim may still be under way): what a claim took whose answer never came is ready again, and the attempt doesn't
-- count. It knows of its leases of tasks $2, attempts $3: of the leases, since a task may have been taken from it and
-- claimed again while the old handler still winds up. Returns how many.
WITH back AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, run_at = t.run_at
    WHERE t.worker = $1
      AND NOT EXISTS (SELECT FROM unnest($2::bigint[], $3::smallint[]) AS k (id, attempt)
                      WHERE k.id = t.id AND k.attempt = t.attempts)
    RETURNING t.tracked AND notifyq.gave_up(t)
)
SELECT count(*)::integer FROM back
