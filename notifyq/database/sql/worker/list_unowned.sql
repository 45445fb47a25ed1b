-- List up to 10,000 tasks for reclaim_unowned.sql, without the tasks $1. It runs first, since an UPDATE rings even if
-- it changes no row. Returns ids.
--
-- No ORDER BY: the planner might read all of task_pkey to save a sort by id.
SELECT t.id
FROM notifyq.task t
WHERE t.worker IS NOT NULL AND NOT EXISTS (SELECT FROM notifyq.worker w WHERE w.id = t.worker)
  AND NOT row_security_active('notifyq.worker') AND t.id <> ALL ($1::bigint[])
LIMIT 10000
