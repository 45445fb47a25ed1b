-- Put the first row of notifyq.slot_released last, after PostgreSQL refused release_waiters.sql because of it
-- (left_out.py), so that the others come before it. Returns the new rows: each names a task that has ended, or keys. No
-- row: another worker has it.
--
-- A row that records both the end of a task and the release of its keys becomes two, since the waiters of the one
-- aren't in the way of the others'. Rows that record only the same keys become one: recheck_waiting adds such rows
-- again and again.
WITH first AS MATERIALIZED (
    SELECT f.* FROM notifyq.slot_released f ORDER BY f.n LIMIT 1 FOR UPDATE SKIP LOCKED
), same AS MATERIALIZED (
    SELECT f.n
    FROM notifyq.slot_released f, first s
    WHERE NOT f.ended AND NOT s.ended AND f.queue = s.queue
      AND f.order_key IS NOT DISTINCT FROM s.order_key AND f.limit_key IS NOT DISTINCT FROM s.limit_key
    FOR UPDATE OF f SKIP LOCKED  -- leave another worker's rows: two workers that wait for each other deadlock
), gone AS (
    DELETE FROM notifyq.slot_released f
    WHERE f.n = ANY (ARRAY(SELECT s.n FROM first s UNION ALL SELECT s.n FROM same s))
)
INSERT INTO notifyq.slot_released (task, ended, queue, order_key, limit_key)
SELECT s.task, true, '', NULL, NULL FROM first s WHERE s.ended
UNION ALL
SELECT s.task, false, s.queue, s.order_key, s.limit_key FROM first s WHERE NOT s.ended OR s.queue <> ''
RETURNING CASE WHEN ended THEN task END AS task, nullif(queue, '') AS queue, order_key, limit_key
