-- From version 1 to 2: unique tasks, limits, order, dependencies, results, progress, cron. notifyq/database/upgrade.py says what may
-- stand here, and how it is run. Functions, triggers and views don't: they are taken from schema.sql.

-- step: locks schema_version
ALTER TABLE notifyq.schema_version ADD COLUMN IF NOT EXISTS serves integer;
UPDATE notifyq.schema_version SET serves = version WHERE serves IS NULL;
ALTER TABLE notifyq.schema_version ALTER COLUMN serves SET NOT NULL;

-- step: locks task
ALTER TABLE notifyq.task
    ADD COLUMN IF NOT EXISTS options jsonb,
    ADD COLUMN IF NOT EXISTS order_key text,
    ADD COLUMN IF NOT EXISTS limit_key text,
    ADD COLUMN IF NOT EXISTS after bigint[],
    ADD COLUMN IF NOT EXISTS parked text,
    ADD COLUMN IF NOT EXISTS waits_at text,
    ADD COLUMN IF NOT EXISTS admitted timestamptz,
    ADD COLUMN IF NOT EXISTS tracked boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS awaited boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS progress real,
    ADD COLUMN IF NOT EXISTS note text,
    ADD COLUMN IF NOT EXISTS crashes smallint,
    ADD COLUMN IF NOT EXISTS crashes_alone smallint,
    DROP CONSTRAINT IF EXISTS task_max_attempts_check,
    DROP CONSTRAINT IF EXISTS task_queue_check,
    DROP CONSTRAINT IF EXISTS task_type_check;

-- step: locks finished
ALTER TABLE notifyq.finished ADD COLUMN IF NOT EXISTS options jsonb;

-- step: concurrently
-- Of an index, what an upgrade that was interrupted has left may be invalid, so it goes first.
DROP INDEX CONCURRENTLY IF EXISTS notifyq.task_set_aside;

-- step: concurrently
-- task_aside, which it takes the place of, stays until version 3: workers of version 1 would have to read the whole table.
CREATE INDEX CONCURRENTLY task_set_aside ON notifyq.task (type, queue, priority DESC, id)
    WHERE worker IS NULL AND aside AND parked IS NULL;

