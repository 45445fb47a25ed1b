-- Make tasks ready again that worker $1 claimed on a connection which it lost before the answer came. The attempts
-- don't count. end_backends.sql runs first, since that claim may still be under way.
--
--     $2, $3   ids and attempts of the leases that the worker knows. Both are compared: a task may have been taken from
--              the worker, and claimed by it again while the old handler still ends
--     $4       of these tasks only (left_out.py); NULL: of all
--
-- Returns how many.
WITH back AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, run_at = t.run_at
    WHERE t.worker = $1 AND ($4::bigint[] IS NULL OR t.id = ANY ($4))
      AND NOT EXISTS (SELECT FROM unnest($2::bigint[], $3::smallint[]) AS k (id, attempt)
                      WHERE k.id = t.id AND k.attempt = t.attempts)
    RETURNING t.watched AND notifyq.note_lease_given_up(t)
)
SELECT count(*)::integer FROM back
