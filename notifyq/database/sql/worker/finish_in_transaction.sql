-- Settle task $2, attempt $3, of worker $1 as done, in the transaction of its handler, which commits next. $4:
-- whether done tasks are kept. Returns the transaction's id, for read_transaction_status.sql, and whether others may
-- wait for the task's end. No row: the lease was lost, and nothing is written.
--
-- It runs on a connection with the user's settings, not a worker's. finish.sql explains the comparison with the lease.
WITH gone AS (
    DELETE FROM notifyq.task t
    WHERE t.id = $2::bigint AND t.worker IS NOT DISTINCT FROM $1::integer AND t.attempts = $3::smallint
    RETURNING t AS task
), outcome AS MATERIALIZED (
    SELECT notifyq.write_outcome(g.task, 'done', (SELECT w.name FROM notifyq.worker w WHERE w.id = $1),
                                 (g.task).attempts, (g.task).errors)
    FROM gone g
    WHERE $4::boolean OR (g.task).awaited
       OR (g.task).watched AND EXISTS (SELECT FROM notifyq.dependency d WHERE d.needs = (g.task).id)
)
SELECT pg_current_xact_id()::text AS xid, (g.task).watched AS slot_released
FROM gone g, (SELECT count(*) FROM outcome) AS written
