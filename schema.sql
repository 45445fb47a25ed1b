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
--     withheld, parked null                              ready, but the worker that claimed it has no handler for its
--                                                        type: left to a worker that has one
--     withheld, parked set                               waits: parked says for what. Both kinds have indexes of
--                                                        their own, so that claims needn't step over them
--
-- So a plain INSERT decides by itself whether its row is ready (run_at and created_at have defaults), without
-- a row trigger, and the claim's index never holds a future, a running or a finished task: what a claim costs
-- depends on none of them.
--
--     INSERT --> ready --claim--> running --settle--> finished (done, dead, cancelled)
--       `-> scheduled --promote-> ready     `- retry --> scheduled      `- hand back, rescue --> ready
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
--   * refused: a worker sleeps or is about to. Ring.
--   * granted: no worker sleeps. Don't ring, and keep the lock until commit: a worker that wants to sleep waits
--     for it, and PostgreSQL releases locks after the rows are visible. So the worker's last claim, made once SHARE
--     is granted, sees the rows of all transactions that didn't ring. No wake-up can be lost, however long a
--     transaction stays open and in whatever order they commit.
--
-- notifyq/worker/doorbell.py has the worker's side.
--
-- Tasks that wait
-- ---------------
-- Some tasks must wait for more than a free slot: for others with the same limit_key, order_key or fleet-wide limited
-- queue, or for the ends of the tasks in `after`. They are inserted as ready, like any task, so their INSERT costs
-- nothing more and locks nothing, and claims find them in their order. After the claim, notifyq.admit decides whether
-- they run:
--
--     claimed --admit--> runs                      the slot is the row itself: a row with a worker counts
--                `-----> parked (and withheld)     not looked at again until something frees
--     its end, or its worker's loss of it --> a row in notifyq.slot_released --free--> as many parked as fit are ready again
--
-- There are no counters, which could become wrong: the number of running tasks is counted from the rows. A session that
-- admits or frees tasks of a key first locks a row of notifyq.key_lock, by the key's hash, then takes a fresh snapshot, and
-- counts in that. Rows that are claimed and not yet admitted count too, on the safe side. So limits hold whatever
-- process dies, and a dead process holds no slot that it would have to give back.
--
-- The transaction that ends an attempt writes the row in notifyq.slot_released: by a trigger if the task has ended, otherwise
-- in the statement that gives up the lease. The next worker that settles, is about to sleep or sends a heartbeat
-- handles it.
--
-- A task that uses none of this has NULL in those columns, skips admit, and touches none of these tables.
--
-- Tasks whose worker vanished
-- ---------------------------
-- A worker that vanishes (killed, out of memory) takes down all tasks that it runs, and at most one of them is the
-- cause. So a crash counts as a failed attempt only if the task was the only one that its worker held:
--
--     crash beside others, the first   ready again at once. The attempt doesn't count (crashes)
--     crash beside others, a later one parked ('crashed'), out of the claims' way, until a worker runs it isolated
--     crash alone                      the attempt counts (crashes_alone). After the third such crash, or at
--                                      max_attempts, the task is dead
--
-- To run such tasks isolated, a worker stops claiming until it holds no task, then runs 16 of them, or 4 that have
-- crashed three times, or one that has crashed more often, and then claims as usual. One worker at a time does that.
-- The tasks don't wait for that for ever: after a time that doubles with each crash they run beside others, which a
-- further crash would make start again.
--
-- Options
-- -------
-- Features that few tasks use are given in one column, options, a JSON object: unique_key, order_key, limit_key, after
-- and their settings; see notifyq.apply_options(). For all other tasks it is NULL, and costs their INSERT one short WHEN. It
-- must be short: PostgreSQL parses a CHECK or a trigger's WHEN anew for every statement, at 4 000 to 5 000 instructions
-- for each column, operator and constant in it. A whole INSERT takes 170 000.
--
-- Unique
-- ------
-- No unique index enforces keys: a rescue, a retry or a cancel would fail because of it, long after the enqueue. Only
-- an INSERT with a unique_key is checked, by a trigger, which leaves the row out if an existing task is in its way:
--
--   1. The trigger creates or locks the key's row of notifyq.unique_key, which names the newest task with the key.
--      Other enqueuers of the key wait here until this transaction ends, and then see its outcome.
--   2. With a snapshot taken under that lock it checks whether the newest task is in the way: by its state
--      (unique_states) and by how long ago it was enqueued (unique_for). If not, the new task is inserted, and the
--      key's row names it.
--   3. If the existing task is in the way and waits to be run, its row is locked too, until the enqueuer's transaction
--      ends, and claims step over it. So it begins only when the enqueuer's other writes can be seen. If it had begun
--      before, and 'running' isn't among the states, a new task is inserted. In both cases some run sees those writes.
--      The statement rings even if it inserts no row, so a worker that stepped over the existing task looks again.
--
-- A rollback, also of a savepoint, undoes all of that. Under REPEATABLE READ and SERIALIZABLE the snapshot is the
-- caller's: a change of the key or of the task since then is a serialization failure (40001), never a second task.
--
-- What a user of the database may call: enqueue, cancel, retry; pause, resume and limit_queue of queues; cron_pause,
-- cron_resume and cron_run. All other functions are internal. Each has a comment: \df+ notifyq.*
--
-- Roles: see the GRANTs at the end.

CREATE SCHEMA notifyq;

-- Every table that rows are updated in or deleted from has a primary key: in a publication, which may be one FOR ALL
-- TABLES that nobody made for us, PostgreSQL refuses the UPDATE or DELETE of a table without one.
CREATE TABLE notifyq.schema_version (
    version      integer     NOT NULL PRIMARY KEY,
    installed_at timestamptz NOT NULL DEFAULT now(),
    serves       integer     NOT NULL                  -- the version of the oldest code that can work with it
);
INSERT INTO notifyq.schema_version (version, serves) VALUES (1, 1);

-- Live tasks. A row with a payload that doesn't fit its type, or with an impossible type, can be inserted: the worker
-- finds it, and the task ends dead with a message. A constraint would abort the enqueuer's whole transaction instead,
-- and would cost every INSERT (see "Options"). Only wrong options are refused.
CREATE TABLE notifyq.task (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_at        timestamptz NOT NULL DEFAULT now(),  -- now(), the transaction's start, is never after created_at
    processing_at timestamptz,                         -- when the last attempt was claimed
    processed_at  timestamptz,                         -- when the last attempt ended
    worker        integer,                             -- who holds the lease
    priority      smallint    NOT NULL DEFAULT 0,      -- higher runs first
    attempts      smallint    NOT NULL DEFAULT 0,      -- claims so far; with worker, the fencing token
    max_attempts  smallint,                            -- null: what the task's type says, else 10; below 1 is 1
    promoted      boolean     NOT NULL DEFAULT false,  -- was scheduled, and its time has come
    withheld      boolean     NOT NULL DEFAULT false,
    queue         text        NOT NULL DEFAULT 'default',
    type          text        NOT NULL,
    payload       jsonb       NOT NULL DEFAULT '{}',
    errors        jsonb,                               -- one object for each attempt that failed: see append_error()
    options       jsonb,                               -- see "Options"; these three are taken from it by notifyq.apply_options():
    order_key     text,                                -- one at a time, in the order of ids
    limit_key     text,                                -- at most N at the same time, of all tasks with this key
    after         bigint[],                            -- the tasks whose ends it waits for, until they have come
    parked        text,                                -- if withheld: what it waits for: limit, rate, queue, order, after,
    waiting_on    text,                                -- and the key; both, not withheld: granted, the next of that key
    admitted_at   timestamptz,                         -- = processing_at: this attempt was admitted, and holds its slots
    watched       boolean     NOT NULL DEFAULT false,  -- others may wait for its end: it writes a row into slot_released
    awaited       boolean     NOT NULL DEFAULT false,  -- a client waits for its end: it sends a NOTIFY
    progress      real,
    note          text,
    crashes       smallint,                            -- how often its worker vanished while it ran beside others,
    crashes_alone smallint                             -- and while it ran alone: see "Tasks whose worker vanished"
) WITH (
    fillfactor = 90,
    -- A queue turns its rows over in seconds: vacuum early, at full speed, indexes included, and never
    -- truncate (that takes an exclusive lock to give back pages the next burst needs).
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.5, autovacuum_analyze_threshold = 10000,
    vacuum_index_cleanup = on, vacuum_truncate = off
);

-- What a claim returns of a task. PostgreSQL inlines a function like these, whose body is one expression without a
-- subquery: plans and costs are as if its callers had the expression.

-- Not inlined, and called for compressed payloads only. The elements of an array aren't compressed. So payload is made
-- an element once, to be measured and to be returned.
CREATE FUNCTION notifyq.decompress_payload(payload jsonb, most integer) RETURNS jsonb STABLE LANGUAGE sql BEGIN ATOMIC
    SELECT p.whole[1] FROM (SELECT ARRAY[payload] AS whole OFFSET 0) AS p WHERE pg_column_size(p.whole) <= most;
END;

-- payload if its text is short enough to come with a claim, else NULL: the runner fetches it later. most: in bytes.
--
-- pg_column_size is the size on disk. A compressed payload can be 87 times as large (pglz), or 255 times (lz4), so its
-- whole size counts, unless it is small in any case: up to an eighth of most.
CREATE FUNCTION notifyq.inline_payload(payload jsonb, most integer) RETURNS jsonb STABLE LANGUAGE sql BEGIN ATOMIC
    SELECT CASE WHEN pg_column_size(payload) <= most / 8
                  OR pg_column_size(payload) <= most AND pg_column_compression(payload) IS NULL THEN payload
                WHEN pg_column_size(payload) <= most THEN notifyq.decompress_payload(payload, most) END;
END;

-- Whether a claimed task must be admitted before it runs: see "Limits and order" and "After".
CREATE FUNCTION notifyq.needs_admission(limit_key text, order_key text, after bigint[]) RETURNS boolean IMMUTABLE
LANGUAGE sql BEGIN ATOMIC
    SELECT limit_key IS NOT NULL OR order_key IS NOT NULL OR after IS NOT NULL;
END;

-- moment, or the nearest time that Python's datetime has.
CREATE FUNCTION notifyq.readable_time(moment timestamptz) RETURNS timestamptz IMMUTABLE LANGUAGE sql BEGIN ATOMIC
    SELECT greatest(least(moment, '9999-12-30Z'), '0001-01-03Z');
END;

-- Of claimable tasks, in their order, those that fit into the free threads of a worker. PL/pgSQL keeps the plan.
--
--     ids, types        the tasks
--     plain             types that have plain handlers: a task of another type needs no thread
--     shares, held      how many tasks of each of these share a thread, and how many the worker holds
--     spare             how many threads are free
--
-- seat is the task's place in the threads of its type, from 0 on; NULL: it needs no thread. begun: held tasks have left
-- places in the first of them. opened: how many threads the tasks up to this one take. A task fits if it has a place in
-- that first thread, or if the task that opens its thread is among the first spare ones.
CREATE FUNCTION notifyq.choose_fitting(
    ids bigint[], types text[], plain text[], shares integer[], held integer[], spare integer
) RETURNS bigint[] STABLE LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    RETURN ARRAY(
        SELECT f.id
        FROM (
            SELECT o.id, o.seat IS NULL OR o.begun AND o.seat < o.share
                         OR min(o.opened) OVER (PARTITION BY o.type, o.seat / o.share) <= spare AS fits
            FROM (
                SELECT s.*, sum((s.seat % s.share = 0)::integer) OVER (ORDER BY s.place) AS opened
                FROM (
                    SELECT p.id, p.type, p.place, k.share, k.held % k.share > 0 AS begun,
                           k.held % k.share + row_number() OVER (PARTITION BY p.type ORDER BY p.place) - 1 AS seat
                    FROM unnest(ids, types) WITH ORDINALITY AS p (id, type, place)
                    LEFT JOIN unnest(plain, shares, choose_fitting.held) AS k (type, share, held) ON k.type = p.type
                ) AS s
            ) AS o
        ) AS f
        WHERE f.fits);
END $$;

-- The claim's index: its order is the claim's ORDER BY, its predicate the claim's WHERE, word for word. id + 0, since
-- no planner may take task_pkey for "from this id on, in the order of ids" and read all that isn't ready on the way.
CREATE INDEX task_ready ON notifyq.task (queue, priority DESC, (id + 0))
    WHERE worker IS NULL AND NOT withheld AND (run_at <= created_at OR promoted);
CREATE INDEX task_scheduled ON notifyq.task (queue, run_at)
    WHERE worker IS NULL AND run_at > created_at AND NOT promoted;
CREATE INDEX task_running ON notifyq.task (worker) WHERE worker IS NOT NULL;
CREATE INDEX task_unhandled ON notifyq.task (type, queue, priority DESC, id)
    WHERE worker IS NULL AND withheld AND parked IS NULL;
-- For "Limits and order": the tasks that hold a slot of a key or a queue, those that wait at a key, and those in an
-- order. No plain task is in any of them.
CREATE INDEX task_admitted ON notifyq.task (limit_key, queue) WHERE admitted_at IS NOT NULL AND worker IS NOT NULL;
CREATE INDEX task_parked ON notifyq.task (waiting_on, withheld, priority DESC, id) WHERE waiting_on IS NOT NULL;
-- A task's place in its order: 0 = may run next; a worker's id = running; NULL = not in the order yet.
CREATE FUNCTION notifyq.place_in_order(
    attempts smallint, parked text, promoted boolean, run_at timestamptz, created_at timestamptz, worker integer
) RETURNS integer IMMUTABLE LANGUAGE sql BEGIN ATOMIC
    SELECT CASE WHEN attempts > 0 OR parked <> 'after' OR parked IS NULL AND (promoted OR run_at <= created_at)
           THEN coalesce(worker, 0) END;
