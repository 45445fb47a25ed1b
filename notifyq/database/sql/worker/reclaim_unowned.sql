-- The safety net under rescue: tasks under the lease of a worker that isn't registered any more, which a worker that
-- was frozen in the middle of a claim can leave behind. Those of $1, which list_unowned.sql found, are ready again. Returns
-- how many. Under row level security a worker that isn't seen may live.
--
-- No ORDER BY: SKIP LOCKED never waits, so the order doesn't matter. num_nonnulls says "IS NOT NULL" where the planner
-- doesn't see it: else it might read all that is running, and not these.
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
