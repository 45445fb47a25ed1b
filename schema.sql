-- notifyq: background tasks in PostgreSQL 14 to 18. No extension, no superuser, one fixed schema.
--
-- The story of a task
-- -------------------
-- A task is a row of notifyq.task from its INSERT until its outcome is written; then it is a row of
-- notifyq.finished. While it lives, three columns say where it stands:
--
--     worker set                                         running: that worker holds the lease
--     worker null, run_at <= created_at or promoted      ready: in the index claims read
--     worker null, run_at > created_at, not promoted     scheduled: in the index timers read
--     aside                                              ready, but its claimer did not know its type, or parked says
--                                                        what it waits for: kept out of everybody's way, in indexes
--                                                        of their own
--
-- So a plain INSERT decides by itself whether its row is ready (run_at and created_at have defaults), without
-- a row trigger, and the claim's index never holds a future, a running or a finished task: what a claim costs
-- depends on none of them.
--
--     INSERT ──▶ ready ──claim──▶ running ──settle──▶ finished (done, dead, cancelled)
--       └─▶ scheduled ──promote─▶ ready     └─ retry ──▶ scheduled      └─ hand back, rescue ──▶ ready
--
-- The lease is (worker, attempts): every claim raises attempts, and every later write names both and says
-- whether it applied. A worker that was given up for dead can therefore never settle what runs elsewhere.
--
-- The doorbell
-- ------------
-- A transaction that has called pg_notify serialises its commit with every other one that did. So the insert
-- trigger rings only while some worker sleeps. notifyq.bell is an empty table that nobody writes; its lock
-- modes are the protocol. An enqueuer tries ROW EXCLUSIVE, which many can hold at once. A worker holds SHARE
-- while it sleeps, which many can hold at once too, but never beside an enqueuer:
--
--   * refused: somebody sleeps or is about to. Ring.
--   * granted: nobody sleeps. Say nothing, and keep the lock until commit: a worker that wants to sleep waits
--     for it, and PostgreSQL releases locks after the rows are visible. So its last claim, made once SHARE is
--     granted, sees the row of everybody who said nothing. No wake-up can be lost, however long a transaction
--     stays open and in whatever order they commit.
--
-- notifyq/doorbell.py has the worker's side.
--
-- Tasks that wait
-- ---------------
-- Some tasks must wait for more than a free slot: for others with the same limit_key, order_key or fleet-wide limited
-- queue, or for the ends of the tasks in `after`. They are inserted as ready as any, so an INSERT costs nothing and locks
-- nothing, and claims find them in their order. A worker that has claimed such a row has it judged before it runs:
--
--     claimed ──admit──▶ runs                      the slot is the row itself: a row with a worker counts
--                └─────▶ parked (and aside)        not looked at again until something frees
--     its end, or its worker's loss of it ──▶ a row in notifyq.freed ──free──▶ as many parked as fit are ready again
--
-- Nothing is counted that could be counted wrong: how many run is read from the rows, under a lock that everybody who
-- admits or frees the same key takes (a row of notifyq.gate, by the key's hash) before the snapshot he counts in. What
-- has been claimed and not judged counts too, on the safe side. So limits hold whoever dies when, and nobody holds a slot
-- that a dead process would have to give back. A row in notifyq.freed is written by a trigger, in the transaction that
-- ends the attempt, whoever ends it; who settles, rings or ticks next takes it from there.
--
-- A task that uses none of this has NULL in those columns, is judged by nobody, and touches none of the tables.
--
-- Roles: see the GRANTs at the end.

CREATE SCHEMA notifyq;

CREATE TABLE notifyq.schema_version (
    version      integer     NOT NULL PRIMARY KEY,
    installed_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO notifyq.schema_version (version) VALUES (2);

-- Live tasks. Anything may be inserted: a payload that doesn't fit its type is found when it is decoded, and ends
-- dead with a message, where a constraint could only have refused somebody's whole transaction.
CREATE TABLE notifyq.task (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_at        timestamptz NOT NULL DEFAULT now(),  -- now(), the transaction's start, is never after created_at
    processing_at timestamptz,                         -- when the last attempt was claimed
    processed_at  timestamptz,                         -- when the last attempt ended
    worker        integer,                             -- who holds the lease
    priority      smallint    NOT NULL DEFAULT 0,      -- higher runs first
    attempts      smallint    NOT NULL DEFAULT 0,      -- claims so far; with worker, the fencing token
    max_attempts  smallint    CHECK (max_attempts >= 1),  -- null: what the task's type says, else 10
    promoted      boolean     NOT NULL DEFAULT false,  -- was scheduled, and its time has come
    aside         boolean     NOT NULL DEFAULT false,
    queue         text        NOT NULL DEFAULT 'default' CHECK (length(queue) <= 200),  -- both are index keys,
    type          text        NOT NULL CHECK (length(type) <= 200),                     -- which have a size
    payload       jsonb       NOT NULL DEFAULT '{}',
    errors        jsonb,                               -- one object for each attempt that failed
    unique_key    text        CHECK (length(unique_key) <= 200),  -- see "Unique"
    order_key     text        CHECK (length(order_key) <= 200),   -- one at a time, in the order of ids
    limit_key     text        CHECK (length(limit_key) <= 200),   -- of all with this key
    limit_running integer     CHECK (limit_running >= 1),         --   at most so many run at once
    limit_rate    integer     CHECK (limit_rate >= 1),            --   and at most so many start
    limit_seconds float8      CHECK (limit_seconds > 0),          --   in any so many seconds
    after         bigint[],                            -- the tasks whose ends it waits for
    on_dead       text        CHECK (on_dead IN ('cancel', 'run')),  -- null: cancel it, if one of these isn't done
    parked        text        CHECK (parked IN ('limit', 'rate', 'order', 'after')),  -- with aside: what it waits for
    tracked       boolean     NOT NULL DEFAULT false,  -- others wait for its end: a row of freed tells of it
    awaited       boolean     NOT NULL DEFAULT false,  -- a client waits for its end: a NOTIFY tells of it
    progress      real,
    note          text
) WITH (
    fillfactor = 90,
    -- A queue turns its rows over in seconds: vacuum early, at full speed, indexes included, and never
    -- truncate (that takes an exclusive lock to give back pages the next burst needs).
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.5, autovacuum_analyze_threshold = 10000,
    vacuum_index_cleanup = on, vacuum_truncate = off
);

-- The claim's index: its order is the claim's ORDER BY, its predicate the claim's WHERE, word for word. id + 0, since no
-- planner may take task_pkey for "from this id on, in the order of ids" and read all that isn't ready on the way.
CREATE INDEX task_ready ON notifyq.task (queue, priority DESC, (id + 0))
    WHERE worker IS NULL AND NOT aside AND (run_at <= created_at OR promoted);
CREATE INDEX task_scheduled ON notifyq.task (queue, run_at)
    WHERE worker IS NULL AND run_at > created_at AND NOT promoted;
CREATE INDEX task_running ON notifyq.task (worker) WHERE worker IS NOT NULL;
CREATE INDEX task_set_aside ON notifyq.task (type, queue, priority DESC, id)
    WHERE worker IS NULL AND aside AND parked IS NULL;

-- Outcomes. Appended, read by people, pruned by age; the hot path never looks here.
CREATE TABLE notifyq.finished (
    id            bigint      NOT NULL PRIMARY KEY,
    created_at    timestamptz NOT NULL,
    run_at        timestamptz NOT NULL,
    processing_at timestamptz,
    processed_at  timestamptz NOT NULL,
    priority      smallint    NOT NULL,
    attempts      smallint    NOT NULL,
    max_attempts  smallint,
    state         text        NOT NULL CHECK (state IN ('done', 'dead', 'cancelled')),
    queue         text        NOT NULL,
    type          text        NOT NULL,
    worker        text,
    payload       jsonb       NOT NULL,
    result        jsonb,
    errors        jsonb,
    order_key     text,                                -- these for retry
    limit_key     text,
    limit_running integer,
    limit_rate    integer,
    limit_seconds float8
) WITH (autovacuum_vacuum_insert_scale_factor = 0.5, vacuum_truncate = off);
-- For pruning, each by its own age. Appended at the right edge, so an insert finds its page at once.
CREATE INDEX finished_old ON notifyq.finished (processed_at) WHERE state <> 'dead';
CREATE INDEX finished_dead ON notifyq.finished (processed_at) WHERE state = 'dead';

-- Workers that are, or a moment ago were, alive. One heartbeat a worker, not a task. Beside it each worker holds a
-- session-level advisory lock (1852990827, id), which is gone the moment its backend is.
CREATE TABLE notifyq.worker (
    id            integer     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name          text        NOT NULL,                -- host:pid
    queues        text[]      NOT NULL,
    types         text[]      NOT NULL,
    max_attempts  smallint[]  NOT NULL,                -- beside types: what each allows where the row doesn't say
    concurrency   integer     NOT NULL,
    lease         interval    NOT NULL,                -- without a heartbeat for so long: dead, lock or no lock
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    running       integer     NOT NULL DEFAULT 0,
    status        text        NOT NULL DEFAULT 'ok'    -- or what is degraded, in words
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE TABLE notifyq.bell (nothing boolean CHECK (false)) WITH (autovacuum_enabled = false);

-- The enqueuer's side of the doorbell. Whatever goes wrong here (no privilege on bell, no bell at all) must not abort
-- somebody's INSERT: every error means "ring". Names are qualified, so search_path has no say.
CREATE FUNCTION notifyq.ring() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE NOWAIT;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    -- Any role can fill the notification queue (LISTEN, BEGIN, and wait while it notifies): then the commit of whoever
    -- rings would fail. So nobody rings, and workers find out by their echoes, and poll.
    IF pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.9 THEN
        PERFORM pg_catalog.pg_notify('notifyq', '');
    END IF;
    RETURN NULL;
END $$;

-- Whose end, or return, others wait for: see "Tasks that wait". The rows are those of the attempts that ended and that
-- nobody has looked at yet: mostly none.
CREATE TABLE notifyq.freed (
    n             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task          bigint      NOT NULL,
    ended         boolean     NOT NULL,                -- it is over; else it only gave up its slot
    queue         text        NOT NULL,
    order_key     text,
    limit_key     text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

-- Locks for keys, by hash. Rows and not advisory locks, which any role could take and keep.
CREATE TABLE notifyq.gate (n smallint NOT NULL PRIMARY KEY) WITH (fillfactor = 50);
INSERT INTO notifyq.gate (n) SELECT generate_series(0, 255);

-- Queues that somebody has paused or limited for the whole fleet.
CREATE TABLE notifyq.queue (
    name          text        NOT NULL PRIMARY KEY CHECK (length(name) <= 200),
    paused        boolean     NOT NULL DEFAULT false,
    limit_running integer     CHECK (limit_running >= 1),
    limit_rate    integer     CHECK (limit_rate >= 1),
    limit_seconds float8      CHECK (limit_seconds > 0)
);

CREATE FUNCTION notifyq.ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.tracked OR OLD.limit_key IS NOT NULL OR OLD.order_key IS NOT NULL THEN
        INSERT INTO notifyq.freed (task, ended, queue, order_key, limit_key)
        VALUES (OLD.id, TG_OP OPERATOR(pg_catalog.=) 'DELETE', OLD.queue, OLD.order_key, OLD.limit_key);
    END IF;
    IF OLD.awaited AND TG_OP OPERATOR(pg_catalog.=) 'DELETE'
       AND pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.9 THEN
        PERFORM pg_catalog.pg_notify('notifyq_done', OLD.id::text);
    END IF;
    RETURN NULL;
END $$;

-- 0.14 µs for a row that nobody waits for. Claims name neither column.
CREATE TRIGGER ended AFTER DELETE ON notifyq.task FOR EACH ROW
    WHEN (OLD.tracked OR OLD.awaited OR OLD.limit_key IS NOT NULL OR OLD.order_key IS NOT NULL)
    EXECUTE FUNCTION notifyq.ended();
CREATE TRIGGER given_up AFTER UPDATE OF run_at ON notifyq.task FOR EACH ROW
    WHEN (OLD.worker IS NOT NULL AND NEW.worker IS NULL
          AND (OLD.tracked OR OLD.limit_key IS NOT NULL OR OLD.order_key IS NOT NULL))
    EXECUTE FUNCTION notifyq.ended();

-- Once for a statement, however many rows it has: for COPY and INSERT ... SELECT too. UPDATE OF run_at is how a
-- retry, a hand-back, a rescue, or a person at psql says "look again"; claims and promotions don't name run_at.
CREATE TRIGGER ring AFTER INSERT OR UPDATE OF run_at ON notifyq.task
    FOR EACH STATEMENT EXECUTE FUNCTION notifyq.ring();

-- The worker's side. A blocked SELECT holds a snapshot and with it vacuum, so every wait is bounded and asked for
-- again; and a refusal, or a worker that stops while it waits, is caught here: neither is for the server's log.
CREATE FUNCTION notifyq.take_turn(fleet integer, wait_ms integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('lock_timeout', wait_ms::text, true);
    PERFORM pg_catalog.pg_advisory_lock(1852990836, fleet);
    RETURN true;
EXCEPTION WHEN lock_not_available OR query_canceled THEN
    -- It may have been granted at the very moment at which the wait ended, and a session's lock outlives the error: a
    -- turn that nobody knows of, nor passes on. If it is had, however often, it is given back; a door has no other lock.
    IF pg_catalog.pg_try_advisory_lock(1852990836, fleet) THEN
        PERFORM pg_catalog.pg_advisory_unlock_all();
    END IF;
    RETURN false;
END $$;

CREATE FUNCTION notifyq.fall_asleep(wait_ms integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('lock_timeout', wait_ms::text, true);
    LOCK TABLE notifyq.bell IN SHARE MODE;
    RETURN true;
EXCEPTION WHEN lock_not_available OR query_canceled THEN
    RETURN false;
END $$;

-- For those who prefer a function. The defaults are the table's own. BEGIN ATOMIC, here and below, has the names looked
-- up now, and not by each caller's search_path; unlike SET search_path it costs a call nothing.
CREATE FUNCTION notifyq.enqueue(
    type text, payload jsonb DEFAULT '{}', queue text DEFAULT 'default', run_at timestamptz DEFAULT now(),
    priority integer DEFAULT 0, max_attempts integer DEFAULT NULL, order_key text DEFAULT NULL,
    limit_key text DEFAULT NULL, limit_running integer DEFAULT NULL, limit_rate integer DEFAULT NULL,
    limit_seconds float8 DEFAULT NULL, after bigint[] DEFAULT NULL, on_dead text DEFAULT NULL
) RETURNS bigint LANGUAGE sql BEGIN ATOMIC
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, order_key, limit_key, limit_running,
                              limit_rate, limit_seconds, after, on_dead)
    VALUES ($1, $2, $3, $4, $5::smallint, $6::smallint, $7, $8, $9, $10, $11, $12, $13) RETURNING id;
END;

-- Move a live task to finished; the one place outside a worker's settle that does. Returns whether it was there.
CREATE FUNCTION notifyq.cancel(id bigint) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    -- A running task is taken from its worker: the worker's next heartbeat finds its lease gone and cancels the handler.
    -- While something runs for long there, it listens, and comes to look at once.
    WITH gone AS (
        DELETE FROM notifyq.task t WHERE t.id = $1 RETURNING t.*
    ), kept AS (
        INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts,
                                      max_attempts, state, queue, type, worker, payload, result, errors,
                                      order_key, limit_key, limit_running, limit_rate, limit_seconds)
        SELECT g.id, g.created_at, g.run_at, g.processing_at, clock_timestamp(), g.priority, g.attempts,
               g.max_attempts, 'cancelled', g.queue, g.type, w.name, g.payload, NULL, g.errors,
               g.order_key, g.limit_key, g.limit_running, g.limit_rate, g.limit_seconds
        FROM gone g LEFT JOIN notifyq.worker w ON w.id = g.worker
        RETURNING 1
    ), told AS MATERIALIZED (
        SELECT pg_notify('notifyq_cancel', g.id::text)
        FROM gone g WHERE g.worker IS NOT NULL AND pg_notification_queue_usage() < 0.9
    )
    SELECT EXISTS (SELECT FROM kept) FROM (SELECT count(*) FROM told) AS t;
END;

-- Run it again, now. A dead or cancelled task starts over with all its attempts; a scheduled one is due; a running, ready
-- or done one is left alone.
CREATE FUNCTION notifyq.retry(id bigint) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    WITH again AS (
        DELETE FROM notifyq.finished f WHERE f.id = $1 AND f.state IN ('dead', 'cancelled') RETURNING f.*
    ), back AS (
        INSERT INTO notifyq.task (id, created_at, run_at, priority, max_attempts, promoted, queue, type, payload, errors,
                                  order_key, limit_key, limit_running, limit_rate, limit_seconds)
        OVERRIDING SYSTEM VALUE
        SELECT a.id, a.created_at, now(), a.priority, a.max_attempts, true, a.queue, a.type, a.payload, a.errors,
               a.order_key, a.limit_key, a.limit_running, a.limit_rate, a.limit_seconds
        FROM again a
        RETURNING 1
    ), due AS (
        UPDATE notifyq.task t SET run_at = now(), promoted = true
        -- CASE, so that the planner sees one way, the id. With statistics from when the table was empty, it took
        -- task_scheduled, for which the words would do, and read a million entries.
        WHERE t.id = $1 AND CASE WHEN t.worker IS NULL THEN t.run_at > t.created_at AND NOT t.promoted END
        RETURNING 1
    )
    SELECT EXISTS (SELECT FROM back) OR EXISTS (SELECT FROM due);
END;

-- The stable way to read.
CREATE VIEW notifyq.all_tasks AS
SELECT t.id, t.queue, t.type,
       CASE WHEN t.worker IS NOT NULL THEN 'running'
            WHEN t.parked IS NOT NULL OR t.run_at > t.created_at AND NOT t.promoted THEN 'scheduled'
            ELSE 'ready' END AS state,
       t.priority, t.attempts, t.max_attempts, t.created_at, t.run_at, t.processing_at, t.processed_at, t.payload,
       t.errors -> -1 ->> 'error' AS error, NULL::jsonb AS result,
       (SELECT w.name FROM notifyq.worker w WHERE w.id = t.worker) AS worker, t.errors,
       t.parked AS waits_for, t.progress, t.note, t.unique_key, t.order_key, t.limit_key
FROM notifyq.task t
UNION ALL
SELECT id, queue, type, state, priority, attempts, max_attempts, created_at, run_at, processing_at, processed_at, payload,
       errors -> -1 ->> 'error', result, worker, errors, NULL, NULL, NULL, NULL, order_key, limit_key
FROM notifyq.finished;

-- Roles. Nothing is granted to anybody; give each of your roles what it needs:
--
--   may enqueue   GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT INSERT (type, payload, queue, priority, run_at, max_attempts), SELECT (id) ON notifyq.task TO r;
--                 GRANT INSERT (unique_key, order_key, limit_key, limit_running, limit_rate) ON notifyq.task TO r;
--                 GRANT INSERT (limit_seconds, after, on_dead) ON notifyq.task TO r;
--                 GRANT INSERT ON notifyq.bell TO r;  -- lets it lock, and the table takes no row. Without it: always rings
--   may read      GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT SELECT ON notifyq.all_tasks, notifyq.worker, notifyq.queue, notifyq.schema_version TO r;
--   may await     GRANT USAGE ON SCHEMA notifyq TO r;  -- results and progress
--                 GRANT SELECT ON notifyq.all_tasks TO r;
--                 GRANT SELECT (id, awaited), UPDATE (awaited) ON notifyq.task TO r;
--   worker        GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT ALL ON ALL TABLES IN SCHEMA notifyq TO r; GRANT ALL ON ALL SEQUENCES IN SCHEMA notifyq TO r;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA notifyq FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA notifyq TO PUBLIC;  -- each runs with its caller's rights, and no more
