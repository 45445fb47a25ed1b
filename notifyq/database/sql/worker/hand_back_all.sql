-- Hand back all tasks that worker $1 still holds as far as the database knows: its last statement. The attempts don't
-- count. These include tasks of a claim whose answer never came. With $2, only these tasks (left_out.py). Returns how
-- many.
WITH held AS MATERIALIZED (
    SELECT t.id FROM notifyq.task t
    WHERE t.worker = $1 AND ($2::bigint[] IS NULL OR t.id = ANY ($2))
    ORDER BY t.id FOR UPDATE
), back AS (
    UPDATE notifyq.task t
    SET worker = NULL, attempts = t.attempts - 1, run_at = t.run_at, progress = NULL, note = NULL
    WHERE t.id = ANY (ARRAY(SELECT id FROM held))
    RETURNING t.watched AND notifyq.note_lease_given_up(t)
)
SELECT count(*)::integer FROM back
