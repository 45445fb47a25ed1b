-- Settle: task $2 of worker $1, its attempt $3, is done; in the transaction of its handler, which then commits. It is
-- kept if $4. Returns the transaction's id, for read_transaction_status.sql, and whether others may wait for its end; no row: the lease
-- was lost, and nothing is written.
--
-- It runs on a connection with the user's settings, not a worker's. Of the fence: finish.sql.
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
