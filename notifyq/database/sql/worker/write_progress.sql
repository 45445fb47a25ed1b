-- What handlers of worker $1 tell of their tasks: ids $2, attempts $3, how far they are $4, and notes $5. Who waits for
-- one is told that there is something to read, unless the queue of notifications is full (schema.sql). Returns the ids
-- it applied to: of the others the lease was lost, or somebody has locked the row, and a heartbeat waits for nobody.
WITH free AS MATERIALIZED (
    SELECT t.id, p.progress, p.note
    FROM unnest($2::bigint[], $3::smallint[], $4::real[], $5::text[]) AS p (id, attempt, progress, note)
    JOIN notifyq.task t ON t.id = ANY (ARRAY[p.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = p.attempt
    FOR NO KEY UPDATE OF t SKIP LOCKED
), written AS (
    UPDATE notifyq.task t SET progress = f.progress, note = f.note
    FROM free f
    WHERE t.id = ANY (ARRAY[f.id])
    RETURNING t.id, t.awaited
)
SELECT w.id, CASE WHEN w.awaited THEN notifyq.notify_unless_full('notifyq_progress', w.id::text)::text END AS told
FROM written w