-- step
CREATE TABLE IF NOT EXISTS notifyq.freed (
    n             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task          bigint      NOT NULL,
    ended         boolean     NOT NULL,
    queue         text        NOT NULL,
    order_key     text,
    limit_key     text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

-- step
CREATE TABLE IF NOT EXISTS notifyq.gate (n smallint NOT NULL PRIMARY KEY) WITH (fillfactor = 50);
INSERT INTO notifyq.gate (n) SELECT generate_series(-1, 255) ON CONFLICT DO NOTHING;

-- step
CREATE TABLE IF NOT EXISTS notifyq.dependency (
    needs         bigint      NOT NULL,
    task          bigint      NOT NULL,
    sure          boolean     NOT NULL,
    PRIMARY KEY (needs, task)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);
CREATE INDEX IF NOT EXISTS dependency_task ON notifyq.dependency (task);
CREATE INDEX IF NOT EXISTS dependency_unsure ON notifyq.dependency (needs) WHERE NOT sure;

-- step
CREATE TABLE IF NOT EXISTS notifyq.unique_key (
    key           text        NOT NULL PRIMARY KEY,
    task          bigint      NOT NULL,
    enqueued_at   timestamptz NOT NULL,
    until         timestamptz NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, vacuum_truncate = off);
CREATE INDEX IF NOT EXISTS unique_key_until ON notifyq.unique_key (until);

-- step
CREATE TABLE IF NOT EXISTS notifyq.queue (
    name          text        NOT NULL PRIMARY KEY CHECK (length(name) <= 200),
    paused        boolean     NOT NULL DEFAULT false,
    limit_running integer     CHECK (limit_running >= 1),
    limit_rate    integer     CHECK (limit_rate >= 1),
    limit_seconds float8      CHECK (limit_seconds > 0 AND limit_seconds <= 1e9)
);

-- step
CREATE TABLE IF NOT EXISTS notifyq.started (
    key           text        NOT NULL,
    at            timestamptz NOT NULL,
    n             integer     NOT NULL,
    seconds       float8      NOT NULL,
    PRIMARY KEY (key, at)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

-- step: concurrently
DROP INDEX CONCURRENTLY IF EXISTS notifyq.task_admitted;

-- step: concurrently
CREATE INDEX CONCURRENTLY task_admitted ON notifyq.task (limit_key, queue)
    WHERE admitted IS NOT NULL AND worker IS NOT NULL;

-- step: concurrently
DROP INDEX CONCURRENTLY IF EXISTS notifyq.task_parked;

-- step: concurrently
CREATE INDEX CONCURRENTLY task_parked ON notifyq.task (waits_at, aside, priority DESC, id) WHERE waits_at IS NOT NULL;

-- step: concurrently
DROP INDEX CONCURRENTLY IF EXISTS notifyq.task_order;

-- step: concurrently
CREATE INDEX CONCURRENTLY task_order ON notifyq.task (
    order_key, (CASE WHEN attempts > 0 OR parked <> 'after' OR parked IS NULL AND (promoted OR run_at <= created_at)
                THEN coalesce(worker, 0) END), (id + 0))
    WHERE order_key IS NOT NULL;

-- step: locks worker
ALTER TABLE notifyq.worker
    ADD COLUMN IF NOT EXISTS crons text[] NOT NULL DEFAULT '{}',
    ALTER COLUMN id DROP IDENTITY IF EXISTS,
    ALTER COLUMN id SET DEFAULT 1 + floor(random() * 2147483647);

-- step
CREATE TABLE IF NOT EXISTS notifyq.cron (
    name          text        NOT NULL PRIMARY KEY CHECK (length(name) <= 200),
    expression    text        NOT NULL,
    tz            text        NOT NULL DEFAULT 'UTC',
    type          text        NOT NULL CHECK (length(type) <= 200),
    payload       jsonb       NOT NULL DEFAULT '{}',
    queue         text        NOT NULL DEFAULT 'default' CHECK (length(queue) <= 200),
    priority      smallint    NOT NULL DEFAULT 0,
    missed        text        NOT NULL DEFAULT 'once' CHECK (missed IN ('once', 'skip')),
    options       jsonb,
    paused        boolean     NOT NULL DEFAULT false,
    next_at       timestamptz CHECK (next_at BETWEEN '0001-01-03Z' AND '9999-12-30Z'),
    last_at       timestamptz,
    recent        bigint[]    NOT NULL DEFAULT '{}'
);

-- step: concurrently
-- The bell's comments wait until each sleeping worker of version 1 has let go once, up to two minutes; nobody waits for them.
COMMENT ON TABLE notifyq.bell IS
    'Always empty. A worker holds SHARE on it while it sleeps, and lets go when another statement waits. An '
    'enqueuer that cannot get ROW EXCLUSIVE at once sends a NOTIFY.';

-- step: concurrently
COMMENT ON COLUMN notifyq.bell.nothing IS 'No row is ever stored.';

-- step: with the functions
-- schema.sql's takes its place, and keeps the rights.
CREATE OR REPLACE VIEW notifyq.all_queues AS
SELECT name, paused, limit_running, limit_rate, limit_seconds, 0::bigint AS running, 0::bigint AS waiting, 0::bigint AS workers
FROM notifyq.queue;
-- Whoever works here may do everything with what is new too; who enqueues, give options and see when; who reads, read it.
DO $$
DECLARE
    may text;
BEGIN
    FOR may IN
        SELECT DISTINCT a.may || CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM (SELECT a.grantee, 'ALL ON notifyq.freed, notifyq.gate, notifyq.dependency, notifyq.queue, notifyq.started,'
                     ' notifyq.unique_key, notifyq.cron, notifyq.freed_n_seq, notifyq.all_queues TO ' AS may
              FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
              WHERE c.oid = 'notifyq.task'::regclass AND a.privilege_type = 'DELETE' AND a.grantee <> c.relowner
              UNION ALL
              SELECT a.grantee, 'INSERT (options) ON notifyq.task TO '
              FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) AS a
              WHERE t.attrelid = 'notifyq.task'::regclass AND t.attname = 'payload' AND a.privilege_type = 'INSERT'
              UNION ALL
              SELECT a.grantee, 'SELECT (created_at) ON notifyq.task TO '
              FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) AS a
              WHERE t.attrelid = 'notifyq.task'::regclass AND t.attname = 'id' AND a.privilege_type = 'SELECT'
              UNION ALL
              SELECT a.grantee, 'SELECT ON notifyq.queue, notifyq.cron, notifyq.all_queues TO '
              FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
              WHERE c.oid = 'notifyq.all_tasks'::regclass AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner) AS a
    LOOP
        EXECUTE 'GRANT ' || may;
    END LOOP;
END $$;

-- step: with the functions
-- It has new parameters. Where a function or a view of theirs was made of it, that one keeps the old.
DO $$
BEGIN
    DROP FUNCTION IF EXISTS notifyq.enqueue(text, jsonb, text, timestamptz, integer, integer);
EXCEPTION WHEN dependent_objects_still_exist THEN
    ALTER FUNCTION notifyq.enqueue(text, jsonb, text, timestamptz, integer, integer) RENAME TO enqueue_1;
END $$;

INSERT INTO notifyq.schema_version (version, serves) VALUES (2, 1);
