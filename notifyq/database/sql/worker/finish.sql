-- Settle: write final outcomes of worker $1 into the history.
--
--     $2, $3   ids and attempts
--     $4       states: done, dead or cancelled
--     $5, $6   results and errors; both may be empty arrays
--     $7       whether done and cancelled tasks are kept at all; awaited tasks and predecessors are kept in any case
--
-- Returns the ids of the tasks that it settled, and for each whether other tasks may wait for its end (slot_released).
-- The worker had lost the leases of the others, and nothing is written for them.
--
-- Each row is looked up by its id, whatever the planner believes. The plan is made once, with the statistics of some
-- moment. If nothing ran at that moment, index task_running looks like the way to "worker = $1", and a batch of 1000
-- takes 150 ms instead of 8. If the table was empty then, reading all of task_pkey looks as good. IS NOT DISTINCT FROM
-- prevents the first, = ANY (ARRAY[...]) the second. The other statements that settle do the same.
WITH outcome AS MATERIALIZED (
    SELECT * FROM unnest($2::bigint[], $3::smallint[], $4::text[], $5::jsonb[], $6::jsonb[])
        AS o (id, attempt, state, result, error)
), gone AS (
    DELETE FROM notifyq.task t
    USING outcome o
    WHERE t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt
    -- Not t.*: a column that nobody needs costs 0.5 % of all this.
    RETURNING t.id, t.created_at, t.run_at, t.processing_at, t.priority, t.attempts, t.max_attempts, t.queue, t.type,
              t.payload, t.errors, t.options, t.watched, t.awaited, o.state, o.result, o.error
), kept AS (
    INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts, max_attempts,
                                  state, queue, type, worker, payload, result, errors, options)
    SELECT id, created_at, run_at, processing_at, clock_timestamp(), priority, attempts, max_attempts,
           state, queue, type, (SELECT w.name FROM notifyq.worker w WHERE w.id = $1), payload, result,
           CASE WHEN error IS NULL THEN errors
                ELSE notifyq.append_error(errors, jsonb_set(error, '{at}', to_jsonb(clock_timestamp()))) END, options
    FROM gone
    WHERE $7 OR state = 'dead' OR awaited
       OR watched AND EXISTS (SELECT FROM notifyq.dependency d WHERE d.needs = gone.id)
)
SELECT id, watched AS slot_released FROM gone
