-- Read what is known of the tasks $1, for which a client waits. Mark those that live: their ends will send a NOTIFY
-- (schema.sql: on_task_deleted). Returns a row for each task that this statement's snapshot has. "marked" is true if
-- the task has ended or is marked. It is false if another session has locked the row: then ask again.
--
-- If the results take more than 4 MB together, as they are stored, they come in several answers. "later" is true of
-- tasks whose result isn't in this one.
--
-- The statement waits for no lock. A claim steps over the rows that it locks, until its commit, which flushes nothing;
-- the worker looks again after 2 ms. A task that ends between the snapshot and the lock can't be locked, and is
-- returned as not marked.
WITH free AS MATERIALIZED (
    SELECT t.id
    FROM notifyq.task t
    WHERE t.id = ANY ($1::bigint[]) AND NOT t.awaited
    FOR NO KEY UPDATE SKIP LOCKED
), marked AS (
    UPDATE notifyq.task t SET awaited = true WHERE t.id = ANY (ARRAY(SELECT id FROM free)) RETURNING t.id
)
SELECT a.id, a.state, a.type, CASE WHEN a.before < 4194304 THEN a.result END AS result, a.error, a.progress, a.note,
       greatest(least(a.created_at, '9999-12-30Z'), '0001-01-03Z') AS created_at,
       a.id IN (SELECT m.id FROM marked m)
       OR a.id NOT IN (SELECT t.id FROM notifyq.task t WHERE t.id = ANY ($1::bigint[]) AND NOT t.awaited) AS marked,
       a.before >= 4194304 AS later
FROM (
    SELECT a.*, sum(coalesce(pg_column_size(a.result), 0)) OVER (ROWS UNBOUNDED PRECEDING)
                - coalesce(pg_column_size(a.result), 0) AS before
    FROM notifyq.all_tasks a
    WHERE a.id = ANY ($1::bigint[])
) AS a