END;

-- id + 0 as above. The planner inlines the function here too.
CREATE INDEX task_order ON notifyq.task (
    order_key, (notifyq.place_in_order(attempts, parked, promoted, run_at, created_at, worker)), (id + 0))
    WHERE order_key IS NOT NULL;

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
    options       jsonb
) WITH (autovacuum_vacuum_insert_scale_factor = 0.5, vacuum_truncate = off);
-- For pruning, each by its own age. Appended at the right edge, so an insert finds its page at once.
CREATE INDEX finished_old ON notifyq.finished (processed_at) WHERE state <> 'dead';
CREATE INDEX finished_dead ON notifyq.finished (processed_at) WHERE state = 'dead';

-- Workers that are alive, or were a moment ago. A heartbeat is per worker, not per task. Besides, all sessions of a
-- worker share the session-level advisory lock (1852990827, id), which is free the moment the last of their backends is
-- gone. An id is drawn at random, and not from a sequence: after a failover that lost a worker's row, or a restore, a
-- sequence would give the id of a worker that lives to another one, and no fence could tell the two apart.
CREATE TABLE notifyq.worker (
    id            integer     NOT NULL DEFAULT 1 + floor(random() * 2147483647) PRIMARY KEY,
    name          text        NOT NULL,                -- host:pid
    queues        text[]      NOT NULL,
    types         text[]      NOT NULL,
    max_attempts  smallint[]  NOT NULL,                -- parallel to types: for tasks without their own
    concurrency   integer     NOT NULL,
    lease         interval    NOT NULL,                -- after so long without a heartbeat it is dead, lock or not
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    running       integer     NOT NULL DEFAULT 0,
    status        text        NOT NULL DEFAULT 'ok',   -- or what is degraded, in words
    crons         text[]      NOT NULL DEFAULT '{}'    -- the names of the crons that it serves
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Whether a worker's last heartbeat is no older than its lease. After a step of the server's clock it may lie in the
-- future, so that is bounded too.
CREATE FUNCTION notifyq.is_alive(seen_at timestamptz, lease interval) RETURNS boolean STABLE LANGUAGE sql BEGIN ATOMIC
    SELECT seen_at BETWEEN statement_timestamp() - lease AND statement_timestamp() + lease;
END;

CREATE TABLE notifyq.bell (nothing boolean CHECK (false)) WITH (autovacuum_enabled = false);

-- The enqueuer's side of the doorbell. Whatever goes wrong here (no privilege on bell, no bell at all) must not abort
-- somebody's INSERT: every error means "ring". Names are qualified, so search_path has no say.
CREATE FUNCTION notifyq.ring() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE NOWAIT;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    -- Any role can fill the notification queue (LISTEN, BEGIN, and wait while it notifies): then the commit of whoever
    -- rings would fail. So nobody rings, and workers find out by their echoes, and poll. Nor does a transaction ring that is
    -- to be prepared for two-phase commit, and says so by SET LOCAL notifyq.two_phase = on: PostgreSQL refuses to prepare
    -- one that has notified. (It asks here, since a transaction that doesn't ring need not ask.)
    IF pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.9
       AND coalesce(pg_catalog.current_setting('notifyq.two_phase', true), '') OPERATOR(pg_catalog.<>) 'on' THEN
        PERFORM pg_catalog.pg_notify('notifyq', '');
    END IF;
    RETURN NULL;
END $$;

-- Notify, except when the queue of notifications is nearly full, or in two-phase commit: see ring, which does it by
-- itself, being on everybody's way.
CREATE FUNCTION notifyq.notify_unless_full(channel text, payload text) RETURNS void LANGUAGE sql BEGIN ATOMIC
    SELECT pg_notify($1, $2)
    WHERE pg_notification_queue_usage() < 0.9 AND coalesce(current_setting('notifyq.two_phase', true), '') <> 'on';
END;

-- Ended attempts of tasks that others may wait for: see "Tasks that wait". A row stays until a worker has handled it,
-- so the table is mostly empty.
CREATE TABLE notifyq.slot_released (
    n             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task          bigint      NOT NULL,
    ended         boolean     NOT NULL,                -- it is over; else it only gave up its slot
    queue         text        NOT NULL,
    order_key     text,
    limit_key     text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

-- Locks for keys, by hash. They are rows, as any role could take and keep an advisory lock.
CREATE TABLE notifyq.key_lock (n smallint NOT NULL PRIMARY KEY) WITH (fillfactor = 50);
INSERT INTO notifyq.key_lock (n) SELECT generate_series(-1, 255);  -- -1 is of notifyq.release_dependents

-- Parked tasks with `after`, and the tasks that they wait for.
CREATE TABLE notifyq.dependency (
    needs         bigint      NOT NULL,                -- the task that must end
    task          bigint      NOT NULL,                -- the task that waits for it
    confirmed     boolean     NOT NULL,                -- the end will be recorded: `needs` is watched, or was at its end
    PRIMARY KEY (needs, task)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);
CREATE INDEX dependency_task ON notifyq.dependency (task);
CREATE INDEX dependency_unconfirmed ON notifyq.dependency (needs) WHERE NOT confirmed;

-- Queues that were paused or limited for all workers.
CREATE TABLE notifyq.queue (
    name          text        NOT NULL PRIMARY KEY CHECK (length(name) <= 200),
    paused        boolean     NOT NULL DEFAULT false,
    limit_running integer     CHECK (limit_running >= 1),
    limit_rate    integer     CHECK (limit_rate >= 1),
    limit_seconds float8      CHECK (limit_seconds > 0 AND limit_seconds <= 1e9)
);

-- How many tasks (n) of a key with a rate started at a time. A row is kept for the longest window that was asked for.
CREATE TABLE notifyq.rate_log (
    key           text        NOT NULL,
    at            timestamptz NOT NULL,
    n             integer     NOT NULL,
    seconds       float8      NOT NULL,
    PRIMARY KEY (key, at)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

CREATE FUNCTION notifyq.on_task_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.watched THEN
        INSERT INTO notifyq.slot_released (task, ended, queue, order_key, limit_key)
        VALUES (OLD.id, true, OLD.queue, OLD.order_key, OLD.limit_key);
    END IF;
    IF OLD.awaited THEN
        PERFORM notifyq.notify_unless_full('notifyq_done', OLD.id::text);
    END IF;
    RETURN NULL;
END $$;

-- 0.14 us for a row that nobody waits for, and for each statement, INSERTs too, as much as the words after WHEN are
-- long. Not for UPDATE OF run_at too: each row that is claimed would be fetched once more, though claims don't name
-- that column.
CREATE TRIGGER on_task_deleted AFTER DELETE ON notifyq.task FOR EACH ROW
    WHEN (OLD.watched OR OLD.awaited) EXECUTE FUNCTION notifyq.on_task_deleted();

-- `errors` with one more entry. It keeps the first hundred and the last hundred entries. One between them says how many
-- were left out, so a task that fails thousands of times costs each time the same. Of errors that take more than 8 MB
-- on disk, only the new entry is kept, as it is when that has a left_out itself: it could not be stored beside the
-- others.
CREATE FUNCTION notifyq.append_error(errors jsonb, error jsonb) RETURNS jsonb STABLE LANGUAGE plpgsql AS $$
DECLARE
    first CONSTANT integer := 100;
    last CONSTANT integer := 100;
    length integer;
    omitted numeric;
BEGIN
    IF errors IS NULL OR jsonb_typeof(errors) = 'null' THEN
        RETURN jsonb_build_array(error);
    ELSIF jsonb_typeof(errors) <> 'array' THEN
        RETURN jsonb_build_array(errors, error);
    END IF;
    length := jsonb_array_length(errors);
    IF pg_column_size(errors) > 8388608 OR error ? 'left_out' THEN
        RETURN jsonb_build_array(
            jsonb_build_object('left_out', length, 'error', 'entries that were left out, as they are too large: ' || length), error - 'left_out');
    ELSIF length < first + last THEN
        RETURN errors || jsonb_build_array(error);
    END IF;
    SELECT sum(CASE WHEN jsonb_typeof(e.entry -> 'left_out') = 'number' THEN (e.entry ->> 'left_out')::numeric ELSE 1 END)
    INTO omitted
    FROM jsonb_array_elements(errors) WITH ORDINALITY AS e (entry, n)
    WHERE e.n > first AND e.n <= length - last + 1;
    RETURN jsonb_path_query_array(errors, '$[0 to 99]')
        || jsonb_build_array(jsonb_build_object('left_out', omitted, 'error', 'entries that were left out here: ' || omitted))
        || jsonb_path_query_array(errors, '$[last - 98 to last]') || jsonb_build_array(error);
END $$;

-- For whoever sets worker = NULL, in RETURNING, of a watched task: it lives, and has given up its slot. Returns true.
CREATE FUNCTION notifyq.note_lease_given_up(t notifyq.task) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO notifyq.slot_released (task, ended, queue, order_key, limit_key)
    VALUES (t.id, false, t.queue, t.order_key, t.limit_key);
    RETURN true;
END $$;

-- Once for a statement, however many rows it has: for COPY and INSERT ... SELECT too. UPDATE OF run_at is how a
-- retry, a hand-back, a rescue, or a person at psql says "look again"; claims and promotions don't name run_at.
CREATE TRIGGER ring AFTER INSERT OR UPDATE OF run_at ON notifyq.task
    FOR EACH STATEMENT EXECUTE FUNCTION notifyq.ring();

-- The newest task with a key. Rows go, some time after it is over and `until` has passed: prune_unique_keys.sql.
CREATE TABLE notifyq.unique_key (
    key           text        NOT NULL PRIMARY KEY,
    task          bigint      NOT NULL,
    enqueued_at   timestamptz NOT NULL,
    until         timestamptz NOT NULL                 -- the end of the longest unique_for that was asked with
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, vacuum_truncate = off);
CREATE INDEX unique_key_until ON notifyq.unique_key (until);

-- See "Unique": whether this task, which is about to be inserted, is the only one with its key.
CREATE FUNCTION notifyq.claim_unique_key(mine notifyq.task) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    waiting CONSTANT text[] := ARRAY['scheduled', 'ready'];
    my_key CONSTANT text := mine.options ->> 'unique_key';
    on_conflict CONSTANT text := mine.options ->> 'on_conflict';
    period CONSTANT interval := make_interval(secs => (mine.options -> 'unique_for')::float8);
    -- What replaces or moves means the one that waits. "Once an hour" means: done counts too.
    states CONSTANT text[] := CASE
        WHEN mine.options ? 'unique_states' THEN ARRAY(SELECT jsonb_array_elements_text(mine.options -> 'unique_states'))
        WHEN on_conflict IN ('replace', 'move') THEN waiting
        WHEN period IS NULL THEN waiting || '{running}'
        ELSE waiting || '{running,done}' END;
    old bigint;
    since timestamptz;
    held boolean;
    state text;
BEGIN
    INSERT INTO notifyq.unique_key AS k (key, task, enqueued_at, until)
    VALUES (my_key, mine.id, clock_timestamp(), clock_timestamp() + coalesce(period, '0'))
    ON CONFLICT (key) DO UPDATE SET until = k.enqueued_at + period
        WHERE k.until < k.enqueued_at + period  -- mostly not: then it is locked, and no dead row is left
    RETURNING k.task, k.enqueued_at INTO old, since;
    IF old = mine.id THEN
        RETURN true;  -- the first with its key
    ELSIF old IS NULL THEN
        SELECT k.task, k.enqueued_at INTO old, since FROM notifyq.unique_key k WHERE k.key = my_key;
    END IF;
    IF since > clock_timestamp() THEN
        -- The clock was set back since. It counts as enqueued now: else the key would be taken until that time comes.
        since := clock_timestamp();
        UPDATE notifyq.unique_key k
        SET enqueued_at = since, until = since + greatest(
            CASE WHEN isfinite(k.until) AND isfinite(k.enqueued_at) THEN k.until - k.enqueued_at END, coalesce(period, '0'))
        WHERE k.key = my_key;
    END IF;
    LOOP
        -- KEY SHARE, as it hinders nothing but claims. Not one that runs: its worker would wait to settle it.
        -- Ids may have been given twice, to a task of another key.
        PERFORM FROM notifyq.task t
        WHERE t.id = old AND t.worker IS NULL AND t.options ->> 'unique_key' = my_key
        FOR KEY SHARE;
        held := FOUND;
        state := (SELECT a.state FROM notifyq.all_tasks a
                  WHERE a.id = old AND NOT EXISTS (
                      SELECT FROM notifyq.task t
                      WHERE t.id = old AND t.options ->> 'unique_key' IS DISTINCT FROM my_key)
                  ORDER BY a.state IN ('done', 'dead', 'cancelled') LIMIT 1);
        EXIT WHEN held OR state IS NULL OR state <> ALL (waiting);  -- else it was handed back in between
    END LOOP;
    -- What isn't known any more was done, and isn't kept.
    IF coalesce(state, 'done') = ANY (states) AND (period IS NULL OR since + period > clock_timestamp()) THEN
        IF held AND on_conflict = 'replace' THEN
            UPDATE notifyq.task t SET type = mine.type, payload = mine.payload WHERE t.id = old;
        ELSIF held AND on_conflict = 'move' THEN
            -- Not one whose time has come, and that waits for a limit, its turn, or others: who lets it in sets run_at.
            UPDATE notifyq.task t SET run_at = mine.run_at, promoted = mine.run_at <= clock_timestamp()
            WHERE t.id = old AND NOT t.withheld AND t.waiting_on IS NULL;
        END IF;
        RETURN false;
    END IF;
    UPDATE notifyq.unique_key k
    SET task = mine.id, enqueued_at = clock_timestamp(), until = clock_timestamp() + coalesce(period, '0')
    WHERE k.key = my_key;
    RETURN true;
END $$;

-- See "Options". What is wrong with them is said where they are written. Settings, and not OPERATOR(pg_catalog.=) everywhere,
-- for claim_unique_key too: what they cost, only tasks with options pay. A plan may be kept for hours, and one that was made while the
-- tables were empty would read them whole.
--
--     unique_key       of tasks with the same, there is one: a new one isn't inserted while another
--     unique_states      is in one of these states
--     unique_for         and was enqueued less than so many seconds ago;
--     on_conflict        the other is left as it is (keep), or given the payload (replace) or the run_at (move)
--     order_key        of tasks with the same, one runs at a time, in the order of ids
--     limit_key        of tasks with the same, over all workers,
--     limit_running      at most so many run at once,
--     limit_rate         and at most so many start
--     limit_seconds      in any so many seconds
--     after            ids of tasks; it waits for their ends, and
--     on_dead            is cancelled (cancel) or run all the same (run) if one of these isn't done
CREATE FUNCTION notifyq.apply_options() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog SET enable_seqscan = off AS $$
DECLARE
    o CONSTANT jsonb := CASE jsonb_typeof(NEW.options)
        WHEN 'object' THEN jsonb_strip_nulls(NEW.options) WHEN 'null' THEN '{}' END;
    wrong text := CASE WHEN o IS NULL THEN 'options is not an object' ELSE (
        SELECT e.key || ' ' || e.wrong
        FROM (SELECT key, CASE
                WHEN key IN ('unique_key', 'order_key', 'limit_key') THEN
                    CASE WHEN jsonb_typeof(value) <> 'string' OR length(value #>> '{}') NOT BETWEEN 1 AND 200
                         THEN 'is not a string of 1 to 200 characters' END
                WHEN key IN ('limit_running', 'limit_rate') THEN
                    CASE WHEN NOT value @? 'strict $ ? (@ >= 1 && @ <= 2147483647 && @.floor() == @)'
                         THEN 'is not a whole number from 1 to 2147483647' END
                WHEN key IN ('limit_seconds', 'unique_for') THEN
                    CASE WHEN NOT value @? 'strict $ ? (@ > 0 && @ <= 1000000000 && @.double() > 0)'  -- not 1e-400
                         THEN 'is not a number of seconds, above 0 and up to 1e9' END
                WHEN key = 'unique_states' THEN
                    CASE WHEN jsonb_typeof(value) <> 'array' OR value = '[]'
                              OR NOT value <@ '["scheduled", "ready", "running", "done", "dead", "cancelled"]'
                         THEN 'is not an array of scheduled, ready, running, done, dead, cancelled' END
                WHEN key = 'on_conflict' THEN
                    CASE WHEN value NOT IN ('"keep"', '"replace"', '"move"') THEN 'is not keep, replace or move' END
                WHEN key = 'on_dead' THEN
                    CASE WHEN value NOT IN ('"cancel"', '"run"') THEN 'is not cancel or run' END
                WHEN key = 'after' THEN
                    CASE WHEN jsonb_typeof(value) <> 'array' THEN 'is not an array of ids'
                         WHEN jsonb_array_length(value) > 10000 THEN 'has more than 10000 ids'
                         WHEN jsonb_array_length(value) <> jsonb_array_length(jsonb_path_query_array(
                                 value, 'strict $[*] ? (@ >= 1 && @ <= 9223372036854775807 && @.floor() == @)'))
                         THEN 'has something in it that is no id' END
                ELSE 'is none of the options, which are unique_key, unique_states, unique_for, on_conflict, order_key, '
                     'limit_key, limit_running, limit_rate, limit_seconds, after, on_dead'
                END AS wrong
              FROM jsonb_each(o)) AS e
        WHERE e.wrong IS NOT NULL
        ORDER BY e.key LIMIT 1) END;
BEGIN
    IF wrong IS NULL THEN
        NEW.options := nullif(o, '{}');
        NEW.order_key := o ->> 'order_key';
        NEW.limit_key := o ->> 'limit_key';
        NEW.after := nullif(ARRAY(SELECT jsonb_array_elements(o -> 'after')::bigint), '{}');
        NEW.watched := NEW.order_key IS NOT NULL OR NEW.limit_key IS NOT NULL;
        wrong := CASE
            WHEN o ?| '{unique_states,unique_for,on_conflict}' AND NOT o ? 'unique_key'
                THEN 'unique_states, unique_for and on_conflict go with a unique_key'
            WHEN o -> 'unique_states' ?| '{done,dead,cancelled}' AND NOT o ? 'unique_for'
                THEN 'unique_states has done, dead or cancelled in it, and nothing says for how long: unique_for'
            WHEN o ? 'limit_rate' <> o ? 'limit_seconds'
                THEN 'limit_rate and limit_seconds go together: so many starts in so many seconds'
            WHEN o ? 'limit_key' <> o ?| '{limit_running,limit_rate}'
                THEN 'limit_key goes with limit_running, limit_rate and limit_seconds, or both'
            WHEN o ? 'on_dead' AND NOT o ? 'after' THEN 'on_dead goes with after'
            WHEN NOT NEW.id > ALL (NEW.after) THEN 'after has an id that no task has yet'
            END;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'notifyq.task: %', wrong USING ERRCODE = 'check_violation';
    END IF;
    IF o ? 'unique_key' AND NOT notifyq.claim_unique_key(NEW) THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER apply_options BEFORE INSERT ON notifyq.task FOR EACH ROW WHEN (NEW.options IS NOT NULL)
    EXECUTE FUNCTION notifyq.apply_options();

-- The newest task with this key, by a snapshot of its own: so the statement that has inserted nothing learns what is there.
CREATE FUNCTION notifyq.find_unique_task(key text) RETURNS bigint LANGUAGE sql BEGIN ATOMIC
    SELECT k.task FROM notifyq.unique_key k WHERE k.key = $1;
END;

-- The worker's side. A blocked SELECT holds a snapshot and with it vacuum, so every wait is bounded and asked for
-- again; and a refusal, or a worker that stops while it waits, is caught here: neither is for the server's log.
CREATE FUNCTION notifyq.take_turn(fleet integer, wait_ms integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('lock_timeout', wait_ms::text, true);
    PERFORM pg_catalog.pg_advisory_lock(1852990836, fleet);
    RETURN true;
EXCEPTION WHEN lock_not_available OR query_canceled THEN
    -- It may have been granted at the very moment at which the wait ended, and a session's lock outlives the error: a
    -- turn that nobody knows of, nor passes on. Release it however many times this session holds it. Not with
    -- pg_advisory_unlock_all: the session's other lock proves that its worker lives.
    IF pg_catalog.pg_try_advisory_lock(1852990836, fleet) THEN
        LOOP
            PERFORM pg_catalog.pg_advisory_unlock(1852990836, fleet);
            EXIT WHEN NOT EXISTS (
                SELECT FROM pg_catalog.pg_locks l
                WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
                  AND l.locktype OPERATOR(pg_catalog.=) 'advisory'
                  AND l.classid OPERATOR(pg_catalog.=) 1852990836::pg_catalog.oid);
        END LOOP;
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

-- Does a statement (VACUUM, ANALYZE, ALTER PUBLICATION, ...) wait for a lock on the bell that a sleeper's SHARE conflicts
-- with? To be asked while a worker sleeps. PostgreSQL grants no SHARE ahead of such a waiter, so NOWAIT tells, at a fraction
-- of what pg_locks costs. The exception gives back at once what was granted.
CREATE FUNCTION notifyq.bell_wanted() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE notifyq.bell IN SHARE MODE NOWAIT;
    RAISE EXCEPTION USING ERRCODE = 'P0001';
EXCEPTION
    WHEN lock_not_available THEN RETURN true;
    WHEN OTHERS THEN RETURN false;
END $$;

-- For those who prefer a function. It returns the id; of a unique task, it may be the one's that is in the way. The defaults
-- are the table's own, and NULL means the default: what calls it with named parameters often has a NULL for each.
CREATE FUNCTION notifyq.enqueue(
    type text, payload jsonb DEFAULT '{}', queue text DEFAULT 'default', run_at timestamptz DEFAULT now(),
    priority integer DEFAULT 0, max_attempts integer DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    new_id bigint;
BEGIN
    INSERT INTO notifyq.task (type, payload, queue, run_at, priority, max_attempts, options)
    VALUES ($1, coalesce($2, '{}'), coalesce($3, 'default'), coalesce($4, pg_catalog.now()), coalesce($5, 0), $6, $7)
    RETURNING id INTO new_id;
    RETURN coalesce(new_id, notifyq.find_unique_task($7 OPERATOR(pg_catalog.->>) 'unique_key'));
END $$;

-- BEGIN ATOMIC has the names looked up now, and not by each caller's search_path; unlike SET search_path it costs a call
-- nothing.

-- Move a live task to finished; the one place outside a worker's settle that does. Returns whether it was there.
CREATE FUNCTION notifyq.cancel(id bigint) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    -- An older task may have had the same id: see read_highest_ids.sql.
    DELETE FROM notifyq.finished f WHERE f.id = $1 AND EXISTS (SELECT FROM notifyq.task t WHERE t.id = $1);
    -- A running task is taken from its worker: the worker's next heartbeat finds its lease gone and cancels the handler.
    -- While something runs for long there, it listens, and comes to look at once.
    WITH gone AS (
        DELETE FROM notifyq.task t WHERE t.id = $1 RETURNING t.*
    ), kept AS (
        INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts,
                                      max_attempts, state, queue, type, worker, payload, result, errors, options)
        SELECT g.id, g.created_at, g.run_at, g.processing_at, clock_timestamp(), g.priority, g.attempts,
               g.max_attempts, 'cancelled', g.queue, g.type, w.name, g.payload, NULL, g.errors, g.options
        FROM gone g LEFT JOIN notifyq.worker w ON w.id = g.worker
        RETURNING 1
    ), told AS MATERIALIZED (
        SELECT notifyq.notify_unless_full('notifyq_cancel', g.id::text) FROM gone g WHERE g.worker IS NOT NULL
        UNION ALL
        SELECT notifyq.notify_unless_full('notifyq', '') FROM gone g WHERE g.watched  -- others wait for its end, and a DELETE doesn't ring
    )
    SELECT EXISTS (SELECT FROM kept) FROM (SELECT count(*) FROM told) AS t;
END;

-- Run it again, now. A dead or cancelled task starts over with all its attempts; a scheduled one is due; a running, ready
-- or done one is left alone.
CREATE FUNCTION notifyq.retry(id bigint) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    WITH again AS (
        DELETE FROM notifyq.finished f
        WHERE f.id = $1 AND f.state IN ('dead', 'cancelled') AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.id = $1)
        RETURNING f.*
    ), back AS (
        INSERT INTO notifyq.task (id, created_at, run_at, priority, max_attempts, promoted, queue, type, payload, errors, options)
        OVERRIDING SYSTEM VALUE
        SELECT a.id, a.created_at, now(), a.priority, a.max_attempts, true, a.queue, a.type, a.payload, a.errors,
               -- Nobody stands in its way any more; and it runs, whatever has become of those that it comes after.
               a.options - '{unique_key,unique_states,unique_for,on_conflict}'::text[]
               || CASE WHEN a.options ? 'after' THEN '{"on_dead": "run"}' ELSE '{}' END::jsonb
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

-- Limits and order
-- ----------------
-- A key is 'limit:' and a limit_key, 'queue:' and the name of a queue with a limit, or 'order:' and an order_key. A task
-- may have one of each, and is judged by them in the order: order, queue, limit. It is parked at the first that keeps it
-- back, and takes no place of those that come after.
--
--     parked   withheld   waiting_on
--     set      true    set        waits at that key; nobody looks at it until the key is filled
--     set      false   set        granted: a slot of that key is kept for it. It is ready, or scheduled for the time at
--                                 which a rate lets it start, and is judged again when it has been claimed
--     null     -       null       everything else
--
-- Exact: who holds a slot is read from the rows (admitted_at = processing_at, which each claim sets anew, so that no
-- attempt inherits it), after the key's row of key_lock is locked, in a snapshot taken under that lock. admit is the only place
-- that gives a slot, and it commits to the disk before a handler begins.
--
-- Live: whatever keeps a task back makes a row in notifyq.slot_released when it goes (a holder's end or its loss of the lease, a
-- granted task that is cancelled, set aside or lost with its worker: with the same commit), or it goes
-- in admit itself, under the key's lock: a granted task that is parked at another key. free and admit fill the keys: they
-- grant, in the order of priority and id, as many slots as neither holders nor granted tasks have; what is in a paused
-- queue is passed over, and whoever comes while others wait at his key waits too, behind them. A row of
-- slot_released is written before its cause can be seen, and deleted only after the key was locked: an admit that has counted the cause has
-- then committed what it parked. A slot that nobody frees, as it is time that frees it (a rate), is granted ahead, for
-- its moment, and the timers do the rest. Claimed tasks that nobody has judged yet count for nobody, so no one waits for
-- them. What a grant can't reach (a queue that was paused a moment ago, or that no worker serves) holds its slot for 2 s and
-- no longer; notifyq.recheck_waiting, called now and then, has such keys filled again.
--
-- Each task is parked and granted once, unless its keys have different ideas: then once for each.

-- Everybody locks keys in this order, and finds in notifyq.rate_log what the clock says.
CREATE FUNCTION notifyq.lock_keys(keys text[]) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    locks CONSTANT smallint[] := ARRAY(SELECT DISTINCT (hashtext(k) & 255)::smallint FROM unnest(keys) AS k);
    found_locks integer;
    moment timestamptz;
BEGIN
    PERFORM FROM notifyq.key_lock g WHERE g.n = ANY (locks) ORDER BY g.n FOR UPDATE;
    GET DIAGNOSTICS found_locks = ROW_COUNT;
    IF found_locks < cardinality(locks) THEN  -- a TRUNCATE, or a copy without rows, must not leave limits without locks
        INSERT INTO notifyq.key_lock (n) SELECT generate_series(-1, 255) ON CONFLICT DO NOTHING;
        PERFORM FROM notifyq.key_lock g WHERE g.n = ANY (locks) ORDER BY g.n FOR UPDATE;
    END IF;
    -- What started in the future did so before the clock was set back. It counts as of now: else it would block its key
    -- until that time comes.
    moment := clock_timestamp();
    IF EXISTS (SELECT FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at > moment) THEN
        WITH ahead AS (
            DELETE FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at > moment RETURNING s.key, s.n, s.seconds
        )
        INSERT INTO notifyq.rate_log AS known (key, at, n, seconds)
        SELECT a.key, moment, sum(a.n), max(a.seconds) FROM ahead a GROUP BY a.key
        ON CONFLICT (key, at) DO UPDATE SET n = known.n + excluded.n, seconds = greatest(known.seconds, excluded.seconds);
    END IF;
END $$;

-- Grant what is free at `key`, which is locked. Returns how many tasks became ready, or scheduled.
CREATE FUNCTION notifyq.grant_slots(key text) RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    most CONSTANT integer := 1000;
    kind CONSTANT text := split_part(key, ':', 1);
    name CONSTANT text := substr(key, length(kind) + 2);
    moment CONSTANT timestamptz := clock_timestamp();
    head record;
    held integer;
    kept integer;
    room integer;
    limits record;
BEGIN
    IF kind = 'order' THEN
        SELECT t.id, t.withheld AND t.waiting_on IS NOT DISTINCT FROM key AS waits INTO head FROM notifyq.task t
        WHERE t.order_key = name
          AND notifyq.place_in_order(t.attempts, t.parked, t.promoted, t.run_at, t.created_at, t.worker) = 0
        ORDER BY t.id + 0 LIMIT 1;
        IF head.waits IS NOT TRUE OR EXISTS (
            SELECT FROM notifyq.task t
            WHERE t.order_key = name
              AND notifyq.place_in_order(t.attempts, t.parked, t.promoted, t.run_at, t.created_at, t.worker) > 0
              AND (t.id < head.id OR t.admitted_at = t.processing_at)) THEN
            RETURN 0;
        END IF;
        UPDATE notifyq.task t
        SET withheld = false, parked = NULL, waiting_on = NULL, run_at = moment, promoted = true
        -- None, if somebody has locked it; the next one, and the order would be broken.
        WHERE t.id = ANY (ARRAY(
            SELECT h.id FROM notifyq.task h
            WHERE h.id = head.id AND h.worker IS NULL AND h.withheld AND h.waiting_on = key FOR NO KEY UPDATE SKIP LOCKED));
        GET DIAGNOSTICS room = ROW_COUNT;
        RETURN room;
    END IF;
    SELECT l.* INTO limits FROM notifyq.task t CROSS JOIN LATERAL notifyq.parse_limits(t.options) AS l
    WHERE t.waiting_on = key AND t.withheld AND NOT EXISTS (SELECT FROM notifyq.queue q WHERE q.name = t.queue AND q.paused)
    ORDER BY t.priority DESC, t.id LIMIT 1;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF kind = 'queue' THEN
        SELECT q.limit_running, q.limit_rate, q.limit_seconds INTO limits FROM notifyq.queue q WHERE 'queue:' || q.name = key;
        SELECT count(*) INTO held FROM notifyq.task t
        WHERE t.queue = name AND t.worker IS NOT NULL AND t.admitted_at = t.processing_at;
    ELSE
        SELECT count(*) INTO held FROM notifyq.task t
        WHERE t.limit_key = name AND t.worker IS NOT NULL AND t.admitted_at = t.processing_at;
    END IF;
    -- A rate grants for the length of its window ahead, at most. What is granted for later was so before the clock was set
    -- back, and would keep its slot until that time comes: it waits again, and is granted anew.
    UPDATE notifyq.task t SET withheld = true
    WHERE t.id = ANY (ARRAY(
        SELECT g.id FROM notifyq.task g
        WHERE g.waiting_on = key AND NOT g.withheld AND g.worker IS NULL
          AND g.run_at > moment + interval '2 seconds' + make_interval(secs => greatest(
                  limits.limit_seconds, (SELECT l.limit_seconds FROM notifyq.parse_limits(g.options) AS l), 0))
        FOR NO KEY UPDATE SKIP LOCKED));
    kept := notifyq.count_reserved(key, moment, NULL);
    -- Of the one that is first. Where others have other limits, they are judged by their own when they are claimed.
    room := least(most, limits.limit_running - held - kept, limits.limit_rate - kept);
    IF room <= 0 THEN
        RETURN 0;
    END IF;
    WITH first AS MATERIALIZED (
        SELECT t.id, t.priority FROM notifyq.task t
        WHERE t.waiting_on = key AND t.withheld AND t.worker IS NULL
          AND NOT EXISTS (SELECT FROM notifyq.queue q WHERE q.name = t.queue AND q.paused)
        ORDER BY t.priority DESC, t.id LIMIT room FOR NO KEY UPDATE OF t SKIP LOCKED
    ), past AS MATERIALIZED (
        SELECT s.at + make_interval(secs => limits.limit_seconds) AS free, sum(s.n) OVER (ORDER BY s.at) AS upto
        FROM notifyq.rate_log s
        WHERE s.key = grant_slots.key AND s.at > moment - make_interval(secs => limits.limit_seconds)
    ), placed AS (
        SELECT f.id, f.place + kept + coalesce((SELECT max(p.upto) FROM past p), 0) - limits.limit_rate AS owed
        FROM (SELECT id, row_number() OVER (ORDER BY priority DESC, id) AS place FROM first) AS f
    ), timed AS (
        SELECT p.id, CASE WHEN p.owed > 0 THEN (SELECT min(s.free) FROM past s WHERE s.upto >= p.owed) ELSE moment END AS at
        FROM placed p
    )
    UPDATE notifyq.task t
    SET withheld = false, run_at = w.at, promoted = w.at <= moment
    FROM (SELECT id, coalesce(at, moment) AS at FROM timed) AS w
    WHERE t.id = ANY (ARRAY[w.id]);
    GET DIAGNOSTICS room = ROW_COUNT;
    IF room = most THEN
        INSERT INTO notifyq.slot_released (task, ended, queue, limit_key)
        VALUES (0, false, CASE kind WHEN 'queue' THEN name ELSE '' END, CASE kind WHEN 'limit' THEN name END);
    END IF;
    RETURN room;
END $$;

-- The same at all of these keys at which somebody waits.
CREATE FUNCTION notifyq.grant_slots(keys text[]) RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    key text;
    ready integer := 0;
BEGIN
    FOREACH key IN ARRAY ARRAY(
        SELECT k FROM unnest(keys) AS k  -- not EXISTS, which may become a join with all that is parked
        WHERE (SELECT true FROM notifyq.task t WHERE t.waiting_on = k AND t.withheld LIMIT 1))
    LOOP
        ready := ready + notifyq.grant_slots(key);
    END LOOP;
    RETURN ready;
END $$;

-- What a task's options say of its limit_key. A person's UPDATE may have made anything of them, and nobody's claim may fail
-- of it.
CREATE FUNCTION notifyq.parse_limits(options jsonb) RETURNS TABLE (limit_running integer, limit_rate integer, limit_seconds float8)
    LANGUAGE sql IMMUTABLE ROWS 1 BEGIN ATOMIC
    SELECT jsonb_path_query_first($1, '$.limit_running ? (@ >= 1 && @ <= 2147483647)')::integer,
           jsonb_path_query_first($1, '$.limit_rate ? (@ >= 1 && @ <= 2147483647)')::integer,
           jsonb_path_query_first($1, '$.limit_seconds ? (@ > 0 && @ <= 1000000000 && @.double() > 0)')::float8;
END;

-- How many slots of a key are kept for granted tasks, those of `ids` aside.
CREATE FUNCTION notifyq.count_reserved(key text, moment timestamptz, ids bigint[]) RETURNS integer LANGUAGE sql STABLE BEGIN ATOMIC
    SELECT count(*)::integer FROM notifyq.task t
    WHERE t.waiting_on = $1 AND NOT t.withheld AND t.id <> ALL (coalesce($3, '{}'))
      AND (t.worker IS NOT NULL OR t.run_at > $2 - interval '2 seconds');
END;

-- Does anybody wait at a key who could be granted a slot? Then newcomers wait too, and all are let in by priority and id.
CREATE FUNCTION notifyq.has_waiters(key text) RETURNS boolean LANGUAGE sql STABLE BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM notifyq.task t
                   WHERE t.waiting_on = $1 AND t.withheld
                     AND NOT EXISTS (SELECT FROM notifyq.queue q WHERE q.name = t.queue AND q.paused));
END;

-- Of tasks that this worker has just claimed, which may run: waits_for is null. The others are parked. One that isn't
-- named in the answer is locked by somebody who is cancelling it, or wasn't the worker's any more.
CREATE FUNCTION notifyq.admit(worker integer, ids bigint[], attempts smallint[])
    RETURNS TABLE (id bigint, waits_for text) LANGUAGE plpgsql SET search_path = pg_catalog AS $$
#variable_conflict use_column
DECLARE
    limited text[];  -- queues
    keys text[];
    moment timestamptz;
    waiting bigint[];  -- for the ends of others: see "After"
    cancelled bigint[];
    judged_ids bigint[];
    judged_why text[];
BEGIN
    PERFORM set_config('synchronous_commit', 'on', true);  -- a server that crashes must not forget who runs
    SELECT array_agg(q.name) INTO limited FROM notifyq.queue q WHERE coalesce(q.limit_running, q.limit_rate) IS NOT NULL;
    SELECT array_agg(DISTINCT k) INTO keys
    FROM notifyq.task t
    CROSS JOIN LATERAL (VALUES ('order:' || t.order_key), ('limit:' || t.limit_key),
                               (CASE WHEN t.queue = ANY (limited) THEN 'queue:' || t.queue END)) AS v (k)
    WHERE t.id = ANY (admit.ids) AND k IS NOT NULL;
    PERFORM notifyq.lock_keys(keys);
    SELECT a.waiting, a.cancelled INTO waiting, cancelled FROM notifyq.await_predecessors(admit.worker, admit.ids, admit.attempts) AS a;
    moment := clock_timestamp();
    WITH mine AS MATERIALIZED (
        SELECT t.id, t.priority, t.queue, t.order_key, t.limit_key, t.waiting_on, l.limit_running, l.limit_rate, l.limit_seconds
        FROM unnest(admit.ids, admit.attempts) AS o (id, attempt)
        JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
        CROSS JOIN LATERAL notifyq.parse_limits(t.options) AS l
        WHERE t.worker IS NOT DISTINCT FROM admit.worker AND t.attempts = o.attempt
          -- One that was locked when the others were asked what they wait for, and isn't now, was not asked.
          AND (t.after IS NULL OR t.id = ANY (waiting))
        FOR UPDATE OF t SKIP LOCKED
    ), ordered AS MATERIALIZED (
        SELECT m.*, CASE WHEN m.id = ANY (waiting) THEN 'after' WHEN m.order_key IS NOT NULL AND EXISTS (
            SELECT FROM notifyq.task o
            WHERE o.order_key = m.order_key
              AND notifyq.place_in_order(o.attempts, o.parked, o.promoted, o.run_at, o.created_at, o.worker) > 0
              AND (o.id < m.id OR o.id <> m.id AND o.admitted_at = o.processing_at)
            UNION ALL
            SELECT FROM notifyq.task o
            WHERE o.order_key = m.order_key
              AND notifyq.place_in_order(o.attempts, o.parked, o.promoted, o.run_at, o.created_at, o.worker) = 0
              AND o.id + 0 < m.id) THEN 'order' END AS why
        FROM mine m
    ), queues AS MATERIALIZED (
        SELECT q.name, q.limit_running, q.limit_rate, q.limit_seconds,
               (SELECT count(*) FROM notifyq.task t
                WHERE t.queue = q.name AND t.worker IS NOT NULL AND t.admitted_at = t.processing_at
                  AND t.id <> ALL (admit.ids)) AS held,
               notifyq.count_reserved('queue:' || q.name, moment, admit.ids) AS kept,
               notifyq.has_waiters('queue:' || q.name) AS waits,
               (SELECT coalesce(sum(s.n), 0) FROM notifyq.rate_log s
                WHERE s.key = 'queue:' || q.name AND s.at > moment - make_interval(secs => q.limit_seconds)) AS begun
        FROM notifyq.queue q
        WHERE q.name = ANY (limited) AND q.name IN (SELECT o.queue FROM ordered o)
    ), queued AS MATERIALIZED (
        SELECT o.id, coalesce(o.why, CASE WHEN NOT o.granted AND q.waits
                OR q.limit_running < o.place + q.held + CASE WHEN o.granted THEN 0 ELSE q.kept END
                OR q.limit_rate < o.place + q.begun + CASE WHEN o.granted THEN 0 ELSE q.kept END THEN 'queue' END) AS why
        FROM (SELECT o.*, row_number() OVER (PARTITION BY o.queue, o.why ORDER BY o.priority DESC, o.id) AS place,
                     coalesce(o.waiting_on = 'queue:' || o.queue, false) AS granted FROM ordered o) AS o
        LEFT JOIN queues q ON q.name = o.queue
    ), limits AS MATERIALIZED (
        SELECT k.limit_key,
               (SELECT count(*) FROM notifyq.task t
                WHERE t.limit_key = k.limit_key AND t.worker IS NOT NULL AND t.admitted_at = t.processing_at
                  AND t.id <> ALL (admit.ids)) AS held,
               notifyq.count_reserved('limit:' || k.limit_key, moment, admit.ids) AS kept,
               notifyq.has_waiters('limit:' || k.limit_key) AS waits
        FROM (SELECT DISTINCT m.limit_key FROM mine m WHERE m.limit_key IS NOT NULL) AS k
    ), rates AS MATERIALIZED (
        SELECT k.limit_key, k.limit_seconds,
               (SELECT coalesce(sum(s.n), 0) FROM notifyq.rate_log s
                WHERE s.key = 'limit:' || k.limit_key AND s.at > moment - make_interval(secs => k.limit_seconds)) AS begun
        FROM (SELECT DISTINCT m.limit_key, m.limit_seconds FROM mine m
              WHERE m.limit_key IS NOT NULL AND m.limit_rate IS NOT NULL) AS k
    ), verdict AS MATERIALIZED (
        SELECT p.id, p.limit_rate, p.limit_seconds, coalesce(p.why, CASE
                   WHEN NOT p.granted AND l.waits THEN CASE WHEN p.limit_running IS NULL THEN 'rate' ELSE 'limit' END
                   WHEN p.limit_running < p.place + l.held + CASE WHEN p.granted THEN 0 ELSE l.kept END THEN 'limit'
                   WHEN p.limit_rate < p.place + r.begun + CASE WHEN p.granted THEN 0 ELSE l.kept END THEN 'rate' END) AS why
        FROM (SELECT m.*, u.why, row_number() OVER (PARTITION BY m.limit_key, u.why ORDER BY m.priority DESC, m.id) AS place,
                     coalesce(m.waiting_on = 'limit:' || m.limit_key, false) AS granted
              FROM mine m JOIN queued u ON u.id = m.id) AS p
        LEFT JOIN limits l ON l.limit_key = p.limit_key
        LEFT JOIN rates r ON r.limit_key = p.limit_key AND r.limit_seconds = p.limit_seconds
    ), written AS (
        UPDATE notifyq.task t
        SET watched = true, parked = v.why, withheld = v.why IS NOT NULL,
            waiting_on = CASE v.why WHEN 'order' THEN 'order:' || t.order_key WHEN 'queue' THEN 'queue:' || t.queue
                                  WHEN 'limit' THEN 'limit:' || t.limit_key WHEN 'rate' THEN 'limit:' || t.limit_key END,
            admitted_at = CASE WHEN v.why IS NULL THEN t.processing_at END,
            worker = CASE WHEN v.why IS NULL THEN t.worker END,
            attempts = t.attempts - (v.why IS NOT NULL)::integer
        FROM verdict v
        WHERE t.id = ANY (ARRAY[v.id])
        RETURNING t.id, t.parked, t.queue, t.limit_key, v.limit_rate, v.limit_seconds
    ), noted AS (
        INSERT INTO notifyq.rate_log AS known (key, at, n, seconds)
        SELECT s.key, moment, count(*),
               greatest(max(s.seconds), (SELECT max(old.seconds) FROM notifyq.rate_log old WHERE old.key = s.key))
        FROM (SELECT 'limit:' || w.limit_key AS key, w.limit_seconds AS seconds FROM written w
              WHERE w.parked IS NULL AND w.limit_key IS NOT NULL AND w.limit_rate IS NOT NULL AND w.limit_seconds IS NOT NULL
              UNION ALL
              SELECT 'queue:' || w.queue, q.limit_seconds FROM written w JOIN queues q ON q.name = w.queue
              WHERE w.parked IS NULL AND q.limit_rate IS NOT NULL AND q.limit_seconds IS NOT NULL) AS s
        GROUP BY s.key
        -- Only a clock that was set back says the same time twice.
        ON CONFLICT (key, at) DO UPDATE
        SET n = known.n + excluded.n, seconds = greatest(known.seconds, excluded.seconds)
    )
    SELECT array_agg(w.id), array_agg(w.parked) INTO judged_ids, judged_why FROM written w;
    DELETE FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at < moment - make_interval(secs => s.seconds);
    PERFORM notifyq.grant_slots(keys);
    RETURN QUERY SELECT * FROM unnest(judged_ids, judged_why) UNION ALL SELECT c, 'cancelled' FROM unnest(cancelled) AS c;
END $$;

-- Take up to `most` rows of notifyq.slot_released, and fill their keys. Returns how many tasks became ready, or scheduled.
CREATE FUNCTION notifyq.release_waiters(most integer DEFAULT 1000) RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    taken bigint[];
    ended bigint[];
    keys text[];
    ready integer;
BEGIN
    WITH batch AS MATERIALIZED (
        SELECT f.* FROM notifyq.slot_released f ORDER BY f.n LIMIT most FOR UPDATE SKIP LOCKED
    )
    SELECT (SELECT array_agg(s.n) FROM batch s),
           (SELECT array_agg(s.task) FROM batch s WHERE s.ended),
           (SELECT array_agg(DISTINCT v.k)
            FROM batch s
            CROSS JOIN LATERAL (VALUES ('order:' || s.order_key), ('limit:' || s.limit_key),
                (CASE WHEN EXISTS (SELECT FROM notifyq.queue q WHERE q.name = s.queue)
                        OR EXISTS (SELECT FROM notifyq.task t WHERE t.waiting_on = 'queue:' || s.queue)
                      THEN 'queue:' || s.queue END)) AS v (k)
            WHERE v.k IS NOT NULL)
    INTO taken, ended, keys;
    IF taken IS NULL AND NOT EXISTS (SELECT FROM notifyq.dependency d WHERE NOT d.confirmed) THEN
        RETURN 0;
    END IF;
    PERFORM notifyq.lock_keys(keys);
    ready := notifyq.grant_slots(keys);
    IF EXISTS (SELECT FROM notifyq.dependency d WHERE d.needs = ANY (ended) OR NOT d.confirmed) THEN
        ready := ready + notifyq.release_dependents(ended);
    END IF;
    DELETE FROM notifyq.slot_released f WHERE f.n = ANY (taken);
    RETURN ready;
END $$;

-- The safety net: have up to `most` keys filled at which tasks wait, from key `since` on. Returns the last of them; null:
-- there are no more.
CREATE FUNCTION notifyq.recheck_waiting(since text DEFAULT '', most integer DEFAULT 200) RETURNS text LANGUAGE sql BEGIN ATOMIC
    WITH RECURSIVE waiting AS (
        (SELECT t.waiting_on, t.id, t.queue, t.order_key, t.limit_key, 1 AS n FROM notifyq.task t
         WHERE t.waiting_on > $1 AND t.withheld ORDER BY t.waiting_on LIMIT 1)
        UNION ALL
        SELECT u.* FROM waiting w CROSS JOIN LATERAL (
            SELECT t.waiting_on, t.id, t.queue, t.order_key, t.limit_key, w.n + 1 FROM notifyq.task t
            WHERE t.waiting_on > w.waiting_on AND t.withheld ORDER BY t.waiting_on LIMIT 1) AS u
        WHERE w.n < $2
    ), told AS (
        INSERT INTO notifyq.slot_released (task, ended, queue, order_key, limit_key)
        SELECT w.id, false, w.queue, w.order_key, w.limit_key FROM waiting w
        RETURNING 1
    )
    SELECT max(w.waiting_on) FROM waiting w HAVING count(*) = $2;
END;

-- After
-- -----
-- A task with `after` is judged once, when it is first claimed. What it waits for is then in one of three places:
--
--     live        its row gets watched = true, so that its end leaves a row in notifyq.slot_released, and a row of
--                 notifyq.dependency says who waits for it. The mark and the waiter's being parked commit together, with
--                 the marked row locked meanwhile against its end: so no end can fall in between
--     locked      by somebody whose transaction may stay open for an hour, or who is just ending it. Nobody waits for him:
--                 the row of notifyq.dependency is not confirmed, and each free, and a worker's heartbeat, tries again
--     gone        it has ended, or was never there: see notifyq.finished. What isn't known there counts as done
--
-- The end of one deletes its rows of dependency. Who then has none left is ready, and its `after` is NULL: whatever
-- happens to those tasks from now on, a retry say, is nothing to it. The ids stay among its options. One of them that is
-- dead or was cancelled cancels who waits, and those who wait for that one in turn; unless on_dead is 'run'. What a person
-- retries waits once more, for what lives by then, and runs whatever has become of the others.
--
-- An id can only be waited for when it exists, and is lower than that of who waits: so there are no circles.

-- Have the ends of these told, as far as they live and nobody has locked them: those are returned, and live until the
-- transaction's end.
CREATE FUNCTION notifyq.watch_ends(ids bigint[]) RETURNS bigint[] LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    UPDATE notifyq.task t SET watched = true
    WHERE t.id = ANY (ARRAY(
        SELECT d.id FROM notifyq.task d WHERE d.id = ANY (ids) AND NOT d.watched FOR NO KEY UPDATE SKIP LOCKED));
    RETURN ARRAY(SELECT d.id FROM notifyq.task d WHERE d.id = ANY (ids) AND d.watched FOR KEY SHARE SKIP LOCKED);
END $$;

-- Of tasks that this worker has just claimed, and that have `after`: who has to wait, and who was cancelled, as one that it
-- waited for is dead. The others have waited for theirs.
CREATE FUNCTION notifyq.await_predecessors(worker integer, ids bigint[], attempts smallint[],
                                    OUT waiting bigint[], OUT cancelled bigint[]) LANGUAGE plpgsql SET search_path = pg_catalog AS $$
#variable_conflict use_column
DECLARE
    judged bigint[];
    needed bigint[];
    held bigint[];
BEGIN
    waiting := '{}';
    cancelled := '{}';
    SELECT array_agg(m.id) INTO judged
    FROM (SELECT t.id
          FROM unnest(await_predecessors.ids, await_predecessors.attempts) AS o (id, attempt)
          JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
          WHERE t.worker IS NOT DISTINCT FROM await_predecessors.worker AND t.attempts = o.attempt AND t.after IS NOT NULL
          FOR UPDATE OF t SKIP LOCKED) AS m;
    IF judged IS NULL THEN
        RETURN;
    END IF;
    FOR n IN 1..3 LOOP
        needed := ARRAY(
            SELECT d.id
            FROM (SELECT DISTINCT a.id FROM notifyq.task t CROSS JOIN unnest(t.after) AS a (id) WHERE t.id = ANY (judged)) AS a
            JOIN notifyq.task d ON d.id = ANY (ARRAY[a.id]));
        EXIT WHEN needed = '{}';
        held := notifyq.watch_ends(needed);
        EXIT WHEN cardinality(held) = cardinality(needed) OR n = 3;
        PERFORM pg_sleep(0.003);  -- mostly somebody is just claiming it, or ending it
    END LOOP;
    IF needed <> '{}' THEN
        -- Whatever is gone by now isn't waited for.
        INSERT INTO notifyq.dependency (needs, task, confirmed)
        SELECT d.id, t.id, false
        FROM notifyq.task t
        CROSS JOIN unnest(t.after) AS a (id)
        JOIN notifyq.task d ON d.id = ANY (ARRAY[a.id])
        WHERE t.id = ANY (judged)
        ON CONFLICT DO NOTHING;
        UPDATE notifyq.dependency d SET confirmed = true
        WHERE d.needs = ANY (held) AND d.task = ANY (judged) AND NOT d.confirmed;
    END IF;
    cancelled := notifyq.cancel_dependents(ARRAY(
        SELECT t.id FROM notifyq.task t WHERE t.id = ANY (judged) AND t.options ->> 'on_dead' IS DISTINCT FROM 'run'));
    waiting := ARRAY(SELECT DISTINCT d.task FROM notifyq.dependency d WHERE d.task = ANY (judged));
    UPDATE notifyq.task t SET after = NULL WHERE t.id = ANY (judged) AND t.id <> ALL (waiting);
END $$;

-- Cancel those of these tasks, whose rows are locked by now, of which one that they wait for is dead or was cancelled.
-- Returns them.
CREATE FUNCTION notifyq.cancel_dependents(ids bigint[]) RETURNS bigint[] LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    cancelled bigint[];
BEGIN
    DELETE FROM notifyq.finished f
    WHERE f.id = ANY (ids) AND EXISTS (SELECT FROM notifyq.task t WHERE t.id = f.id);  -- of older tasks with these ids
    WITH bad AS MATERIALIZED (
        SELECT DISTINCT ON (t.id) t.id, 'task ' || f.id || ' (' || left(f.type, 200) || '), which it was to run after, '
                                  || CASE f.state WHEN 'dead' THEN 'is dead' ELSE 'was cancelled' END AS error
        FROM notifyq.task t
        CROSS JOIN unnest(t.after) AS a (id)
        JOIN notifyq.finished f ON f.id = ANY (ARRAY[a.id])
        WHERE t.id = ANY (ids) AND f.state <> 'done'
          AND NOT EXISTS (SELECT FROM notifyq.task d WHERE d.id = f.id)  -- an older task may have had the same id
        ORDER BY t.id, f.id
    ), gone AS (
        DELETE FROM notifyq.task t USING bad b WHERE t.id = ANY (ARRAY[b.id]) RETURNING t.*, b.error
    ), kept AS (
        INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts, max_attempts,
                                      state, queue, type, worker, payload, result, errors, options)
        SELECT g.id, g.created_at, g.run_at, g.processing_at, clock_timestamp(), g.priority, g.attempts - g.claims,
               g.max_attempts, 'cancelled', g.queue, g.type, NULL, g.payload, NULL,
               notifyq.append_error(g.errors, jsonb_build_object('attempt', g.attempts - g.claims, 'at', clock_timestamp(),
                                                               'error', g.error)), g.options
        FROM (SELECT g.*, (g.worker IS NOT NULL)::integer AS claims FROM gone g) AS g
        RETURNING id
    )
    SELECT array_agg(k.id) INTO cancelled FROM kept k;
    DELETE FROM notifyq.dependency d WHERE d.task = ANY (cancelled);
    RETURN coalesce(cancelled, '{}');
END $$;

-- These have ended: have those that waited for them, and wait for nothing else, ready, or cancelled. Returns how many
-- are ready. It looks at those too that could not be marked.
CREATE FUNCTION notifyq.release_dependents(ended bigint[]) RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    needed bigint[];
    held bigint[];
    gone bigint[];
    mine bigint[];
    locked bigint[];
    stuck bigint[];
    ready integer;
    total integer := 0;
    most CONSTANT bigint := 33554432;  -- bytes of payloads that are moved to the history
    moved bigint := 0;
BEGIN
    -- One at a time, or of two that each end one of a task's last two, neither would see that none is left. The lock
    -- comes after those of keys, and is had by nobody else.
    PERFORM FROM notifyq.key_lock g WHERE g.n = -1 FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO notifyq.key_lock (n) VALUES (-1) ON CONFLICT (n) DO NOTHING;
        PERFORM FROM notifyq.key_lock g WHERE g.n = -1 FOR UPDATE;
    END IF;
    LOOP
        needed := ARRAY(
            SELECT d.needs FROM notifyq.dependency d WHERE d.needs = ANY (ended)
            UNION SELECT d.needs FROM notifyq.dependency d WHERE NOT d.confirmed);
        EXIT WHEN needed = '{}';
        held := notifyq.watch_ends(needed);  -- also of what has ended, and was retried before anybody came to look
        UPDATE notifyq.dependency d SET confirmed = true WHERE d.needs = ANY (held) AND NOT d.confirmed;
        gone := ARRAY(
            SELECT n FROM unnest(needed) AS n WHERE NOT EXISTS (SELECT FROM notifyq.task t WHERE t.id = n));
        UPDATE notifyq.dependency d SET confirmed = false
        WHERE d.confirmed AND d.needs = ANY (ARRAY(
            SELECT unnest(needed) EXCEPT SELECT unnest(held) EXCEPT SELECT unnest(gone)));
        mine := ARRAY(
            SELECT t.id FROM notifyq.task t
            WHERE t.id = ANY (ARRAY(SELECT DISTINCT d.task FROM notifyq.dependency d WHERE d.needs = ANY (gone)))
            ORDER BY t.id FOR UPDATE SKIP LOCKED);
        IF EXISTS (SELECT FROM notifyq.finished f WHERE f.id = ANY (gone) AND f.state <> 'done') THEN
            locked := mine;
            SELECT coalesce(array_agg(m.id), '{}'), coalesce(sum(m.size), 0) + moved INTO mine, moved
            FROM (SELECT t.id, pg_column_size(t.payload) AS size,
                         sum(pg_column_size(t.payload)) OVER (ORDER BY t.id) - pg_column_size(t.payload) AS before
                  FROM notifyq.task t WHERE t.id = ANY (mine)) AS m
            WHERE m.before + moved < most;
            IF cardinality(mine) < cardinality(locked) THEN
                INSERT INTO notifyq.slot_released (task, ended, queue) VALUES (0, false, '');  -- so that there is a next time
            END IF;
        END IF;
        stuck := ARRAY(  -- somebody has locked them, or they are too large together: next time
            SELECT t.id FROM notifyq.task t
            WHERE t.id = ANY (ARRAY(SELECT DISTINCT d.task FROM notifyq.dependency d WHERE d.needs = ANY (gone)))
            EXCEPT SELECT unnest(mine));
        UPDATE notifyq.dependency d SET confirmed = false WHERE d.confirmed AND d.needs = ANY (gone) AND d.task = ANY (stuck);
        ended := '{}';
        IF EXISTS (SELECT FROM notifyq.finished f WHERE f.id = ANY (gone) AND f.state <> 'done') THEN
            ended := notifyq.cancel_dependents(ARRAY(
                SELECT t.id FROM notifyq.task t
                WHERE t.id = ANY (mine) AND t.parked = 'after' AND t.worker IS NULL
                  AND t.options ->> 'on_dead' IS DISTINCT FROM 'run'));
        END IF;
        DELETE FROM notifyq.dependency d WHERE d.needs = ANY (gone) AND d.task <> ALL (stuck);
        UPDATE notifyq.task t
        SET after = NULL, parked = NULL, withheld = false, run_at = clock_timestamp(), promoted = true
        WHERE t.id = ANY (mine) AND t.parked = 'after' AND t.worker IS NULL
          AND NOT EXISTS (SELECT FROM notifyq.dependency d WHERE d.task = t.id);
        GET DIAGNOSTICS ready = ROW_COUNT;
        total := total + ready;
        EXIT WHEN ended = '{}';
    END LOOP;
    RETURN total;
END $$;

-- Queues at run time
-- ------------------
-- Workers read notifyq.queue at least four times a second while they claim, and when the bell says 'queues'.

-- Nothing new starts from there; what runs goes on. Returns whether it was running.
CREATE FUNCTION notifyq.pause(queue text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    WITH changed AS (
        INSERT INTO notifyq.queue AS q (name, paused) VALUES ($1, true)
        ON CONFLICT (name) DO UPDATE SET paused = true WHERE NOT q.paused
        RETURNING notifyq.notify_unless_full('notifyq', 'queues')
    )
    SELECT EXISTS (SELECT FROM changed);
END;

CREATE FUNCTION notifyq.resume(queue text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    WITH changed AS (
        UPDATE notifyq.queue q SET paused = false WHERE q.name = $1 AND q.paused
        RETURNING notifyq.notify_unless_full('notifyq', 'queues')
    )
    SELECT EXISTS (SELECT FROM changed)
    FROM (SELECT notifyq.recheck_waiting('', 10000) FROM changed UNION ALL SELECT NULL LIMIT 1) AS told;  -- its tasks were passed over
END;

-- Of the queue's tasks at most `running` run at once, and at most `rate` start in any `seconds`, over all workers; null:
-- no such limit. What runs already counts.
CREATE FUNCTION notifyq.limit_queue(queue text, running integer DEFAULT NULL, rate integer DEFAULT NULL,
                                    seconds float8 DEFAULT NULL) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF (rate IS NULL) <> (seconds IS NULL) THEN
        RAISE EXCEPTION 'rate and seconds go together: so many starts in any so many seconds' USING ERRCODE = '22023';
    END IF;
    INSERT INTO notifyq.queue AS q (name, limit_running, limit_rate, limit_seconds) VALUES ($1, $2, $3, $4)
    ON CONFLICT (name) DO UPDATE SET limit_running = $2, limit_rate = $3, limit_seconds = $4;
    PERFORM notifyq.admit_running(ARRAY[$1]);
    INSERT INTO notifyq.slot_released (task, ended, queue) VALUES (0, false, $1);  -- there may be room now
    PERFORM notifyq.notify_unless_full('notifyq', 'queues');
END $$;

-- What runs in these queues, and was claimed by somebody who knew of no limit, counts from now on.
CREATE FUNCTION notifyq.admit_running(queues text[], worker integer DEFAULT NULL) RETURNS void LANGUAGE sql BEGIN ATOMIC
    UPDATE notifyq.task SET admitted_at = processing_at, watched = true
    WHERE id = ANY (ARRAY(
        SELECT t.id FROM notifyq.task t
        WHERE t.worker IS NOT NULL AND t.queue = ANY ($1) AND ($2 IS NULL OR t.worker = $2)
          AND t.admitted_at IS DISTINCT FROM t.processing_at
          AND t.limit_key IS NULL AND t.order_key IS NULL AND t.after IS NULL
        ORDER BY t.id FOR UPDATE));
END;

-- Cron
-- ----
-- A row says what to enqueue when. Workers whose app has it write it when they start, and look here every 1.5 s: a slot
-- that comes within 3 s is inserted as a scheduled task, and next_at moves on to the slot after it, in one statement which
-- applies only if next_at is what it was. So each slot has one task, whoever looks, however many, whoever dies when; and
-- the timers that every scheduled task has start it at its time. Python reckons from a slot to the next (notifyq/cron.py),
-- in the row's time zone; what time it is, this server's clock says.
CREATE TABLE notifyq.cron (
    name          text        NOT NULL PRIMARY KEY CHECK (length(name) <= 200),
    expression    text        NOT NULL,                -- five fields, or six, of which the first is the second
    tz            text        NOT NULL DEFAULT 'UTC',
    type          text        NOT NULL CHECK (length(type) <= 200),
    payload       jsonb       NOT NULL DEFAULT '{}',
    queue         text        NOT NULL DEFAULT 'default' CHECK (length(queue) <= 200),
    priority      smallint    NOT NULL DEFAULT 0,
    missed        text        NOT NULL DEFAULT 'once' CHECK (missed IN ('once', 'skip')),  -- while no worker ran
    options       jsonb,                               -- the tasks': their keys and limits
    paused        boolean     NOT NULL DEFAULT false,
    -- The next slot; null: to be reckoned from now on. A time that Python can't read would end the workers that look.
    next_at       timestamptz CHECK (next_at BETWEEN '0001-01-03Z' AND '9999-12-30Z'),
    last_at       timestamptz,                         -- the last slot that was enqueued
    recent        bigint[]    NOT NULL DEFAULT '{}'    -- the tasks of the last ones, the latest first
);

-- From here on it enqueues nothing. What it has put ahead, or what waits for a free slot, is cancelled. Returns whether
-- there is such a cron. (Statements of their own, as what the first waits for must be seen by the second.)
CREATE FUNCTION notifyq.cron_pause(name text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    UPDATE notifyq.cron c SET paused = true WHERE c.name = $1;
    SELECT count(notifyq.cancel(waiting.id))
    FROM (SELECT t.id
          FROM notifyq.task t
          WHERE t.id = ANY (ARRAY(SELECT unnest(c.recent) FROM notifyq.cron c WHERE c.name = $1))
            AND t.worker IS NULL AND t.attempts = 0
          ORDER BY t.id
          FOR UPDATE) AS waiting;
    SELECT EXISTS (SELECT FROM notifyq.cron c WHERE c.name = $1);
END;

-- Go on, with the next slot from now on: those of the pause don't count as missed. Returns whether there is such a cron.
CREATE FUNCTION notifyq.cron_resume(name text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    UPDATE notifyq.cron c SET paused = false, next_at = NULL WHERE c.name = $1 AND c.paused;
    SELECT EXISTS (SELECT FROM notifyq.cron c WHERE c.name = $1);
END;

-- Run it now, paused or not, beside what is due anyway. Returns the task's id; NULL: there is no such cron.
CREATE FUNCTION notifyq.cron_run(name text) RETURNS bigint LANGUAGE sql BEGIN ATOMIC
    INSERT INTO notifyq.task (type, payload, queue, priority, options)
    SELECT c.type, c.payload, c.queue, c.priority, c.options FROM notifyq.cron c WHERE c.name = $1 RETURNING id;
END;

-- The stable way to read.
CREATE VIEW notifyq.all_tasks AS
SELECT t.id, t.queue, t.type,
       CASE WHEN t.worker IS NOT NULL THEN 'running'
            WHEN t.parked IS NOT NULL AND t.withheld OR t.run_at > t.created_at AND NOT t.promoted THEN 'scheduled'
            ELSE 'ready' END AS state,
       t.priority, t.attempts, t.max_attempts, t.created_at, t.run_at, t.processing_at, t.processed_at, t.payload,
       t.errors -> -1 ->> 'error' AS error, NULL::jsonb AS result,
       (SELECT w.name FROM notifyq.worker w WHERE w.id = t.worker) AS worker, t.errors,
       CASE WHEN t.withheld AND t.worker IS NULL THEN t.parked END AS waits_for, t.progress, t.note, t.options
FROM notifyq.task t
UNION ALL
SELECT id, queue, type, state, priority, attempts, max_attempts, created_at, run_at, processing_at, processed_at, payload,
       errors -> -1 ->> 'error', result, worker, errors, NULL, NULL, NULL, options
FROM notifyq.finished;

-- Queues: those that were paused or limited, that a worker serves, or that a task is ready or running in. `waiting` are
-- those whom the queue's own limits keep back.
CREATE VIEW notifyq.all_queues AS
WITH RECURSIVE ready AS (  -- from one queue's first entry of index task_ready to the next one's
    (SELECT t.queue FROM notifyq.task t
     WHERE t.worker IS NULL AND NOT t.withheld AND (t.run_at <= t.created_at OR t.promoted) ORDER BY t.queue LIMIT 1)
    UNION ALL
    SELECT (SELECT t.queue FROM notifyq.task t
            WHERE t.worker IS NULL AND NOT t.withheld AND (t.run_at <= t.created_at OR t.promoted) AND t.queue > r.queue
            ORDER BY t.queue LIMIT 1)
    FROM ready r WHERE r.queue IS NOT NULL
), running AS MATERIALIZED (
    SELECT t.queue, count(*) AS n FROM notifyq.task t WHERE t.worker IS NOT NULL GROUP BY t.queue
), served AS MATERIALIZED (
    SELECT u.queue, count(*) AS n FROM notifyq.worker w CROSS JOIN LATERAL unnest(w.queues) AS u (queue)
    WHERE notifyq.is_alive(w.seen_at, w.lease) GROUP BY u.queue
)
SELECT k.name, coalesce(q.paused, false) AS paused, q.limit_running, q.limit_rate, q.limit_seconds,
       coalesce(r.n, 0) AS running,
       (SELECT count(*) FROM notifyq.task t WHERE t.waiting_on = 'queue:' || k.name AND t.withheld) AS waiting,
       coalesce(s.n, 0) AS workers
FROM (SELECT q.name FROM notifyq.queue q UNION SELECT r.queue FROM ready r WHERE r.queue IS NOT NULL
      UNION SELECT r.queue FROM running r UNION SELECT s.queue FROM served s) AS k
LEFT JOIN notifyq.queue q ON q.name = k.name
LEFT JOIN running r ON r.queue = k.name
LEFT JOIN served s ON s.queue = k.name;

-- Comments, for those who look with psql: \d+ notifyq.task, \df+ notifyq.*, \dn+ notifyq
-- ----------------------------------------------------------------------------------
--
-- One for every table, view, column and function. Functions for everybody say what they do; the others are internal.

COMMENT ON SCHEMA notifyq IS
    'Background tasks: see notifyq.task, notifyq.enqueue and notifyq.all_tasks. The functions that are not internal'
    ' are for everybody.';
COMMENT ON TABLE notifyq.schema_version IS
    'The version of this schema: one row for each version that was installed or upgraded to.';
COMMENT ON COLUMN notifyq.schema_version.version IS 'The version; the highest one counts.';
COMMENT ON COLUMN notifyq.schema_version.installed_at IS 'When it was installed.';
COMMENT ON COLUMN notifyq.schema_version.serves IS 'The version of the oldest notifyq that can work with it.';
COMMENT ON TABLE notifyq.task IS
    'Live tasks: a row from the INSERT until the outcome is written. To enqueue, INSERT here, or call '
    'notifyq.enqueue. To read, use notifyq.all_tasks.';
COMMENT ON COLUMN notifyq.task.id IS 'Given by the database, in the order of INSERTs.';
COMMENT ON COLUMN notifyq.task.created_at IS 'When it was inserted.';
COMMENT ON COLUMN notifyq.task.run_at IS 'The earliest time to run it; the default is now. You may set it.';
COMMENT ON COLUMN notifyq.task.processing_at IS 'When its latest attempt was claimed.';
COMMENT ON COLUMN notifyq.task.processed_at IS 'When its latest attempt ended.';
COMMENT ON COLUMN notifyq.task.worker IS 'The id of the worker that runs it; NULL: nothing runs it.';
COMMENT ON COLUMN notifyq.task.priority IS 'Higher runs first, within a queue; the default is 0. You may set it.';
COMMENT ON COLUMN notifyq.task.attempts IS 'How often it was claimed. With worker, it identifies the lease.';
COMMENT ON COLUMN notifyq.task.max_attempts IS
    'After so many failed attempts it is dead; NULL: what its type says, else 10. You may set it.';
COMMENT ON COLUMN notifyq.task.promoted IS 'It was scheduled, and its time has come.';
COMMENT ON COLUMN notifyq.task.withheld IS
    'No claim looks at it: its type was unknown to a worker, or parked says what it waits for.';
COMMENT ON COLUMN notifyq.task.queue IS 'Its queue; the default is default. You may set it.';
COMMENT ON COLUMN notifyq.task.type IS 'The name of the kind of task, by which a handler is found. You set it.';
COMMENT ON COLUMN notifyq.task.payload IS 'What its handler gets, a JSON object. You may set it.';
COMMENT ON COLUMN notifyq.task.errors IS 'A JSON array with one object for each failed attempt.';
COMMENT ON COLUMN notifyq.task.options IS
    'A JSON object with unique_key, order_key, limit_key, after and what goes with them; NULL for most. You may set'
    ' it.';
COMMENT ON COLUMN notifyq.task.order_key IS
    'From options: of tasks with the same key one runs at a time, in the order of ids.';
COMMENT ON COLUMN notifyq.task.limit_key IS 'From options: limits count all tasks with the same key.';
COMMENT ON COLUMN notifyq.task.after IS 'From options: the ids of tasks whose ends it still waits for.';
COMMENT ON COLUMN notifyq.task.parked IS
    'What it waits for: limit, rate, queue, order or after, or crashed: until a worker runs it alone; if withheld is'
    ' false, what it was granted.';
COMMENT ON COLUMN notifyq.task.waiting_on IS 'The key at which it waits, or of which a slot is kept for it.';
COMMENT ON COLUMN notifyq.task.admitted_at IS 'Equal to processing_at: this attempt holds slots of its keys.';
COMMENT ON COLUMN notifyq.task.watched IS 'Other tasks may wait for its end, so its end adds a row to notifyq.slot_released.';
COMMENT ON COLUMN notifyq.task.awaited IS 'A client waits for its end, so its end sends a NOTIFY.';
COMMENT ON COLUMN notifyq.task.progress IS 'How far its handler says it is, from 0 to 1.';
COMMENT ON COLUMN notifyq.task.note IS 'What its handler says it is doing.';
COMMENT ON COLUMN notifyq.task.crashes IS
    'How often its worker vanished while it ran beside other tasks. These attempts don''t count against max_attempts.';
COMMENT ON COLUMN notifyq.task.crashes_alone IS
    'How often its worker vanished while it ran nothing else. These attempts count, and the third is the last.';
COMMENT ON TABLE notifyq.finished IS
    'Finished tasks. Workers delete them when they are older than their retention. To read, use notifyq.all_tasks.';
COMMENT ON COLUMN notifyq.finished.id IS 'The id of the task.';
COMMENT ON COLUMN notifyq.finished.created_at IS 'When it was inserted.';
COMMENT ON COLUMN notifyq.finished.run_at IS 'The earliest time at which it was to run.';
COMMENT ON COLUMN notifyq.finished.processing_at IS 'When its last attempt was claimed.';
COMMENT ON COLUMN notifyq.finished.processed_at IS 'When it ended.';
COMMENT ON COLUMN notifyq.finished.priority IS 'Its priority.';
COMMENT ON COLUMN notifyq.finished.attempts IS 'How many attempts there were.';
COMMENT ON COLUMN notifyq.finished.max_attempts IS 'How many were allowed; NULL: what its type says, else 10.';
COMMENT ON COLUMN notifyq.finished.state IS 'done, dead or cancelled.';
COMMENT ON COLUMN notifyq.finished.queue IS 'Its queue.';
COMMENT ON COLUMN notifyq.finished.type IS 'The name of the kind of task.';
COMMENT ON COLUMN notifyq.finished.worker IS 'host:pid of the worker that ran it last.';
COMMENT ON COLUMN notifyq.finished.payload IS 'What its handler got.';
COMMENT ON COLUMN notifyq.finished.result IS 'What its handler returned.';
COMMENT ON COLUMN notifyq.finished.errors IS 'A JSON array with one object for each failed attempt.';
COMMENT ON COLUMN notifyq.finished.options IS 'The options it was enqueued with.';
COMMENT ON TABLE notifyq.worker IS 'Workers that live, or lived a moment ago: one row and one heartbeat for each.';
COMMENT ON COLUMN notifyq.worker.id IS 'Its id, as in task.worker.';
COMMENT ON COLUMN notifyq.worker.name IS 'host:pid.';
COMMENT ON COLUMN notifyq.worker.queues IS 'The queues that it takes tasks from.';
COMMENT ON COLUMN notifyq.worker.types IS 'The task types that it has handlers for.';
COMMENT ON COLUMN notifyq.worker.max_attempts IS
    'Beside types: how many attempts each allows where the task does not say.';
COMMENT ON COLUMN notifyq.worker.concurrency IS 'How many handlers it runs at the same time.';
COMMENT ON COLUMN notifyq.worker.lease IS 'Without a heartbeat for this long it counts as dead.';
COMMENT ON COLUMN notifyq.worker.started_at IS 'When it started.';
COMMENT ON COLUMN notifyq.worker.seen_at IS 'When its last heartbeat came.';
COMMENT ON COLUMN notifyq.worker.running IS 'How many tasks it runs.';
COMMENT ON COLUMN notifyq.worker.status IS 'ok, or what is degraded, in words.';
COMMENT ON COLUMN notifyq.worker.crons IS 'The names of the crons that it looks after.';
COMMENT ON TABLE notifyq.bell IS
    'Always empty. A worker holds SHARE on it while it sleeps, and lets go when another statement waits. An '
    'enqueuer that cannot get ROW EXCLUSIVE at once sends a NOTIFY.';
COMMENT ON COLUMN notifyq.bell.nothing IS 'No row is ever stored.';
COMMENT ON TABLE notifyq.slot_released IS
    'Attempts that ended and that other tasks may wait for. A worker takes each row and lets those tasks in.';
COMMENT ON COLUMN notifyq.slot_released.n IS 'The order of the rows.';
COMMENT ON COLUMN notifyq.slot_released.task IS 'The task whose attempt ended; 0: none, look at the keys.';
COMMENT ON COLUMN notifyq.slot_released.ended IS 'True: the task is over. False: it gave up its slot and lives.';
COMMENT ON COLUMN notifyq.slot_released.queue IS 'The queue of that task.';
COMMENT ON COLUMN notifyq.slot_released.order_key IS 'The order_key of that task.';
COMMENT ON COLUMN notifyq.slot_released.limit_key IS 'The limit_key of that task.';
COMMENT ON TABLE notifyq.key_lock IS
    'Locks for keys, by hash: a worker that admits or frees tasks of a key first locks its row here.';
COMMENT ON COLUMN notifyq.key_lock.n IS 'The hash, from 0 to 255; -1 is for the ends of tasks that others wait for.';
COMMENT ON TABLE notifyq.dependency IS 'Which parked task waits for the end of which other.';
COMMENT ON COLUMN notifyq.dependency.needs IS 'The task whose end is waited for.';
COMMENT ON COLUMN notifyq.dependency.task IS 'The task that waits.';
COMMENT ON COLUMN notifyq.dependency.confirmed IS
    'True: the end of the other will add a row to notifyq.slot_released. False: look again.';
COMMENT ON TABLE notifyq.queue IS
    'Queues that were paused or limited. Change them with notifyq.pause, notifyq.resume and notifyq.limit_queue.';
COMMENT ON COLUMN notifyq.queue.name IS 'The name of the queue.';
COMMENT ON COLUMN notifyq.queue.paused IS 'True: no task starts from it.';
COMMENT ON COLUMN notifyq.queue.limit_running IS 'At most so many of its tasks run at once; NULL: no such limit.';
COMMENT ON COLUMN notifyq.queue.limit_rate IS
    'At most so many of its tasks start in limit_seconds; NULL: no such limit.';
COMMENT ON COLUMN notifyq.queue.limit_seconds IS 'The length of the window of limit_rate, in seconds.';
COMMENT ON TABLE notifyq.rate_log IS 'What has started at keys with a rate: how many, and when.';
COMMENT ON COLUMN notifyq.rate_log.key IS 'limit: and a limit_key, or queue: and the name of a queue.';
COMMENT ON COLUMN notifyq.rate_log.at IS 'When they started.';
COMMENT ON COLUMN notifyq.rate_log.n IS 'How many started then.';
COMMENT ON COLUMN notifyq.rate_log.seconds IS 'How long this row matters.';
COMMENT ON TABLE notifyq.unique_key IS
    'The newest task with each unique_key. Workers delete a row some time after the task is over and until has '
    'passed.';
COMMENT ON COLUMN notifyq.unique_key.key IS 'The unique_key.';
COMMENT ON COLUMN notifyq.unique_key.task IS 'The id of the newest task with it.';
COMMENT ON COLUMN notifyq.unique_key.enqueued_at IS 'When that task was enqueued.';
COMMENT ON COLUMN notifyq.unique_key.until IS 'The end of the longest unique_for that was asked for.';
COMMENT ON TABLE notifyq.cron IS
    'Tasks that are enqueued by the clock. Workers write the crons of their app here when they start.';
COMMENT ON COLUMN notifyq.cron.name IS 'The name of the cron.';
COMMENT ON COLUMN notifyq.cron.expression IS
    'Minute, hour, day, month and weekday; of six fields the first is the second.';
COMMENT ON COLUMN notifyq.cron.tz IS 'The time zone of the expression.';
COMMENT ON COLUMN notifyq.cron.type IS 'The type of the tasks.';
COMMENT ON COLUMN notifyq.cron.payload IS 'The payload of the tasks.';
COMMENT ON COLUMN notifyq.cron.queue IS 'The queue of the tasks.';
COMMENT ON COLUMN notifyq.cron.priority IS 'The priority of the tasks.';
COMMENT ON COLUMN notifyq.cron.missed IS 'once or skip: what to do about slots that came while no worker ran.';
COMMENT ON COLUMN notifyq.cron.options IS 'The options of the tasks: their keys and limits.';
COMMENT ON COLUMN notifyq.cron.paused IS 'True: nothing is enqueued.';
COMMENT ON COLUMN notifyq.cron.next_at IS 'The next slot; NULL: it is computed from now on.';
COMMENT ON COLUMN notifyq.cron.last_at IS 'The latest slot that was enqueued.';
COMMENT ON COLUMN notifyq.cron.recent IS 'The ids of the latest tasks, the newest first.';
COMMENT ON VIEW notifyq.all_tasks IS
    'One row for every task that is still known, finished ones included: the stable way to read tasks.';
COMMENT ON COLUMN notifyq.all_tasks.id IS 'The id of the task.';
COMMENT ON COLUMN notifyq.all_tasks.queue IS 'Its queue.';
COMMENT ON COLUMN notifyq.all_tasks.type IS 'The name of the kind of task.';
COMMENT ON COLUMN notifyq.all_tasks.state IS 'scheduled, ready, running, done, dead or cancelled.';
COMMENT ON COLUMN notifyq.all_tasks.priority IS 'Higher runs first, within a queue.';
COMMENT ON COLUMN notifyq.all_tasks.attempts IS 'How often it was claimed.';
COMMENT ON COLUMN notifyq.all_tasks.max_attempts IS
    'After so many failed attempts it is dead; NULL: what its type says, else 10.';
COMMENT ON COLUMN notifyq.all_tasks.created_at IS 'When it was inserted.';
COMMENT ON COLUMN notifyq.all_tasks.run_at IS 'The earliest time to run it.';
COMMENT ON COLUMN notifyq.all_tasks.processing_at IS 'When its latest attempt was claimed.';
COMMENT ON COLUMN notifyq.all_tasks.processed_at IS 'When its latest attempt ended.';
COMMENT ON COLUMN notifyq.all_tasks.payload IS 'What its handler gets.';
COMMENT ON COLUMN notifyq.all_tasks.error IS 'The text of the latest error.';
COMMENT ON COLUMN notifyq.all_tasks.result IS 'What its handler returned.';
COMMENT ON COLUMN notifyq.all_tasks.worker IS 'host:pid of the worker that runs it, or ran it last.';
COMMENT ON COLUMN notifyq.all_tasks.errors IS 'A JSON array with one object for each failed attempt.';
COMMENT ON COLUMN notifyq.all_tasks.waits_for IS
    'What keeps it back: limit, rate, queue, order or after; NULL: nothing.';
COMMENT ON COLUMN notifyq.all_tasks.progress IS 'How far its handler says it is, from 0 to 1.';
COMMENT ON COLUMN notifyq.all_tasks.note IS 'What its handler says it is doing.';
COMMENT ON COLUMN notifyq.all_tasks.options IS 'The options it was enqueued with.';
COMMENT ON VIEW notifyq.all_queues IS
    'Queues that were paused or limited, that a live worker serves, or that have a ready or running task.';
COMMENT ON COLUMN notifyq.all_queues.name IS 'The name of the queue.';
COMMENT ON COLUMN notifyq.all_queues.paused IS 'True: no task starts from it.';
COMMENT ON COLUMN notifyq.all_queues.limit_running IS
    'At most so many of its tasks run at once; NULL: no such limit.';
COMMENT ON COLUMN notifyq.all_queues.limit_rate IS
    'At most so many of its tasks start in limit_seconds; NULL: no such limit.';
COMMENT ON COLUMN notifyq.all_queues.limit_seconds IS 'The length of the window of limit_rate, in seconds.';
COMMENT ON COLUMN notifyq.all_queues.running IS 'How many of its tasks run.';
COMMENT ON COLUMN notifyq.all_queues.waiting IS 'How many of its tasks the limits of the queue keep back.';
COMMENT ON COLUMN notifyq.all_queues.workers IS 'How many live workers serve it.';
COMMENT ON FUNCTION notifyq.enqueue(text, jsonb, text, timestamptz, integer, integer, jsonb) IS
    'Enqueue a task. Returns its id; for a unique task that is not inserted, the id of the other. NULL means the '
    'default, for all but type. It cannot be in a transaction that is to be prepared for two-phase commit; see '
    'notifyq.two_phase in docs/transactions.md.';
COMMENT ON FUNCTION notifyq.cancel(bigint) IS 'Cancel a live task, a running one too. Returns whether it was live.';
COMMENT ON FUNCTION notifyq.retry(bigint) IS
    'Run a task again, now: a dead or cancelled one with all its attempts, a scheduled one at once. Returns whether'
    ' it did.';
COMMENT ON FUNCTION notifyq.pause(text) IS
    'Start nothing more from a queue; what runs goes on. Returns whether the queue was running.';
COMMENT ON FUNCTION notifyq.resume(text) IS
    'Start tasks from a paused queue again. Returns whether the queue was paused.';
COMMENT ON FUNCTION notifyq.limit_queue(text, integer, integer, float8) IS
    'Limit a queue over all workers: at most so many running at once, and at most so many starts in so many '
    'seconds. NULL: no such limit.';
COMMENT ON FUNCTION notifyq.cron_pause(text) IS
    'Stop a cron, and cancel what it has enqueued and nothing has claimed. Returns whether there is such a cron.';
COMMENT ON FUNCTION notifyq.cron_resume(text) IS
    'Let a paused cron go on, with its next slot from now. Returns whether there is such a cron.';
COMMENT ON FUNCTION notifyq.cron_run(text) IS
    'Enqueue the task of a cron now. Returns its id; NULL: there is no such cron.';
COMMENT ON FUNCTION notifyq.ring() IS 'Internal: trigger ring, which wakes a worker if one sleeps.';
COMMENT ON FUNCTION notifyq.on_task_deleted() IS
    'Internal: trigger on_task_deleted, which tells of the ends of tasks that others wait for.';
COMMENT ON FUNCTION notifyq.apply_options() IS
    'Internal: trigger apply_options, which checks the options of a new task and applies them.';
COMMENT ON FUNCTION notifyq.notify_unless_full(text, text) IS 'Internal: NOTIFY, unless the queue of notifications is nearly full.';
COMMENT ON FUNCTION notifyq.note_lease_given_up(notifyq.task) IS
    'Internal: adds a row to notifyq.slot_released for a task that gave up its slot.';
COMMENT ON FUNCTION notifyq.append_error(jsonb, jsonb) IS
    'Internal: adds an entry to a task''s errors, and keeps them bounded.';
COMMENT ON FUNCTION notifyq.claim_unique_key(notifyq.task) IS
    'Internal: whether a new task may be inserted, by its unique_key.';
COMMENT ON FUNCTION notifyq.find_unique_task(text) IS 'Internal: the newest task with a unique_key.';
COMMENT ON FUNCTION notifyq.take_turn(integer, integer) IS 'Internal: waits for the turn of a fleet of workers.';
COMMENT ON FUNCTION notifyq.fall_asleep(integer) IS 'Internal: waits for SHARE on notifyq.bell.';
COMMENT ON FUNCTION notifyq.bell_wanted() IS 'Internal: whether a statement waits for a lock on notifyq.bell.';
COMMENT ON FUNCTION notifyq.lock_keys(text[]) IS 'Internal: locks the rows of notifyq.key_lock for keys.';
COMMENT ON FUNCTION notifyq.choose_fitting(bigint[], text[], text[], integer[], integer[], integer) IS
    'Internal: which claimable tasks fit into the free threads of a worker.';
COMMENT ON FUNCTION notifyq.is_alive(timestamptz, interval) IS 'Internal: whether a worker is alive, by its heartbeat.';
COMMENT ON FUNCTION notifyq.inline_payload(jsonb, integer) IS 'Internal: a payload that is short enough for a claim.';
COMMENT ON FUNCTION notifyq.decompress_payload(jsonb, integer) IS 'Internal: a compressed payload, if it is short enough.';
COMMENT ON FUNCTION notifyq.needs_admission(text, text, bigint[]) IS 'Internal: whether a task has a key or predecessors.';
COMMENT ON FUNCTION notifyq.readable_time(timestamptz) IS 'Internal: a time within the bounds of Python.';
COMMENT ON FUNCTION notifyq.place_in_order(smallint, text, boolean, timestamptz, timestamptz, integer) IS
    'Internal: whether a task may be the next of its order_key, runs, or has no place in the order yet.';
COMMENT ON FUNCTION notifyq.grant_slots(text) IS 'Internal: grants the free slots of a key to tasks that wait at it.';
COMMENT ON FUNCTION notifyq.grant_slots(text[]) IS 'Internal: grants the free slots of keys to tasks that wait at them.';
COMMENT ON FUNCTION notifyq.parse_limits(jsonb) IS 'Internal: the limits in a task''s options.';
COMMENT ON FUNCTION notifyq.count_reserved(text, timestamptz, bigint[]) IS
    'Internal: how many slots of a key are kept for granted tasks.';
COMMENT ON FUNCTION notifyq.has_waiters(text) IS 'Internal: whether a task waits at a key.';
COMMENT ON FUNCTION notifyq.admit(integer, bigint[], smallint[]) IS
    'Internal: which claimed tasks may run; it parks the others.';
COMMENT ON FUNCTION notifyq.release_waiters(integer) IS 'Internal: lets in tasks that waited for what notifyq.slot_released tells of.';
COMMENT ON FUNCTION notifyq.recheck_waiting(text, integer) IS 'Internal: has keys at which tasks wait looked at again.';
COMMENT ON FUNCTION notifyq.watch_ends(bigint[]) IS 'Internal: has the ends of tasks told.';
COMMENT ON FUNCTION notifyq.await_predecessors(integer, bigint[], smallint[]) IS
    'Internal: which claimed tasks have to wait for the ends of others.';
COMMENT ON FUNCTION notifyq.cancel_dependents(bigint[]) IS
    'Internal: cancels tasks that wait for one which is dead or was cancelled.';
COMMENT ON FUNCTION notifyq.release_dependents(bigint[]) IS 'Internal: lets in tasks that waited for the ends of others.';
COMMENT ON FUNCTION notifyq.admit_running(text[], integer) IS
    'Internal: counts running tasks of queues whose limit is new.';

-- Roles. Nothing is granted to anybody; give each of your roles what it needs:
--
--   may enqueue   GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT INSERT (type, payload, queue, priority, run_at, max_attempts, options) ON notifyq.task TO r;
--                 GRANT SELECT (id, created_at) ON notifyq.task TO r;
--                 GRANT INSERT ON notifyq.bell TO r;  -- lets it lock, and the table takes no row. Without it: always rings
--   with keys     GRANT SELECT, INSERT, UPDATE ON notifyq.unique_key TO r;  -- beside these, to enqueue unique tasks
--                 GRANT SELECT (id, state) ON notifyq.all_tasks TO r;
--                 GRANT SELECT (worker, options), UPDATE (note) ON notifyq.task TO r;  -- UPDATE, to lock
--                 GRANT SELECT (withheld, waiting_on), UPDATE (type, payload, run_at, promoted) ON notifyq.task TO r;  -- to replace, move
--   may read      GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT SELECT ON notifyq.all_tasks, notifyq.all_queues, notifyq.worker, notifyq.queue, notifyq.cron TO r;
--                 GRANT SELECT ON notifyq.schema_version TO r;
--   may await     GRANT USAGE ON SCHEMA notifyq TO r;  -- results and progress
--                 GRANT SELECT ON notifyq.all_tasks TO r;
--                 GRANT SELECT (id, awaited), UPDATE (awaited) ON notifyq.task TO r;
--   operator      GRANT USAGE ON SCHEMA notifyq TO r;  -- pause, resume and limit queues; retry and cancel tasks; crons
--                 GRANT SELECT ON ALL TABLES IN SCHEMA notifyq TO r;
--                 GRANT INSERT, DELETE, UPDATE (run_at, promoted, admitted_at, watched) ON notifyq.task TO r;
--                 GRANT INSERT, DELETE ON notifyq.finished TO r;
--                 GRANT INSERT ON notifyq.slot_released, notifyq.bell TO r;
--                 GRANT INSERT, UPDATE ON notifyq.queue TO r;
--                 GRANT DELETE, UPDATE (paused, next_at) ON notifyq.cron TO r;
--   worker        GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT ALL ON ALL TABLES IN SCHEMA notifyq TO r; GRANT ALL ON ALL SEQUENCES IN SCHEMA notifyq TO r;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA notifyq FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA notifyq TO PUBLIC;  -- each runs with its caller's rights, and no more
