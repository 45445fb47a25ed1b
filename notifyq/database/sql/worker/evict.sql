-- End the backends by which worker $1, whose process is frozen or out of reach, keeps the turn at the bell: then the
-- next in the queue has it. They carry its id in their names, as any stranger's session can: pg_has_role leaves
-- out those that this one may not end, where trying would be an error. Returns how many.
SELECT count(*) FILTER (WHERE pg_terminate_backend(a.pid, 0::bigint))::integer
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.application_name = 'notifyq door ' || $1::integer
  AND pg_has_role(a.usesysid, 'USAGE')
