-- Delete done and cancelled tasks from the history after $1 seconds, dead ones after $2; at most $3 of each. Returns
-- how many.
--
-- Ages count from the server's clock, or from $4 if that is earlier (NULL: the clock alone). So a clock that is
-- stepped into a wrong future deletes nothing too early. Two indexes: dead tasks are kept longer, and a scan for the
-- others would step over them each time.
WITH old AS MATERIALIZED (
    (SELECT id FROM notifyq.finished
     WHERE state <> 'dead'
       AND processed_at < least(statement_timestamp(), $4::timestamptz) - make_interval(secs => $1::float8)
     ORDER BY processed_at LIMIT $3::integer FOR UPDATE SKIP LOCKED)
), dead AS MATERIALIZED (
    (SELECT id FROM notifyq.finished
     WHERE state = 'dead'
       AND processed_at < least(statement_timestamp(), $4::timestamptz) - make_interval(secs => $2::float8)
     ORDER BY processed_at LIMIT $3::integer FOR UPDATE SKIP LOCKED)
), gone AS (
    DELETE FROM notifyq.finished
    WHERE id = ANY (ARRAY(SELECT id FROM old UNION ALL SELECT id FROM dead))
    RETURNING 1
)
SELECT count(*)::integer FROM gone
