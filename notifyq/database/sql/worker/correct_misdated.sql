-- Correct the tasks that list_misdated.sql found: the failed ones $1 are tried again as long from now as was planned;
-- the granted ones $2 wait again, for another grant. Returns how many of them still existed and weren't locked.
WITH failed AS (
    UPDATE notifyq.task t
    SET run_at = t.run_at - (t.processed_at - statement_timestamp()), processed_at = statement_timestamp()
    WHERE t.id = ANY (ARRAY(
        SELECT r.id FROM notifyq.task r
        WHERE r.id = ANY ($1::bigint[]) AND r.worker IS NULL AND r.processed_at > statement_timestamp()
        FOR NO KEY UPDATE SKIP LOCKED))
    RETURNING 1
), granted AS (
    UPDATE notifyq.task t SET withheld = true
    WHERE t.id = ANY (ARRAY(
        SELECT r.id FROM notifyq.task r
        WHERE r.id = ANY ($2::bigint[]) AND r.worker IS NULL AND NOT r.withheld AND r.parked IS NOT NULL
        FOR NO KEY UPDATE SKIP LOCKED))
    RETURNING notifyq.note_lease_given_up(t)
)
SELECT ((SELECT count(*) FROM failed) + (SELECT count(*) FROM granted))::integer AS changed
