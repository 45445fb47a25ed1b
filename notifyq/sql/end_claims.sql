-- End the backends on which worker $1 claimed, and kept the turn, until it lost a connection, and wait for that: what one
-- may still be claiming must be seen by the next statement, and one whose end the server hasn't noticed would keep the
-- turn. Returns whether none is left. Of pg_has_role: evict.sql.
SELECT coalesce(bool_and(pg_terminate_backend(a.pid, 2000::bigint)), true)
FROM pg_stat_activity a
WHERE a.datname = current_database()
  AND a.application_name IN ('notifyq claims ' || $1::integer, 'notifyq door ' || $1::integer)
  AND pg_has_role(a.usesysid, 'USAGE')
