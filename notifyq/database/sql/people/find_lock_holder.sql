-- For people: of the transactions that hold any lock on one of notifyq's tables $1, the session with the oldest, in
-- words; NULL if there is none. A prepared transaction has no session, and isn't found. What a role may not see of
-- another's session is left out.
SELECT coalesce(nullif(a.application_name, ''), a.backend_type, 'a session') || ' (process ' || a.pid
       || coalesce(', user ' || a.usename, '')
       || coalesce(', ' || a.state, '')
       || coalesce(', open for ' || round(extract(epoch FROM clock_timestamp() - a.xact_start)::numeric, 1) || ' s', '')
       || ')' AS holder
FROM pg_locks l
JOIN pg_class c ON c.oid = l.relation
JOIN pg_stat_activity a ON a.pid = l.pid
WHERE c.relnamespace = 'notifyq'::regnamespace AND c.relname = ANY ($1::text[])
  AND l.granted AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
ORDER BY a.xact_start
LIMIT 1
