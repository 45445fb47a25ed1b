-- End the backends of worker $1 that serve its connections named $2 ('claims', 'bell'), and wait for each until it has
-- ended, up to $3 ms (0: don't wait; all that were told to end count as ended). Returns how many were ended, and how
-- many remain.
--
-- * After a worker lost its connection for claims, it ends both and waits. Otherwise its next statement couldn't see
--   what the backend is still claiming, and the backend would keep the turn.
-- * A rescuer ends the 'bell' of a worker that is frozen or out of reach. Then the next worker gets the turn.
--
-- A backend is found by its application_name, which any session can set. pg_has_role leaves out the sessions that this
-- one may not end, where trying would be an error.
SELECT count(*) FILTER (WHERE b.ended)::integer AS ended, count(*) FILTER (WHERE NOT b.ended)::integer AS remaining
FROM (
    SELECT pg_terminate_backend(a.pid, $3::bigint) AS ended
    FROM pg_stat_activity a
    WHERE a.datname = current_database()
      AND a.application_name = ANY (ARRAY(
          SELECT 'notifyq ' || c.name || ' ' || $1::integer FROM unnest($2::text[]) AS c (name)))
      AND pg_has_role(a.usesysid, 'USAGE')
) AS b
