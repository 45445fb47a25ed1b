-- Of the tasks of types $2 that wait to run isolated at the keys $1 ('crashed:' and a queue): how often the first to
-- run has crashed, or NULL if there is none. See "Tasks whose worker vanished" in schema.sql.
SELECT min(coalesce(s.crashes, 0) + coalesce(s.crashes_alone, 0)) AS crashes
FROM unnest($1::text[]) AS q (key)
CROSS JOIN LATERAL (
    SELECT r.crashes, r.crashes_alone
    FROM notifyq.task r
    WHERE r.waiting_on = q.key AND r.withheld AND r.worker IS NULL AND r.type = ANY ($2::text[])
      AND r.id <> ALL ($3::bigint[])
) AS s
