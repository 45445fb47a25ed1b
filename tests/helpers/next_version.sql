-- To a made-up version, whose tasks have labels: see next_version.py. It has each kind of step that upgrade.py knows.

-- step: locks task
ALTER TABLE notifyq.task ADD COLUMN IF NOT EXISTS label text;

-- step: locks finished
ALTER TABLE notifyq.finished ADD COLUMN IF NOT EXISTS label text;

-- step
CREATE TABLE IF NOT EXISTS notifyq.label (name text NOT NULL PRIMARY KEY, uses bigint NOT NULL DEFAULT 0);

-- step: concurrently
-- What an interrupted upgrade has left of an index may be invalid, so it goes first.
DROP INDEX CONCURRENTLY IF EXISTS notifyq.task_label;

-- step: concurrently
CREATE INDEX CONCURRENTLY task_label ON notifyq.task (label) WHERE label IS NOT NULL;

-- step: concurrently
DROP INDEX CONCURRENTLY IF EXISTS notifyq.finished_label;

-- step: concurrently
CREATE INDEX CONCURRENTLY finished_label ON notifyq.finished (label) WHERE label IS NOT NULL;

-- step: concurrently
DROP INDEX CONCURRENTLY IF EXISTS notifyq.finished_kept;

-- step: concurrently
-- It takes the place of finished_old, which stays for the workers of the version before.
CREATE INDEX CONCURRENTLY finished_kept ON notifyq.finished (state, processed_at) WHERE state <> 'dead';

-- step: locks worker
ALTER TABLE notifyq.worker ALTER COLUMN concurrency SET DEFAULT 1;

-- step: concurrently
-- It waits until each sleeping worker has let go of the bell once; no other session waits behind it for long.
COMMENT ON COLUMN notifyq.bell.nothing IS 'Nothing is ever stored.';

-- step: with the functions
-- Roles that could do something with all tasks, or enqueue, or read, can do the same with what is new.
DO $$
DECLARE
    may text;
BEGIN
    FOR may IN
        SELECT DISTINCT a.may || CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM (SELECT a.grantee, 'ALL ON notifyq.label TO ' AS may
              FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
              WHERE c.oid = 'notifyq.task'::regclass AND a.privilege_type = 'DELETE' AND a.grantee <> c.relowner
              UNION ALL
              SELECT a.grantee, 'INSERT (label) ON notifyq.task TO '
              FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) AS a
              WHERE t.attrelid = 'notifyq.task'::regclass AND t.attname = 'payload' AND a.privilege_type = 'INSERT'
              UNION ALL
              SELECT a.grantee, 'SELECT ON notifyq.label TO '
              FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
              WHERE c.oid = 'notifyq.all_tasks'::regclass AND a.privilege_type = 'SELECT'
                    AND a.grantee <> c.relowner) AS a
    LOOP
        EXECUTE 'GRANT ' || may;
    END LOOP;
END $$;

-- step: with the functions
-- It has a new parameter. A user's function or view that was made of the old one keeps that.
DO $$
BEGIN
    DROP FUNCTION IF EXISTS notifyq.enqueue(text, jsonb, text, timestamptz, integer, integer, jsonb);
EXCEPTION WHEN dependent_objects_still_exist THEN
    ALTER FUNCTION notifyq.enqueue(text, jsonb, text, timestamptz, integer, integer, jsonb) RENAME TO enqueue_before;
END $$;

INSERT INTO notifyq.schema_version (version, serves) SELECT max(version) + 1, max(version) FROM notifyq.schema_version;
