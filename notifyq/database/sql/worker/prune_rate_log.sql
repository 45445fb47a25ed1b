-- Delete up to $1 starts that no rate counts any more. Returns how many. It is a statement of its own, so that an error
-- in one table doesn't keep the others from being pruned.
WITH old AS MATERIALIZED (
    SELECT s.key, s.at
    FROM notifyq.rate_log s
    WHERE s.at < statement_timestamp() - make_interval(secs => s.seconds)
    LIMIT $1::integer
    FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM notifyq.rate_log s USING old o WHERE s.key = o.key AND s.at = o.at RETURNING 1
)
SELECT count(*)::integer FROM gone
