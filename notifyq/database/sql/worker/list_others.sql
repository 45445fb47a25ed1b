-- List the workers that may keep a drain from its tasks: worker $1 drains the queues $2, and has handlers for the types
-- $3. Returns their ids, their last heartbeats as numbers, and:
--
--     dead   whether it holds such a task and has no session left. Then that task is ready again soon: see rescue.sql
--
-- Each of the others is in one of the queues, and has no handler for one of the types. So it may claim such a task, and
-- release it some milliseconds later.
--
-- It reads pg_locks, since asking for a lock takes it. All sessions of a worker share its lock, and a rescuer has it
-- exclusively. For EXISTS the planner might read all running tasks at once.
WITH alive AS MATERIALIZED (
    SELECT l.objid
    FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.classid = 1852990827 AND l.objsubid = 2 AND l.mode = 'ShareLock'
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
), other AS MATERIALIZED (
    SELECT w.id, extract(epoch FROM w.seen_at)::float8 AS seen, w.queues && $2::text[] AND NOT w.types @> $3 AS lacks,
           NOT w.id::oid = ANY (ARRAY(SELECT alive.objid FROM alive)) AND (
               SELECT true FROM notifyq.task t
               WHERE t.worker = w.id AND t.queue = ANY ($2::text[]) AND t.type = ANY ($3::text[])
               LIMIT 1
           ) IS NOT NULL AS dead
    FROM notifyq.worker w
    WHERE w.id <> $1
)
SELECT o.id, o.seen, o.dead FROM other o WHERE o.dead OR o.lacks
