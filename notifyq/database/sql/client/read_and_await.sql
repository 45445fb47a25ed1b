-- Of the tasks $1, which somebody waits for: what is known of each, and mark those that live, so that whoever ends
-- one tells (schema.sql: on_task_deleted). "marked" is true of those that were ended or are marked; if it isn't,
-- somebody has locked the row at this moment, and has to be asked about again. No row: there is no such task, in this
-- statement's snapshot.
--
-- Results that are more than 4 MB together, as they are stored, come in several answers: "later" is true of those whose
-- result isn't in this one.
--
-- It waits for nobody: SKIP LOCKED. A claim steps over what it locks, for as long as a commit takes that flushes
-- nothing; the worker looks again after 2 ms. What ends between the snapshot and the lock is found unmarked.
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
