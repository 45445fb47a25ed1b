-- For tests: move all that isn't running $1 seconds into the past. Each time of a row moves by the same, so a
-- scheduled task is still scheduled, and merely due. It sets run_at, so the bell rings, and a worker that sleeps
-- wakes. A table that keeps times of its own belongs here too. Returns how many tasks became due.
WITH live AS (
    UPDATE notifyq.task t
    SET created_at = t.created_at - p.past, run_at = t.run_at - p.past,
        processing_at = t.processing_at - p.past, processed_at = t.processed_at - p.past,
        expires_at = t.expires_at - p.past
    FROM (SELECT make_interval(secs => $1::float8) AS past) AS p
    WHERE t.worker IS NULL
    RETURNING t.run_at > t.created_at AND NOT t.promoted AND t.run_at <= statement_timestamp()
              AND t.run_at + p.past > statement_timestamp() AS due
), ended AS (
    UPDATE notifyq.finished f
    SET created_at = f.created_at - p.past, run_at = f.run_at - p.past,
        processing_at = f.processing_at - p.past, processed_at = f.processed_at - p.past
    FROM (SELECT make_interval(secs => $1::float8) AS past) AS p
), begun AS (
    UPDATE notifyq.rate_log SET at = at - make_interval(secs => $1::float8)
), crons AS (
    UPDATE notifyq.cron
    SET next_at = next_at - make_interval(secs => $1::float8), last_at = last_at - make_interval(secs => $1::float8)
), keys AS (
    UPDATE notifyq.unique_key k SET enqueued_at = k.enqueued_at - p.past, until = k.until - p.past
    FROM (SELECT make_interval(secs => $1::float8) AS past) AS p
)
SELECT count(*) FROM live WHERE due
