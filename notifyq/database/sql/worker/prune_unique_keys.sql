-- Delete up to $1 keys whose task has ended and whose unique_for has passed. A key whose task still lives is looked at
-- again in an hour. Returns how many keys it looked at. Of the 1000 keys that would be kept longest, those with an
-- enqueued_at in the future count as enqueued now: the clock was set back since.
--
-- It waits for no enqueuer (SKIP LOCKED). A key that an enqueuer locked in between may name another task by now; then
-- "k.task = o.task" leaves it alone.
WITH old AS MATERIALIZED (
    SELECT k.key, k.task, EXISTS (SELECT FROM notifyq.task t WHERE t.id = ANY (ARRAY[k.task])) AS lives
    FROM notifyq.unique_key k
    WHERE k.until < statement_timestamp()
    ORDER BY k.until
    LIMIT $1::integer
), mine AS MATERIALIZED (
    SELECT k.key, o.lives
    FROM old o JOIN notifyq.unique_key k ON k.key = o.key AND k.task = o.task
    WHERE k.until < statement_timestamp()
    FOR UPDATE OF k SKIP LOCKED
), gone AS (
    DELETE FROM notifyq.unique_key WHERE key = ANY (ARRAY(SELECT key FROM mine WHERE NOT lives))
), later AS (
    UPDATE notifyq.unique_key SET until = statement_timestamp() + interval '1 hour'
    WHERE key = ANY (ARRAY(SELECT key FROM mine WHERE lives))
), ahead AS (
    UPDATE notifyq.unique_key
    SET enqueued_at = statement_timestamp(), until = statement_timestamp() + (until - enqueued_at)
    WHERE key = ANY (ARRAY(
        SELECT k.key FROM notifyq.unique_key k
        WHERE k.key = ANY (ARRAY(SELECT l.key FROM notifyq.unique_key l ORDER BY l.until DESC LIMIT 1000))
          AND k.enqueued_at > statement_timestamp() + interval '1 minute' AND k.until >= k.enqueued_at
          AND isfinite(k.enqueued_at) AND isfinite(k.until)
        FOR UPDATE SKIP LOCKED))
)
SELECT count(*)::integer FROM mine
