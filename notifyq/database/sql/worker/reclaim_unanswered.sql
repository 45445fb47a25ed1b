-- After worker $1 lost the connection on which it claims, and before it claims on another one: tasks of a claim whose
-- answer never came are ready again, and the attempt doesn't count. end_claims.sql runs first, since a claim may still
-- be under way. $2 and $3 are the ids and attempts of the leases that the worker knows. Both are compared, since a task
-- may have been taken from the worker and claimed by it again while the old handler still ends. With $4, of
-- those tasks only (left_out.py). Returns how many.
WITH back AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, run_at = t.run_at
    WHERE t.worker = $1 AND ($4::bigint[] IS NULL OR t.id = ANY ($4))
      AND NOT EXISTS (SELECT FROM unnest($2::bigint[], $3::smallint[]) AS k (id, attempt)
                      WHERE k.id = t.id AND k.attempt = t.attempts)
    RETURNING t.watched AND notifyq.note_lease_given_up(t)
)
SELECT count(*)::integer FROM back
