-- Make those of the tasks $1 ready again whose lease is of a worker that isn't registered any more. list_unowned.sql
-- found them. It is the safety net under rescue.sql: a worker that was frozen in the middle of a claim can leave such
-- tasks behind. Returns how many. Under row level security a worker that this session can't see may live, so nothing is
-- done then.
--
-- No ORDER BY: SKIP LOCKED never waits, so the order doesn't matter. num_nonnulls says "IS NOT NULL" where the planner
-- doesn't see it. Otherwise the planner might read all running tasks instead of these.
WITH held AS MATERIALIZED (
    SELECT t.id
    FROM notifyq.task t
    WHERE t.id = ANY ($1::bigint[]) AND num_nonnulls(t.worker) = 1
      AND NOT EXISTS (SELECT FROM notifyq.worker w WHERE w.id = t.worker)
      AND NOT row_security_active('notifyq.worker')
    FOR UPDATE OF t SKIP LOCKED
), again AS (
    UPDATE notifyq.task t SET worker = NULL, run_at = t.run_at WHERE t.id = ANY (ARRAY(SELECT id FROM held))
    RETURNING t.watched AND notifyq.note_lease_given_up(t)
)
SELECT count(*)::integer FROM again
