-- What doubtful.sql has found: the failed $1 are tried again as long from now as it was to be then; the granted $2 wait again,
-- and are granted anew. Returns how many of these were still there, and locked by nobody.
WITH failed AS (
    UPDATE notifyq.task t
    SET run_at = t.run_at - (t.processed_at - statement_timestamp()), processed_at = statement_timestamp()
    WHERE t.id = ANY (ARRAY(
        SELECT r.id FROM notifyq.task r
        WHERE r.id = ANY ($1::bigint[]) AND r.worker IS NULL AND r.processed_at > statement_timestamp()
        FOR NO KEY UPDATE SKIP LOCKED))
    RETURNING 1
), granted AS (
    UPDATE notifyq.task t SET aside = true
    WHERE t.id = ANY (ARRAY(
        SELECT r.id FROM notifyq.task r
        WHERE r.id = ANY ($2::bigint[]) AND r.worker IS NULL AND NOT r.aside AND r.parked IS NOT NULL
        FOR NO KEY UPDATE SKIP LOCKED))
    RETURNING notifyq.gave_up(t)
)
SELECT ((SELECT count(*) FROM failed) + (SELECT count(*) FROM granted))::integer AS changed
