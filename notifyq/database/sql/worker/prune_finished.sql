-- Forget what ended long ago: done and cancelled tasks after $1 seconds, dead ones after $2; at most $3 of each.
-- Returns how many. What time it is, the server's clock says, but not more than $4 (NULL: that alone): a step of that
-- clock into a wrong future must not forget what is young. Two indexes, so that the dead, kept longer, are not stepped
-- over each time.
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
