-- Settle task $2, attempt $3, of worker $1 as done, in the transaction of its handler, which commits next. $4:
-- whether done tasks are kept. Returns the transaction's id, for read_transaction_status.sql, and whether others may
-- wait for the task's end. No row: the lease was lost, and nothing is written.
--
-- It runs on a connection with the user's settings, not a worker's. finish.sql explains the comparison with the lease.
WITH gone AS (
    DELETE FROM notifyq.task t
    WHERE t.id = $2::bigint AND t.worker IS NOT DISTINCT FROM $1::integer AND t.attempts = $3::smallint
    RETURNING t.*
), kept AS (
    INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts, max_attempts,
                                  state, queue, type, worker, payload, result, errors, options)
    SELECT id, created_at, run_at, processing_at, clock_timestamp(), priority, attempts, max_attempts,
           'done', queue, type, (SELECT w.name FROM notifyq.worker w WHERE w.id = $1), payload, NULL, errors, options
    FROM gone
    WHERE $4::boolean OR awaited OR watched AND EXISTS (SELECT FROM notifyq.dependency d WHERE d.needs = gone.id)
    ON CONFLICT (id) DO UPDATE  -- an older task had this id: see forget_older_outcomes.sql
    SET (created_at, run_at, processing_at, processed_at, priority, attempts, max_attempts, state, queue, type, worker,
         payload, result, errors, options) =
        (EXCLUDED.created_at, EXCLUDED.run_at, EXCLUDED.processing_at, EXCLUDED.processed_at, EXCLUDED.priority,
         EXCLUDED.attempts, EXCLUDED.max_attempts, EXCLUDED.state, EXCLUDED.queue, EXCLUDED.type, EXCLUDED.worker,
         EXCLUDED.payload, EXCLUDED.result, EXCLUDED.errors, EXCLUDED.options)
)
SELECT pg_current_xact_id()::text AS xid, watched AS slot_released FROM gone
