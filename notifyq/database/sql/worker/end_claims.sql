-- After worker $1 lost a connection on which it claimed and held the turn: end the backend of that connection, and wait
-- until it has ended. Otherwise the next statement couldn't see what the backend is still claiming, and the backend
-- would keep the turn. Returns whether none is left. evict.sql explains pg_has_role.
SELECT coalesce(bool_and(pg_terminate_backend(a.pid, 2000::bigint)), true)
FROM pg_stat_activity a
WHERE a.datname = current_database()
  AND a.application_name IN ('notifyq claims ' || $1::integer, 'notifyq door ' || $1::integer)
  AND pg_has_role(a.usesysid, 'USAGE')
