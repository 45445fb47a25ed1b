-- Delete cron $1, unless a live worker serves it. Returns one row with that worker's name, or with NULL if the cron was
-- deleted; no row if there is no such cron.
WITH found AS (
    SELECT c.name, (SELECT w.name FROM notifyq.worker w
                    WHERE c.name = ANY (w.crons) AND notifyq.is_alive(w.seen_at, w.lease) LIMIT 1) AS worker
    FROM notifyq.cron c
    WHERE c.name = $1
), gone AS (
    DELETE FROM notifyq.cron c USING found f WHERE c.name = f.name AND f.worker IS NULL
)
SELECT worker FROM found
