-- What is wrong with the database, or hidden from this session: a row for each problem, with the object, the problem in
-- words, and its cure. With $1, also problems that concern only other sessions. It reads nothing but catalogs, so every
-- role may run it.
WITH secured AS MATERIALIZED (
    SELECT c.oid, format('notifyq.%I', c.relname) AS name, row_security_active(c.oid) AS active,
           -- A policy that shows everything, to this user or to all others.
           ARRAY(SELECT r.role FROM pg_policy p CROSS JOIN LATERAL unnest(p.polroles) AS r (role)
                 WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd = '*'
                   AND pg_get_expr(p.polqual, p.polrelid) = 'true'
                   AND coalesce(pg_get_expr(p.polwithcheck, p.polrelid), 'true') = 'true'
                   AND NOT EXISTS (SELECT FROM pg_policy o WHERE o.polrelid = c.oid AND NOT o.polpermissive)
           ) AS shown_to
    FROM pg_class c
    WHERE c.relnamespace = 'notifyq'::regnamespace AND c.relkind IN ('r', 'p') AND c.relrowsecurity
), wanted (name, effect) AS (
    VALUES ('apply_options', 'limits, order, unique keys and dependencies of new tasks are ignored'),
           ('on_task_deleted', 'tasks that wait for the end of another are told late, or never'),
           ('ring', 'no worker is woken by a new task, which starts at the next poll')
), quiet AS (
    SELECT s.setrole, s.setdatabase, d.datname, r.rolname
    FROM pg_db_role_setting s
    LEFT JOIN pg_database d ON d.oid = s.setdatabase
    LEFT JOIN pg_roles r ON r.oid = s.setrole
    WHERE (s.setdatabase = 0 OR d.datname = current_database())
      AND 'session_replication_role=replica' = ANY (s.setconfig)
      AND CASE s.setrole WHEN 0 THEN true ELSE has_any_column_privilege(s.setrole, 'notifyq.task', 'INSERT') END
), locks AS MATERIALIZED (
    SELECT l.database, l.relation, l.transactionid, l.virtualtransaction, l.pid, l.mode, l.granted FROM pg_locks l
), awake AS MATERIALIZED (
    SELECT l.pid, l.virtualtransaction
    FROM locks l
    WHERE l.relation = to_regclass('notifyq.bell') AND l.mode = 'RowExclusiveLock' AND l.granted
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
)
SELECT 'row level security' AS about,
       format('row level security hides rows of %s from user %s, who neither runs nor settles what it does not see',
              string_agg(s.name, ', ' ORDER BY s.name), current_user) AS problem,
       format('ALTER TABLE ... DISABLE ROW LEVEL SECURITY, or for each table '
              'CREATE POLICY all_rows ON %s TO %I USING (true)', min(s.name), current_user) AS cure
FROM secured s
WHERE s.active AND NOT EXISTS (SELECT FROM unnest(s.shown_to) AS t (role)
                               WHERE CASE t.role WHEN 0 THEN true ELSE pg_has_role(t.role, 'USAGE') END)
HAVING count(*) > 0
UNION ALL
SELECT 'row level security of others',
       format('row level security is on for %s: users other than the owner see only rows that a policy shows them',
              string_agg(s.name, ', ' ORDER BY s.name)),
       'ALTER TABLE ... DISABLE ROW LEVEL SECURITY, or policies for the users of workers: they warn of what they need'
FROM secured s
WHERE $1::boolean AND NOT s.active AND s.shown_to = '{}'
HAVING count(*) > 0
UNION ALL
SELECT 'trigger ' || w.name,
       format('trigger %s of notifyq.task is %s: %s', w.name,
              CASE WHEN t.tgenabled IS NULL THEN 'missing' ELSE 'disabled' END, w.effect),
       CASE WHEN t.tgenabled IS NULL THEN 'create it again; its CREATE TRIGGER is in schema.sql (notifyq migrate --sql)'
            ELSE format('ALTER TABLE notifyq.task ENABLE TRIGGER %s', w.name) END
FROM wanted w
LEFT JOIN pg_trigger t ON t.tgrelid = to_regclass('notifyq.task') AND t.tgname = w.name
WHERE t.tgenabled IS NULL OR t.tgenabled NOT IN ('O', 'A')
UNION ALL
-- Somebody's BEFORE trigger that may keep a row from being written. Only the source of the function tells, and only in
-- PL/pgSQL can it be read here: what a RETURN says, without the comments.
SELECT format('trigger %I on notifyq.%I', t.tgname, c.relname),
       format('trigger %I on notifyq.%I runs before each row is written, and %s: where it does, notifyq''s write '
              'doesn''t happen, and nothing says so', t.tgname, c.relname, k.fault),
       format('let %s.%I() return NEW, or OLD on DELETE; or make it an AFTER trigger',
              p.pronamespace::regnamespace, p.proname)
