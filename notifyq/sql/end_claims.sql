-- End the backend on which worker $1 claimed until it lost the connection, and wait for that: what it may still be
-- claiming must be seen by the next statement. Returns whether none is left. Of pg_has_role: evict.sql.
SELECT coalesce(bool_and(pg_terminate_backend(a.pid, 2000)), true)
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.application_name = 'notifyq claims ' || $1::integer
  AND pg_has_role(a.usesysid, 'USAGE')
