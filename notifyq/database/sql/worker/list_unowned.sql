-- What is there for reclaim_unowned.sql, without the tasks $1? Asked first, since its UPDATE rings even for no row. Returns ids.
--
-- No ORDER BY: by id, the planner might read all of task_pkey to save a sort.
SELECT t.id
FROM notifyq.task t
WHERE t.worker IS NOT NULL AND NOT EXISTS (SELECT FROM notifyq.worker w WHERE w.id = t.worker)
  AND NOT row_security_active('notifyq.worker') AND t.id <> ALL ($1::bigint[])
LIMIT 10000