FROM pg_trigger t
JOIN pg_class c ON c.oid = t.tgrelid
JOIN pg_proc p ON p.oid = t.tgfoid
CROSS JOIN LATERAL (
    SELECT regexp_replace(regexp_replace(p.prosrc, '/\*.*?\*/', ' ', 'g'), '--[^\n]*', ' ', 'g') AS text OFFSET 0
) AS source
CROSS JOIN LATERAL (
    -- The bits of tgtype: 4 INSERT, 8 DELETE, 16 UPDATE. OLD is NULL on INSERT, NEW on DELETE.
    SELECT CASE WHEN source.text ~* '\mreturn\s+null\s*;' THEN 'may return NULL'
                WHEN t.tgtype & 8 <> 0 AND source.text ~* '\mreturn\s+new\s*;'
                     AND source.text !~* '\mreturn\M[^;]*\mold\M' THEN 'returns NEW, which is NULL, on DELETE'
                WHEN t.tgtype & (4 | 16) <> 0 AND source.text ~* '\mreturn\s+old\s*;'
                     AND (t.tgtype & 8 = 0 OR source.text !~* '\mreturn\M[^;]*\mnew\M')
                THEN 'returns OLD on INSERT or UPDATE' END AS fault
) AS k
WHERE c.relnamespace = 'notifyq'::regnamespace AND c.relname IN ('task', 'finished', 'worker')
  AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgtype & 3 = 3  -- BEFORE, and FOR EACH ROW
  AND p.pronamespace <> c.relnamespace AND p.prolang = (SELECT l.oid FROM pg_language l WHERE l.lanname = 'plpgsql')
  AND k.fault IS NOT NULL
UNION ALL
SELECT 'session_replication_role of this session',
       format('session_replication_role is replica in this session of user %s: no trigger fires, so tasks that wait '
              'for others are told late, or never', current_user),
       'reset it for this user, the database or the server; these set it: '
       || coalesce((SELECT string_agg(concat_ws(' in ', 'role ' || q.rolname, 'database ' || q.datname), ', ')
                    FROM quiet q),
                   'the server''s or this session''s own settings')
WHERE current_setting('session_replication_role') = 'replica'
UNION ALL
SELECT format('session_replication_role of %s in %s', coalesce(q.rolname, 'all'), coalesce(q.datname, 'all')),
       format('session_replication_role is replica for %s: no trigger fires there, so limits, order, unique keys and '
              'dependencies of tasks that are enqueued there are ignored, and no worker is woken',
              concat_ws(' in ', 'role ' || q.rolname, 'database ' || q.datname)),
       CASE WHEN q.rolname IS NULL THEN format('ALTER DATABASE %I RESET session_replication_role', q.datname)
            ELSE format('ALTER ROLE %I%s RESET session_replication_role', q.rolname,
                        ' IN DATABASE ' || quote_ident(q.datname)) END
FROM quiet q
UNION ALL
SELECT 'transaction ' || x.what,
       format('%s has been open for %s s and has enqueued: until it ends no worker can sleep, so all poll',
              x.what, x.seconds),
       x.cure
FROM (
    SELECT format('prepared transaction %L of user %s', p.gid, p.owner) AS what,
           extract(epoch FROM clock_timestamp() - p.prepared)::bigint AS seconds,
           format('COMMIT PREPARED %L, or ROLLBACK PREPARED %L', p.gid, p.gid) AS cure
    FROM pg_prepared_xacts p
    WHERE p.database = current_database()
      -- A prepared transaction has no process. What its virtual transaction is depends on PostgreSQL's version.
      AND EXISTS (SELECT FROM awake a JOIN locks l ON l.virtualtransaction = a.virtualtransaction
                  WHERE a.pid IS NULL AND l.pid IS NULL AND l.transactionid = p.transaction)
    UNION ALL
    SELECT format('the transaction of process %s (user %s, %s)', a.pid, a.usename,
                  coalesce(nullif(a.application_name, ''), '?')),
           extract(epoch FROM clock_timestamp() - a.xact_start)::bigint,
           format('commit it, or SELECT pg_terminate_backend(%s)', a.pid)
    FROM pg_stat_activity a
    WHERE a.pid IN (SELECT l.pid FROM awake l)
) AS x
WHERE x.seconds >= 60
ORDER BY about
