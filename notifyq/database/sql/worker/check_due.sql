-- What a worker runs before it sleeps. It makes up to $3 due tasks of each queue of $1 ready, and returns:
--
--     promoted      how many tasks it made ready; NULL: a BEFORE trigger has undone that for some of them
--     next_seconds  when the next scheduled task is due
--     ready         whether the queues $2 have a ready task, or the queues $1 a due one that it left scheduled (another
--                   transaction has locked it, or there are more than $3). What it made ready doesn't count
--     inserted      how many tasks were ever inserted, rolled back or not
--     slot_released whether notifyq.slot_released has a row: a slot was released, or a task that others wait for has
--                   ended
--     settings      which queues are paused or limited, as JSON, or NULL for none
--     next_cursor   what to give as $5 the next time: a moment ago, as rows become visible a little after their time
--
-- With $4 it sends an echo, which proves that the bell works. $5 is a cursor: with it, it looks only for tasks that are
-- due from that time on. So it skips the index entries of tasks that were promoted earlier and that VACUUM may not
-- remove yet (cursors.py).
--
-- statement_timestamp() can be an index condition, clock_timestamp() can't. Both scans have one snapshot, so the second
-- still sees the promoted tasks as scheduled, and leaves out what is due by the clock. It subtracts two epochs: before
-- version 17 a time that is infinity can't be subtracted.
WITH due AS MATERIALIZED (
    SELECT s.id
    FROM unnest($1::text[]) AS q (queue)
    CROSS JOIN LATERAL (
        SELECT r.id
        FROM notifyq.task r
        WHERE r.queue = q.queue AND r.worker IS NULL AND r.run_at > r.created_at AND NOT r.promoted
          AND r.run_at <= statement_timestamp() AND r.run_at >= coalesce($5::timestamptz, '-infinity')
        ORDER BY r.run_at
        LIMIT $3::integer
        FOR UPDATE SKIP LOCKED
    ) AS s
), promoted AS (
    UPDATE notifyq.task SET promoted = true WHERE id = ANY (ARRAY(SELECT id FROM due)) RETURNING promoted
)
SELECT (SELECT CASE WHEN bool_and(p.promoted) IS NOT FALSE THEN count(*) END FROM promoted p) AS promoted,
       (SELECT (extract(epoch FROM min(s.run_at)) - extract(epoch FROM clock_timestamp()))::float8
        FROM unnest($1::text[]) AS q (queue)
        CROSS JOIN LATERAL (
            SELECT r.run_at
            FROM notifyq.task r
            WHERE r.queue = q.queue AND r.worker IS NULL AND r.run_at > r.created_at AND NOT r.promoted
              AND r.run_at > statement_timestamp()
            ORDER BY r.run_at
            LIMIT 1
        ) AS s) AS next_seconds,
       EXISTS (
            SELECT
            FROM unnest($2::text[]) AS q (queue)
            CROSS JOIN LATERAL (
                SELECT
                FROM notifyq.task r
                WHERE r.queue = q.queue AND r.worker IS NULL AND NOT r.withheld
                  AND (r.run_at <= r.created_at OR r.promoted)
                ORDER BY r.priority DESC, r.id + 0
                LIMIT 1
            ) AS s)
       OR EXISTS (
            SELECT
            FROM unnest($1::text[]) AS q (queue)
            CROSS JOIN LATERAL (
                SELECT
                FROM notifyq.task r
                WHERE r.queue = q.queue AND r.worker IS NULL AND r.run_at > r.created_at AND NOT r.promoted
                  AND r.run_at <= statement_timestamp() AND r.run_at >= coalesce($5::timestamptz, '-infinity')
                  AND NOT r.id = ANY (ARRAY(SELECT id FROM due))
                LIMIT 1
            ) AS s) AS ready,
       (SELECT last_value FROM notifyq.task_id_seq) AS inserted,
       EXISTS (SELECT FROM notifyq.slot_released) AS slot_released,
       (SELECT json_object_agg(
                   q.name, json_build_array(q.paused, coalesce(q.limit_running, q.limit_rate) IS NOT NULL))::text
        FROM notifyq.queue q WHERE q.name = ANY ($1)) AS settings,
       statement_timestamp() - interval '50 ms' AS next_cursor,
       CASE WHEN $4::text IS NOT NULL THEN notifyq.notify_unless_full('notifyq', $4)::text END AS echo
