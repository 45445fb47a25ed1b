-- List up to $4 tasks of types $2 that wait to run isolated at the keys $1 ('crashed:' and a queue), without the tasks
-- $3. Returns their ids and how often each has crashed; those that have crashed least come first. It locks nothing. See
-- "Tasks whose worker vanished" in schema.sql.
SELECT r.id, coalesce(r.crashes, 0) + coalesce(r.crashes_alone, 0) AS crashes
FROM unnest($1::text[]) AS q (key)
JOIN notifyq.task r ON r.waiting_on = q.key AND r.withheld
WHERE r.worker IS NULL AND r.type = ANY ($2::text[]) AND r.id <> ALL ($3::bigint[])
ORDER BY crashes, r.priority DESC, r.id
LIMIT $4::integer
