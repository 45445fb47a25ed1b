-- Whether the turn of fleet $1 is held by a session that can't be a worker's, as its role may not register one. Any
-- role can take any advisory lock.
SELECT EXISTS (
    SELECT
    FROM pg_locks l
    JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND l.classid = 1852990836::oid AND l.objid = ($1::integer::bigint & 4294967295)::oid
      AND NOT has_table_privilege(a.usesysid, 'notifyq.worker', 'INSERT')
)
