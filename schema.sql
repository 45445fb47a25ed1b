-- notifyq: background tasks in PostgreSQL 14 to 18. No extension, no superuser, one fixed schema.
--
-- The life of a task
-- ------------------
-- A task is a row of notifyq.task from its INSERT until its outcome is written; then, if outcomes are kept, a row of
-- notifyq.finished until it is pruned.
--
--     INSERT          --> ready, or scheduled if its run_at lies in the future
--     scheduled       --promote--> ready
--     ready           --claim--> running
--     running         --settle--> finished: done, dead or cancelled
--     running         --settle--> scheduled, after a failed attempt that is to be tried again
--     running         --hand back, rescue--> ready
--     claimed         --park--> waits for a limit, its turn, or other tasks (chapters 6 and 7) --release--> ready
--     any live task   --cancel()--> finished: cancelled
--     dead, cancelled --retry()--> ready
--
-- Workers claim ready tasks, run their handlers, and settle them: they write how the attempt ended. The lease of a
-- running task is (worker, attempts). Each claim raises attempts (up to 32767), and each later write of a worker names
-- both and says whether it applied. So a worker that was given up for dead never settles a task that runs elsewhere.
--
-- Chapters
-- --------
--     1 Tasks               the tables task and finished; where a task stands; enqueue; errors
--     2 Workers             the table worker; tasks whose worker vanished
--     3 The bell            how an INSERT wakes a worker, and why no wake-up is lost
--     4 Cancel, retry       by a person or a program
--     5 Options and unique  the column options; one task with a unique_key
--     6 Limits and order    at most N tasks with a limit_key or in a queue; one at a time with an order_key
--     7 After               tasks that wait for the ends of others
--     8 Queues              pause, resume, limit
--     9 Cron                tasks that are enqueued by the clock
--    10 Views               all_tasks and all_queues: the stable way to read
--    11 Claims              what a claim returns of a task
--    12 Roles               the GRANTs
--
-- The first four chapters concern every task. Chapters 5 to 7 concern tasks with options, and tasks in queues with a
-- limit. Other tasks touch the tables and columns of these chapters only if they crash twice, or if another task waits
-- for their end.
--
-- What a user of the database may call: enqueue, cancel, retry; pause, resume and limit_queue of queues; cron_pause,
-- cron_resume and cron_run. All other functions are internal. Each object has a comment: \dt+, \dv+, \df+ notifyq.*,
-- and \d+ notifyq.task for its columns.
--
-- Three conventions hold in all chapters:
--
--   * Every table whose rows are updated or deleted has a primary key. In a publication, which may be one FOR ALL
--     TABLES that was not made for notifyq, PostgreSQL refuses the UPDATE or DELETE of a table without one.
--   * No function looks a name up by its caller's search_path. BEGIN ATOMIC has names looked up when the function is
--     created, which costs a call nothing; the others set search_path, or qualify every function, operator and type.
--     search_path ends with pg_temp: unless it is named, PostgreSQL looks for types among temporary tables first.
--   * Plans are cached, and may be made when a table is empty, or with the statistics of another moment. So where many
--     ids are given, each row is looked up by `id = ANY (ARRAY[x])`: with `id = x` the planner may choose to read a
--     whole table, or another index. For a single id both get the same plan. A plan for an empty table reads it whole
--     either way, unless enable_seqscan is off: it is in the sessions of workers, and in the functions that other
--     sessions call for each of many tasks (cancel, retry, write_outcome, apply_options, find_unique_task).

CREATE SCHEMA notifyq;
COMMENT ON SCHEMA notifyq IS
    'Background tasks: see notifyq.task, notifyq.enqueue and notifyq.all_tasks. The functions that are not internal'
    ' are for all users.';

CREATE TABLE notifyq.schema_version (
    version      integer     NOT NULL PRIMARY KEY,
    installed_at timestamptz NOT NULL DEFAULT now(),
    serves       integer     NOT NULL
);
INSERT INTO notifyq.schema_version (version, serves) VALUES (1, 1);

COMMENT ON TABLE notifyq.schema_version IS
    'The version of this schema: one row for each version that was installed or upgraded to.';
COMMENT ON COLUMN notifyq.schema_version.version IS 'The version; the highest one counts.';
COMMENT ON COLUMN notifyq.schema_version.installed_at IS 'When it was installed.';
COMMENT ON COLUMN notifyq.schema_version.serves IS 'The version of the oldest notifyq that can work with it.';

-- =====================================================================================================================
-- 1 Tasks
-- =====================================================================================================================
--
-- Six columns of a live task say where it stands. The first of these that fits counts:
--
--     worker set                           running: that worker holds the lease
--     withheld, parked null                unhandled: ready, but a worker that claimed it had no handler for its type.
--                                          It is left to a worker that has one
--     withheld, parked set                 parked: `parked` says what it waits for (chapters 2, 6, 7)
--     run_at <= created_at, or promoted    ready: in the index that claims read
--     none of these                        scheduled: in the index that timers read
--
-- Withheld tasks have indexes of their own, so that claims needn't step over them. On a task that isn't withheld,
-- `parked` says what it was granted (chapter 6). The view all_tasks calls parked tasks scheduled.
--
-- A plain INSERT decides by itself whether its row is ready, since run_at and created_at have defaults; that needs no
-- row trigger. The claims' index never holds a future, a running or a finished task, so what a claim costs depends on
-- none of them.
--
-- A row whose payload doesn't fit its task type, or with an impossible task type, can be inserted: a worker finds it,
-- and the task ends dead with a message. A constraint would abort the enqueuer's whole transaction instead, and would
-- cost every INSERT: PostgreSQL parses a CHECK or a trigger's WHEN anew for every statement, at 4 000 to 5 000
-- instructions for each column, operator and constant in it, and a whole INSERT takes 170 000. Only wrong options, NULL
-- in a column that is NOT NULL, and values of another data type are refused.

CREATE TABLE notifyq.task (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_at        timestamptz NOT NULL DEFAULT now(),  -- now(), the transaction's start, is never after created_at
    processing_at timestamptz,
    processed_at  timestamptz,
    worker        integer,
    priority      smallint    NOT NULL DEFAULT 0,
    attempts      smallint    NOT NULL DEFAULT 0,
    max_attempts  smallint,                            -- below 1 is 1
    promoted      boolean     NOT NULL DEFAULT false,
    withheld      boolean     NOT NULL DEFAULT false,
    queue         text        NOT NULL DEFAULT 'default',
    type          text        NOT NULL,
    payload       jsonb       NOT NULL DEFAULT '{}',
    errors        jsonb,                               -- see append_error()
    options       jsonb,                               -- apply_options() takes the next four columns from it
    order_key     text,
    limit_key     text,
    after         bigint[],
    expires_at    timestamptz,
    parked        text,                                -- limit, rate, queue, order, after or crashed
    waiting_on    text,                                -- the key, for all of these but after
    admitted_at   timestamptz,
    watched       boolean     NOT NULL DEFAULT false,
    awaited       boolean     NOT NULL DEFAULT false,
    progress      real,
    note          text,
    crashes       smallint,
    crashes_alone smallint
) WITH (
    fillfactor = 90,
    -- A queue replaces all its rows within seconds. So vacuum early, at full speed, indexes included. Never truncate:
    -- that takes an exclusive lock to give back pages which the next burst needs.
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.5, autovacuum_analyze_threshold = 10000,
    vacuum_index_cleanup = on, vacuum_truncate = off
);

COMMENT ON TABLE notifyq.task IS
    'Live tasks: a row from the INSERT until the outcome is written. To enqueue, INSERT here, or call '
    'notifyq.enqueue. To read, use notifyq.all_tasks.';
COMMENT ON COLUMN notifyq.task.id IS 'Given by the database, in the order of INSERTs.';
COMMENT ON COLUMN notifyq.task.created_at IS 'When it was inserted.';
COMMENT ON COLUMN notifyq.task.run_at IS
    'The earliest time to run it; the default is now. You may set it. A further attempt, notifyq.retry, on_conflict'
    ' move, and the end of a wait overwrite it.';
COMMENT ON COLUMN notifyq.task.processing_at IS 'When its latest attempt was claimed.';
COMMENT ON COLUMN notifyq.task.processed_at IS 'When its latest attempt ended.';
COMMENT ON COLUMN notifyq.task.worker IS 'The id of the worker that runs it; NULL: no worker runs it.';
COMMENT ON COLUMN notifyq.task.priority IS 'Higher runs first, within a queue; the default is 0. You may set it.';
COMMENT ON COLUMN notifyq.task.attempts IS
    'How many attempts have begun; a claim that was parked, handed back or left to another worker does not count. With'
    ' worker, it identifies the lease.';
COMMENT ON COLUMN notifyq.task.max_attempts IS
    'After this many failed attempts it is dead; NULL: as many as its type says, else 10. You may set it.';
COMMENT ON COLUMN notifyq.task.promoted IS 'It was scheduled, and its time has come.';
COMMENT ON COLUMN notifyq.task.withheld IS
    'Claims leave it alone: a worker had no handler for its type, or it waits for what parked says.';
COMMENT ON COLUMN notifyq.task.queue IS 'Its queue; the default is default. You may set it.';
COMMENT ON COLUMN notifyq.task.type IS 'The name of the kind of task, by which a handler is found. You set it.';
COMMENT ON COLUMN notifyq.task.payload IS 'The input of its handler, a JSON object. You may set it.';
COMMENT ON COLUMN notifyq.task.errors IS 'A JSON array of what went wrong, oldest first; shortened beyond 200.';
COMMENT ON COLUMN notifyq.task.options IS
    'A JSON object with unique_key, order_key, limit_key, after and the settings of these, and expires; NULL for most.'
    ' You may set it.';
COMMENT ON COLUMN notifyq.task.order_key IS
    'From options: of tasks with the same key one runs at a time, in the order of ids.';
COMMENT ON COLUMN notifyq.task.limit_key IS 'From options: limits count all tasks with the same key.';
COMMENT ON COLUMN notifyq.task.after IS 'From options: the ids of tasks whose ends it still waits for.';
COMMENT ON COLUMN notifyq.task.expires_at IS
    'From options: if it has not started by then, it is cancelled; NULL: never, or a worker sees to that, or it began.';
COMMENT ON COLUMN notifyq.task.parked IS
    'If withheld, what it waits for: limit, rate, queue, order, after, or crashed, which is until a worker runs it'
    ' isolated. If not withheld, what it was granted.';
COMMENT ON COLUMN notifyq.task.waiting_on IS
    'The key at which it waits, or of which a slot is reserved for it; NULL for after.';
COMMENT ON COLUMN notifyq.task.admitted_at IS 'Equal to processing_at: this attempt holds slots of its keys.';
COMMENT ON COLUMN notifyq.task.watched IS
    'Other tasks may wait for its end, so its end adds a row to notifyq.slot_released.';
COMMENT ON COLUMN notifyq.task.awaited IS 'A client waits for its end, so its end sends a NOTIFY.';
COMMENT ON COLUMN notifyq.task.progress IS 'How far its handler says it is, from 0 to 1.';
COMMENT ON COLUMN notifyq.task.note IS 'Its handler''s own words about its progress.';
COMMENT ON COLUMN notifyq.task.crashes IS
    'How often its worker vanished while it ran beside other tasks. These attempts don''t count against max_attempts.';
COMMENT ON COLUMN notifyq.task.crashes_alone IS
    'How often its worker vanished while it ran nothing else. These attempts count, and the third is the last.';

-- The claims' index: its order is the claim's ORDER BY, its predicate the claim's WHERE, word for word. It has `id + 0`
-- lest the planner answer "from this id on, in the order of ids" from task_pkey, and walk through all tasks that aren't
-- ready.
CREATE INDEX task_ready ON notifyq.task (queue, priority DESC, (id + 0))
    WHERE worker IS NULL AND NOT withheld AND (run_at <= created_at OR promoted);
CREATE INDEX task_scheduled ON notifyq.task (queue, run_at)
    WHERE worker IS NULL AND run_at > created_at AND NOT promoted;
CREATE INDEX task_running ON notifyq.task (worker) WHERE worker IS NOT NULL;
CREATE INDEX task_unhandled ON notifyq.task (type, queue, priority DESC, id)
    WHERE worker IS NULL AND withheld AND parked IS NULL;

-- Three indexes for chapter 6: the tasks that hold a slot of a key or a queue, the tasks that wait at a key, and the
-- tasks in an order. Of tasks without options these indexes have only those that crashed, or that a queue's limit
-- concerns.
CREATE INDEX task_admitted ON notifyq.task (limit_key, queue) WHERE admitted_at IS NOT NULL AND worker IS NOT NULL;
CREATE INDEX task_parked ON notifyq.task (waiting_on, withheld, priority DESC, id) WHERE waiting_on IS NOT NULL;

-- A task's place in the order of its order_key. NULL: not in the order yet, as it was never due, or waits for others
-- before its first attempt. A worker's id: running. 0: in the order, not running; the lowest id of these is next.
CREATE FUNCTION notifyq.place_in_order(
    attempts smallint, parked text, promoted boolean, run_at timestamptz, created_at timestamptz, worker integer
) RETURNS integer IMMUTABLE LANGUAGE sql BEGIN ATOMIC
    SELECT CASE WHEN attempts > 0 OR parked <> 'after' OR parked IS NULL AND (promoted OR run_at <= created_at)
           THEN coalesce(worker, 0) END;
END;
COMMENT ON FUNCTION notifyq.place_in_order(smallint, text, boolean, timestamptz, timestamptz, integer) IS
    'Internal: whether a task may be the next of its order_key, runs, or has no place in the order yet.';

-- id + 0 as above. The planner inlines the function here too.
CREATE INDEX task_order ON notifyq.task (
    order_key, (notifyq.place_in_order(attempts, parked, promoted, run_at, created_at, worker)), (id + 0))
    WHERE order_key IS NOT NULL;

-- Outcomes. Workers append them, people read them, and workers prune them by age; no claim ever looks here.
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
-- For pruning: dead tasks are kept longer than the others. An insert finds its page at once, at the right edge.
CREATE INDEX finished_old ON notifyq.finished (processed_at) WHERE state <> 'dead';
CREATE INDEX finished_dead ON notifyq.finished (processed_at) WHERE state = 'dead';

COMMENT ON TABLE notifyq.finished IS
    'Finished tasks. Workers delete them when they are older than their retention. To read, use notifyq.all_tasks.';
COMMENT ON COLUMN notifyq.finished.id IS 'The id of the task.';
COMMENT ON COLUMN notifyq.finished.created_at IS 'When it was inserted.';
COMMENT ON COLUMN notifyq.finished.run_at IS 'The earliest time at which it was to run.';
COMMENT ON COLUMN notifyq.finished.processing_at IS 'When its last attempt was claimed.';
COMMENT ON COLUMN notifyq.finished.processed_at IS 'When it ended.';
COMMENT ON COLUMN notifyq.finished.priority IS 'Its priority.';
COMMENT ON COLUMN notifyq.finished.attempts IS 'How many attempts there were, since its last notifyq.retry if any.';
COMMENT ON COLUMN notifyq.finished.max_attempts IS 'How many were allowed; NULL: what its type says, else 10.';
COMMENT ON COLUMN notifyq.finished.state IS 'done, dead or cancelled.';
COMMENT ON COLUMN notifyq.finished.queue IS 'Its queue.';
COMMENT ON COLUMN notifyq.finished.type IS 'The name of the kind of task.';
COMMENT ON COLUMN notifyq.finished.worker IS 'host:pid of the worker that ran it last.';
COMMENT ON COLUMN notifyq.finished.payload IS 'What its handler got.';
COMMENT ON COLUMN notifyq.finished.result IS 'What its handler returned.';
COMMENT ON COLUMN notifyq.finished.errors IS 'A JSON array of what went wrong, oldest first; shortened beyond 200.';
COMMENT ON COLUMN notifyq.finished.options IS 'The options it was enqueued with, or what notifyq.retry left of them.';

-- Write the outcome of one task that its caller has just deleted from notifyq.task. Returns its id. finish.sql, which
-- settles thousands of tasks at a time, has an INSERT of its own.
CREATE FUNCTION notifyq.write_outcome(task notifyq.task, state text, worker text, attempts integer, errors jsonb)
    RETURNS bigint LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    -- An older task had this id if the sequence of ids was set back, by a failover or a restore: read_highest_ids.sql.
    DELETE FROM notifyq.finished f WHERE f.id OPERATOR(pg_catalog.=) task.id;
    INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts, max_attempts,
                                  state, queue, type, worker, payload, errors, options)
    VALUES (task.id, task.created_at, task.run_at, task.processing_at, pg_catalog.clock_timestamp(), task.priority,
            write_outcome.attempts, task.max_attempts, write_outcome.state, task.queue, task.type, write_outcome.worker,
            task.payload, write_outcome.errors, task.options);
    RETURN task.id;
END $$;
COMMENT ON FUNCTION notifyq.write_outcome(notifyq.task, text, text, integer, jsonb) IS
    'Internal: writes the outcome of a deleted task into notifyq.finished.';

-- Enqueue by a function, for users who prefer that to an INSERT. The defaults are the table's own. NULL means the
-- default too: a caller with named parameters often has a NULL for each.
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
COMMENT ON FUNCTION notifyq.enqueue(text, jsonb, text, timestamptz, integer, integer, jsonb) IS
    'Enqueue a task. Returns its id; for a unique task that is not inserted, the id of the existing one. NULL means '
    'the default, for all but type. Before PREPARE TRANSACTION, SET LOCAL notifyq.two_phase = on first: see '
    'docs/transactions.md.';

-- `errors` with one more entry. It keeps the first hundred and the last hundred entries. Between them is a marker, an
-- entry whose left_out says how many entries it stands for. So each failure of a task that fails thousands of times
-- costs the same. If the errors take more than 8 MB on disk, only a marker and the new entry are kept. A worker asks
-- for that too, by a left_out in the new entry, after PostgreSQL refused to store the entry beside the others.
CREATE FUNCTION notifyq.append_error(errors jsonb, error jsonb) RETURNS jsonb
    STABLE LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    first integer := 100;  -- how many entries are kept at the beginning
    last integer := 100;   -- and at the end, the new one among them
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
        first := 0;
        last := 1;
    ELSIF length < first + last THEN
        RETURN errors || jsonb_build_array(error);
    END IF;
    SELECT sum(CASE WHEN jsonb_typeof(e.entry -> 'left_out') = 'number'
                    THEN (e.entry ->> 'left_out')::numeric ELSE 1 END)
    INTO omitted
    FROM jsonb_array_elements(errors) WITH ORDINALITY AS e (entry, n)
    WHERE e.n > first AND e.n <= length - last + 1;
    IF first = 0 THEN
        RETURN jsonb_build_array(
            jsonb_build_object('left_out', coalesce(omitted, 0),
                               'error', 'entries that were left out, as they are too large: ' || coalesce(omitted, 0)),
            error - 'left_out');
    END IF;
    RETURN jsonb_path_query_array(errors, '$[0 to 99]')
        || jsonb_build_array(jsonb_build_object(
               'left_out', omitted, 'error', 'entries that were left out here: ' || omitted))
        || jsonb_path_query_array(errors, '$[last - 98 to last]') || jsonb_build_array(error);
END $$;
COMMENT ON FUNCTION notifyq.append_error(jsonb, jsonb) IS
    'Internal: adds an entry to a task''s errors, and keeps them bounded.';

-- =====================================================================================================================
-- 2 Workers
-- =====================================================================================================================
--
-- A worker has one row here, and one heartbeat for all its tasks. Besides, all its sessions share the session-level
-- advisory lock (1852990827, id), which is free the moment the last of their backends is gone. A worker is dead when
-- its heartbeat has not changed for 2 seconds and that lock is free, or when its heartbeat has not changed for the
-- length of its lease. Another worker then rescues its tasks (sql/worker/rescue.sql). For people and crons a heartbeat
-- within the lease is enough: is_alive() asks for no lock.
--
-- Tasks whose worker vanished
-- ---------------------------
-- A worker that vanishes (killed, out of memory) takes all tasks down that it runs, and at most one of them is the
-- cause. So a crash counts as a failed attempt only if the task was the only one that its worker held:
--
--     crash beside others   the attempt doesn't count (column crashes)
--     crash alone           the attempt counts (crashes_alone). After the third such crash, or at max_attempts, the
--                           task is dead
--
-- After its first crash a task is ready again at once. After a later one it is parked ('crashed') until a worker runs
-- it isolated, which is beside other such tasks only.
--
-- To run such tasks isolated, a worker stops claiming until it holds no task. Then it runs 16 of them, or 4 that have
-- crashed three times, or one that has crashed more often. Then it claims as usual. One worker at a time does that,
-- by an advisory lock; a worker that is refused the lock for ten minutes goes ahead. A worker also waits only for a
-- time, which doubles with each crash, until it holds no task: then it runs them beside others, and a further crash
-- starts this again.

-- An id is drawn at random, not from a sequence. After a failover that lost a worker's row, or after a restore, a
-- sequence would give the id of a living worker to another one, and their leases would look the same.
CREATE TABLE notifyq.worker (
    id            integer     NOT NULL DEFAULT 1 + floor(random() * 2147483647) PRIMARY KEY,
    name          text        NOT NULL,
    queues        text[]      NOT NULL,
    types         text[]      NOT NULL,
    max_attempts  smallint[]  NOT NULL,
    concurrency   integer     NOT NULL,
    lease         interval    NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    running       integer     NOT NULL DEFAULT 0,
    status        text        NOT NULL DEFAULT 'ok',
    crons         text[]      NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

COMMENT ON TABLE notifyq.worker IS 'Workers that live, or lived a moment ago: one row and one heartbeat for each.';
COMMENT ON COLUMN notifyq.worker.id IS 'Its id, as in task.worker.';
COMMENT ON COLUMN notifyq.worker.name IS 'host:pid.';
COMMENT ON COLUMN notifyq.worker.queues IS 'The queues that it takes tasks from.';
COMMENT ON COLUMN notifyq.worker.types IS 'The task types that it has handlers for.';
COMMENT ON COLUMN notifyq.worker.max_attempts IS
    'Parallel to types: how many attempts each type allows, for tasks without a max_attempts of their own.';
COMMENT ON COLUMN notifyq.worker.concurrency IS 'How many handlers it runs at the same time.';
COMMENT ON COLUMN notifyq.worker.lease IS
    'After this time without a heartbeat it counts as dead, whatever its lock says.';
COMMENT ON COLUMN notifyq.worker.started_at IS 'When it started.';
COMMENT ON COLUMN notifyq.worker.seen_at IS 'When its last heartbeat came.';
COMMENT ON COLUMN notifyq.worker.running IS 'How many tasks it runs.';
COMMENT ON COLUMN notifyq.worker.status IS 'ok, or a description of a problem.';
COMMENT ON COLUMN notifyq.worker.crons IS 'The names of the crons that it looks after.';

-- Whether a worker's last heartbeat is no older than its lease. After a step of the server's clock it may lie in the
-- future, so that is bounded too.
CREATE FUNCTION notifyq.is_alive(seen_at timestamptz, lease interval) RETURNS boolean STABLE LANGUAGE sql BEGIN ATOMIC
    SELECT seen_at BETWEEN statement_timestamp() - lease AND statement_timestamp() + lease;
END;
COMMENT ON FUNCTION notifyq.is_alive(timestamptz, interval) IS 'Internal: whether a worker is alive, by its heartbeat.';

-- =====================================================================================================================
-- 3 The bell
-- =====================================================================================================================
--
-- A transaction that has called pg_notify serialises its commit with every other one that did. So the insert trigger
-- rings (calls pg_notify) only while some worker sleeps. notifyq.bell is an empty table that is never written; its
-- lock modes are the protocol. An enqueuer tries ROW EXCLUSIVE, which many sessions can hold at the same time. A
-- worker holds SHARE while it sleeps: many workers can hold it at the same time too, but never while an enqueuer
-- holds its lock.
--
--   * The enqueuer is refused: a worker sleeps or is about to. It rings.
--   * The lock is granted: no worker sleeps. The enqueuer doesn't ring, and keeps the lock until it commits. A worker
--     that wants to sleep waits for that, and PostgreSQL releases locks after the rows are visible. So the worker's
--     last claim, made once SHARE is granted, sees the rows of all transactions that didn't ring. So no wake-up is
--     lost but in the two cases that ring() names, however long a transaction stays open, and in whatever order
--     transactions commit.
--
-- notifyq/worker/doorbell.py is the worker's side. A fleet is all workers that serve the same queues and task types.
-- One of them has the turn, an advisory lock: only it looks for tasks when none is known to be ready, and sleeps at the
-- bell. Now and then it sends itself a notification, an echo. If that doesn't come back, the bell doesn't work, and
-- the worker polls.

CREATE TABLE notifyq.bell (nothing boolean CHECK (false)) WITH (autovacuum_enabled = false);

COMMENT ON TABLE notifyq.bell IS
    'Always empty. A worker holds SHARE on it while it sleeps, and lets go when another statement waits. An '
    'enqueuer that cannot get ROW EXCLUSIVE at once sends a NOTIFY.';
COMMENT ON COLUMN notifyq.bell.nothing IS 'No row is ever stored.';

-- The enqueuer's side. No error here (no privilege on bell, no bell at all) may abort a user's INSERT: every error
-- means "ring".
CREATE FUNCTION notifyq.ring() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE NOWAIT;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    -- Two cases in which it doesn't ring. Workers then find out by their echoes, and poll.
    -- 1. The notification queue is nearly full: the commit of a transaction that notifies would fail. Any role can fill
    --    the queue (LISTEN, BEGIN, and wait while others notify).
    -- 2. The transaction is to be prepared for two-phase commit, and says so by SET LOCAL notifyq.two_phase = on:
    --    PostgreSQL refuses to prepare one that has notified. This is asked here, where it rings, and nowhere else.
    IF pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.9
       AND coalesce(pg_catalog.current_setting('notifyq.two_phase', true), '') OPERATOR(pg_catalog.<>) 'on' THEN
        PERFORM pg_catalog.pg_notify('notifyq', '');
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION notifyq.ring() IS 'Internal: trigger ring, which wakes a worker if one sleeps.';

-- It fires once for a statement, however many rows that has; for COPY and INSERT ... SELECT too. UPDATE OF run_at is
-- how others say "look again": a failed attempt that is to be tried again, a hand-back, a rescue, a grant (chapter 6),
-- a release (chapter 7), retry(), or a person at psql. Claims and promotions don't name run_at.
CREATE TRIGGER ring AFTER INSERT OR UPDATE OF run_at ON notifyq.task
    FOR EACH STATEMENT EXECUTE FUNCTION notifyq.ring();

-- For all other notifications: in the two cases in which ring() doesn't ring, don't notify.
CREATE FUNCTION notifyq.notify_unless_full(channel text, payload text) RETURNS void LANGUAGE sql BEGIN ATOMIC
    SELECT pg_notify($1, $2)
    WHERE pg_notification_queue_usage() < 0.9 AND coalesce(current_setting('notifyq.two_phase', true), '') <> 'on';
END;
COMMENT ON FUNCTION notifyq.notify_unless_full(text, text) IS
    'Internal: NOTIFY, unless the queue of notifications is nearly full.';

-- The worker's side. A blocked SELECT holds a snapshot, and so holds back vacuum: each wait is bounded, and repeated. A
-- wait that ends without the lock, or because the worker stops, returns false: it is no error for the server's log.

-- Wait for the turn of a fleet, at most wait_ms; 0: without a bound, here and below.
CREATE FUNCTION notifyq.take_turn(fleet integer, wait_ms integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('lock_timeout', wait_ms::pg_catalog.text, true);
    PERFORM pg_catalog.pg_advisory_lock(1852990836, fleet);
    RETURN true;
EXCEPTION WHEN lock_not_available OR query_canceled THEN
    -- The lock may have been granted in the very moment in which the wait ended, and a session's lock outlives the
    -- error: this session would keep a turn that its worker doesn't know of. So release it, however many times this
    -- session holds it. Not by pg_advisory_unlock_all: the session's other advisory lock proves that its worker
    -- lives.
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
COMMENT ON FUNCTION notifyq.take_turn(integer, integer) IS 'Internal: waits for the turn of a fleet of workers.';

-- Wait for SHARE on the bell, at most wait_ms.
CREATE FUNCTION notifyq.fall_asleep(wait_ms integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('lock_timeout', wait_ms::pg_catalog.text, true);
    LOCK TABLE notifyq.bell IN SHARE MODE;
    RETURN true;
EXCEPTION WHEN lock_not_available OR query_canceled THEN
    RETURN false;
END $$;
COMMENT ON FUNCTION notifyq.fall_asleep(integer) IS 'Internal: waits for SHARE on notifyq.bell.';

-- Whether a statement (VACUUM, ANALYZE, ALTER PUBLICATION, ...) waits for a lock on the bell that conflicts with a
-- sleeper's SHARE. The heartbeat of a worker that sleeps asks, in a session of its own: in the sleeper's the answer is
-- always false. PostgreSQL grants no SHARE ahead of such a waiter, so NOWAIT tells, at a fraction of what pg_locks
-- costs. The exception releases at once a lock that was granted.
CREATE FUNCTION notifyq.bell_wanted() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE notifyq.bell IN SHARE MODE NOWAIT;
    RAISE EXCEPTION USING ERRCODE = 'P0001';
EXCEPTION
    WHEN lock_not_available THEN RETURN true;
    WHEN OTHERS THEN RETURN false;
END $$;
COMMENT ON FUNCTION notifyq.bell_wanted() IS 'Internal: whether a statement waits for a lock on notifyq.bell.';

-- =====================================================================================================================
-- 4 Cancel, retry
-- =====================================================================================================================

-- Cancel a live task: move it to finished. Returns whether it was live. A running task is taken from its worker: the
-- worker listens while it runs something for long, and is told to look; its next heartbeat finds the lease gone in any
-- case, and cancels the handler.
CREATE FUNCTION notifyq.cancel(id bigint) RETURNS boolean LANGUAGE sql SET enable_seqscan = off BEGIN ATOMIC
    WITH gone AS (
        DELETE FROM notifyq.task t WHERE t.id = $1 RETURNING t AS task
    ), outcome AS MATERIALIZED (
        SELECT notifyq.write_outcome(g.task, 'cancelled', w.name, (g.task).attempts, (g.task).errors)
        FROM gone g LEFT JOIN notifyq.worker w ON w.id = (g.task).worker
    ), told AS MATERIALIZED (
        SELECT notifyq.notify_unless_full('notifyq_cancel', $1::text) FROM gone g WHERE (g.task).worker IS NOT NULL
        UNION ALL
        -- Other tasks may wait for its end, and a DELETE doesn't ring.
        SELECT notifyq.notify_unless_full('notifyq', '') FROM gone g WHERE (g.task).watched
    )
    SELECT EXISTS (SELECT FROM outcome) FROM (SELECT count(*) FROM told) AS t;
END;
COMMENT ON FUNCTION notifyq.cancel(bigint) IS 'Cancel a live task, a running one too. Returns whether it was live.';

-- Cancel these live tasks, which the caller has locked, each with its reason as the last of its errors. A task that a
-- worker has claimed has not been run: the claim is no attempt. Returns the cancelled tasks.
CREATE FUNCTION notifyq.cancel_for(ids bigint[], reasons text[]) RETURNS bigint[]
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    cancelled bigint[];
BEGIN
    WITH gone AS (
        DELETE FROM notifyq.task t USING unnest(ids, reasons) AS r (id, reason) WHERE t.id = ANY (ARRAY[r.id])
        RETURNING t AS task, t.attempts - (t.worker IS NOT NULL)::integer AS attempts, r.reason
    ), outcome AS MATERIALIZED (
        SELECT notifyq.write_outcome(g.task, 'cancelled', NULL, g.attempts, notifyq.append_error(
                   (g.task).errors,
                   jsonb_build_object('attempt', g.attempts, 'at', clock_timestamp(), 'error', g.reason))) AS id
        FROM gone g
    )
    SELECT array_agg(o.id) INTO cancelled FROM outcome o;
    DELETE FROM notifyq.dependency d WHERE d.task = ANY (cancelled);
    RETURN coalesce(cancelled, '{}');
END $$;
COMMENT ON FUNCTION notifyq.cancel_for(bigint[], text[]) IS
    'Internal: cancels tasks that no worker runs, and says why.';

-- Run a task again, now. A dead or cancelled task starts again with attempts = 0 and the errors it has. A task that
-- waits for its run_at is due at once. A running, ready, parked or done task is left alone. Returns whether it applied.
CREATE FUNCTION notifyq.retry(id bigint) RETURNS boolean LANGUAGE sql SET enable_seqscan = off BEGIN ATOMIC
    WITH again AS (
        DELETE FROM notifyq.finished f
        WHERE f.id = $1 AND f.state IN ('dead', 'cancelled') AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.id = $1)
        RETURNING f.*
    ), back AS (
        INSERT INTO notifyq.task (id, created_at, run_at, priority, max_attempts, promoted, queue, type, payload,
                                  errors, options)
        OVERRIDING SYSTEM VALUE
        SELECT a.id, a.created_at, now(), a.priority, a.max_attempts, true, a.queue, a.type, a.payload, a.errors,
               -- Without its unique_key, no other task can be in its way. It runs whatever became of its predecessors.
               a.options - '{unique_key,unique_states,unique_for,on_conflict}'::text[]
               || CASE WHEN a.options ? 'after' THEN '{"on_dead": "run"}' ELSE '{}' END::jsonb
        FROM again a
        RETURNING 1
    ), due AS (
        UPDATE notifyq.task t
        SET run_at = now(), promoted = true, expires_at = CASE WHEN t.expires_at IS NOT NULL THEN
                now() + make_interval(secs => (t.options -> 'expires')::float8) END
        -- CASE, so that the planner sees one way, the id. With statistics from when the table was empty it took
        -- task_scheduled, whose predicate these conditions are, and read a million entries.
        WHERE t.id = $1 AND CASE WHEN t.worker IS NULL THEN t.run_at > t.created_at AND NOT t.promoted END
        RETURNING 1
    )
    SELECT EXISTS (SELECT FROM back) OR EXISTS (SELECT FROM due);
END;
COMMENT ON FUNCTION notifyq.retry(bigint) IS
    'Run a task again, now: a dead or cancelled one from attempts = 0, one that waits for its run_at at once. Others, '
    'also parked ones (waits_for is set), are left alone. Returns whether it applied.';

-- =====================================================================================================================
-- 5 Options and unique
-- =====================================================================================================================
--
-- Features that few tasks use are given in one column, options, a JSON object. For all other tasks it is NULL, and
-- costs their INSERT one short WHEN.
--
--     unique_key       a task with this key isn't inserted while another task with it
--     unique_states      is in one of these states (the default is scheduled, ready, running, and with unique_for done;
--                        but if on_conflict is replace or move, scheduled and ready),
--     unique_for         and was enqueued in the last unique_for seconds;
--     on_conflict        the other one is left as it is (keep), or gets the new task's type and payload (replace), or
--                        its run_at (move)
--     order_key        tasks with the same key run one at a time, in the order of ids
--     limit_key        of tasks with the same key, over all workers,
--     limit_running      at most limit_running run at the same time,
--     limit_rate         and at most limit_rate start
--     limit_seconds      in any limit_seconds seconds
--     after            ids of tasks, its predecessors; it waits for their ends, and
--     on_dead            is cancelled (cancel), or runs all the same (run), if one of these isn't done
--     expires          is cancelled if it hasn't started this many seconds after it was due: after its run_at, or its
--                      INSERT if that is later
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

CREATE TABLE notifyq.unique_key (
    key           text        NOT NULL PRIMARY KEY,
    task          bigint      NOT NULL,
    enqueued_at   timestamptz NOT NULL,
    until         timestamptz NOT NULL
) WITH (
    fillfactor = 80, vacuum_truncate = off,
    autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000
);
CREATE INDEX unique_key_until ON notifyq.unique_key (until);

COMMENT ON TABLE notifyq.unique_key IS
    'The newest task with each unique_key. Workers delete a row some time after the task is over and until has '
    'passed.';
COMMENT ON COLUMN notifyq.unique_key.key IS 'The unique_key.';
COMMENT ON COLUMN notifyq.unique_key.task IS 'The id of the newest task with it.';
COMMENT ON COLUMN notifyq.unique_key.enqueued_at IS 'When that task was enqueued.';
COMMENT ON COLUMN notifyq.unique_key.until IS 'The end of the longest unique_for that was asked for.';

-- Whether this task, which is about to be inserted, is the only one with its unique_key; if so, the key's row names it.
CREATE FUNCTION notifyq.claim_unique_key(mine notifyq.task) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    waiting CONSTANT text[] := ARRAY['scheduled', 'ready'];
    my_key CONSTANT text := mine.options ->> 'unique_key';
    on_conflict CONSTANT text := mine.options ->> 'on_conflict';
    period CONSTANT interval := make_interval(secs => (mine.options -> 'unique_for')::float8);
    expires CONSTANT jsonb := jsonb_strip_nulls(jsonb_build_object('expires', mine.options -> 'expires'));
    -- Replace and move concern a task that waits. "Once an hour" means that a done task counts too.
    states CONSTANT text[] := CASE
        WHEN mine.options ? 'unique_states'
            THEN ARRAY(SELECT jsonb_array_elements_text(mine.options -> 'unique_states'))
        WHEN on_conflict IN ('replace', 'move') THEN waiting
        WHEN period IS NULL THEN waiting || '{running}'
        ELSE waiting || '{running,done}' END;
    old bigint;
    since timestamptz;
    expired boolean;
    locked boolean;
    state text;
BEGIN
    INSERT INTO notifyq.unique_key AS k (key, task, enqueued_at, until)
    VALUES (my_key, mine.id, clock_timestamp(), clock_timestamp() + coalesce(period, '0'))
    ON CONFLICT (key) DO UPDATE SET until = k.enqueued_at + period
        WHERE k.until < k.enqueued_at + period  -- mostly false: then the row is locked, and no dead row is left
    RETURNING k.task, k.enqueued_at INTO old, since;
    IF old = mine.id THEN
        RETURN true;  -- the first task with its key
    ELSIF old IS NULL THEN
        SELECT k.task, k.enqueued_at INTO old, since FROM notifyq.unique_key k WHERE k.key = my_key;
    END IF;
    IF since > clock_timestamp() THEN
        -- The clock was set back since. The old task counts as enqueued now: else the key would be taken until that
        -- time.
        since := clock_timestamp();
        UPDATE notifyq.unique_key k
        SET enqueued_at = since,
            until = since + greatest(
                CASE WHEN isfinite(k.until) AND isfinite(k.enqueued_at) THEN k.until - k.enqueued_at END,
                coalesce(period, '0'))
        WHERE k.key = my_key;
    END IF;
    LOOP
        -- KEY SHARE hinders claims, which skip the row, and cancel() and cron_pause(), which wait; nothing else. A
        -- running task is not locked: its worker would wait to settle it. The id may have been given twice, and be that
        -- of a task with another key.
        SELECT t.expires_at <= clock_timestamp() INTO expired FROM notifyq.task t
        WHERE t.id = old AND t.worker IS NULL AND t.options ->> 'unique_key' = my_key
        FOR KEY SHARE;
        locked := FOUND AND expired IS NOT TRUE;
        state := CASE WHEN expired THEN 'cancelled' ELSE (  -- as soon as a worker takes it
                  SELECT a.state FROM notifyq.all_tasks a
                  WHERE a.id = old AND NOT EXISTS (
                      SELECT FROM notifyq.task t
                      WHERE t.id = old AND t.options ->> 'unique_key' IS DISTINCT FROM my_key)
                  ORDER BY a.state IN ('done', 'dead', 'cancelled') LIMIT 1) END;
        EXIT WHEN locked OR state IS NULL OR state <> ALL (waiting);  -- else it was handed back in between: look again
    END LOOP;
    -- A task that isn't known any more counts as done: it was pruned, or wasn't kept.
    IF coalesce(state, 'done') = ANY (states) AND (period IS NULL OR since + period > clock_timestamp()) THEN
        -- A task that has started doesn't expire. The new `expires` counts if a person retries it.
        IF locked AND on_conflict = 'replace' THEN
            UPDATE notifyq.task t
            SET type = mine.type, payload = mine.payload, options = t.options - 'expires' || expires,
                expires_at = CASE WHEN t.attempts = 0 THEN
                    greatest(least(t.run_at, '294244-1-1'), mine.created_at)  -- the sum must be a time
                    + make_interval(secs => (expires -> 'expires')::float8) END
            WHERE t.id = old;
        ELSIF locked AND on_conflict = 'move' THEN
            -- Not a task whose time has come and that waits for a limit, its turn or its predecessors: its release sets
            -- run_at.
            UPDATE notifyq.task t
            SET run_at = mine.run_at, promoted = mine.run_at <= clock_timestamp(),
                options = t.options - 'expires' || expires,
                expires_at = CASE WHEN t.attempts = 0 THEN mine.expires_at END
            WHERE t.id = old AND NOT t.withheld AND t.waiting_on IS NULL;
        END IF;
        RETURN false;
    END IF;
    UPDATE notifyq.unique_key k
    SET task = mine.id, enqueued_at = clock_timestamp(), until = clock_timestamp() + coalesce(period, '0')
    WHERE k.key = my_key;
    RETURN true;
END $$;
COMMENT ON FUNCTION notifyq.claim_unique_key(notifyq.task) IS
    'Internal: whether a new task may be inserted, by its unique_key.';

-- Check the options of a new task, and apply them. Wrong options are refused here, where they are written.
--
-- It sets search_path instead of qualifying each operator: only tasks with options pay for that. Its enable_seqscan
-- holds for claim_unique_key too.
CREATE FUNCTION notifyq.apply_options() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
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
                WHEN key IN ('limit_seconds', 'unique_for', 'expires') THEN
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
                         THEN 'contains something other than an id' END
                ELSE CASE key WHEN 'unique' THEN 'is written unique_key in SQL'
                              WHEN 'limit' THEN 'is written limit_running in SQL'
                              WHEN 'rate' THEN 'is written limit_rate and limit_seconds in SQL'
                     ELSE 'is none of the options, which are order_key, limit_key, limit_running, limit_rate, '
                     'limit_seconds, after, on_dead, expires, unique_key, unique_for, unique_states, on_conflict' END
                END AS wrong
              FROM jsonb_each(o)) AS e
        WHERE e.wrong IS NOT NULL
        ORDER BY e.key LIMIT 1) END;
    due CONSTANT timestamptz := greatest(NEW.run_at, NEW.created_at);
BEGIN
    IF wrong IS NULL THEN
        NEW.options := nullif(o, '{}');
        NEW.order_key := o ->> 'order_key';
        NEW.limit_key := o ->> 'limit_key';
        NEW.after := nullif(ARRAY(SELECT jsonb_array_elements(o -> 'after')::bigint), '{}');
        NEW.watched := NEW.order_key IS NOT NULL OR NEW.limit_key IS NOT NULL;
        wrong := CASE
            WHEN o ?| '{unique_states,unique_for,on_conflict}' AND NOT o ? 'unique_key'
                THEN 'unique_states, unique_for and on_conflict need a unique_key'
            WHEN o -> 'unique_states' ?| '{done,dead,cancelled}' AND NOT o ? 'unique_for'
                THEN 'unique_states with done, dead or cancelled needs a unique_for'
            WHEN o ? 'limit_rate' <> o ? 'limit_seconds'
                THEN 'limit_rate and limit_seconds go together: at most limit_rate starts in any limit_seconds'
            WHEN o ? 'limit_key' <> o ?| '{limit_running,limit_rate}'
                THEN 'limit_key goes with limit_running, or with limit_rate and limit_seconds, or with all three'
            WHEN o ? 'on_dead' AND NOT o ? 'after' THEN 'on_dead needs after'
            WHEN NOT NEW.id > ALL (NEW.after) THEN 'after has an id that no task has yet'
            WHEN o ? 'expires' AND isfinite(due) AND due > '294244-1-1' THEN 'expires needs a run_at before year 294244'
            END;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'notifyq.task: %', wrong USING ERRCODE = 'check_violation';
    END IF;
    NEW.expires_at := due + make_interval(secs => (o -> 'expires')::float8);
    IF o ? 'unique_key' AND NOT notifyq.claim_unique_key(NEW) THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION notifyq.apply_options() IS
    'Internal: trigger apply_options, which checks the options of a new task and applies them.';

CREATE TRIGGER apply_options BEFORE INSERT ON notifyq.task FOR EACH ROW WHEN (NEW.options IS NOT NULL)
    EXECUTE FUNCTION notifyq.apply_options();

-- The newest task with this key, by a snapshot of its own: a statement that has inserted no row learns of the
-- existing task.
CREATE FUNCTION notifyq.find_unique_task(key text) RETURNS bigint LANGUAGE sql SET enable_seqscan = off BEGIN ATOMIC
    SELECT k.task FROM notifyq.unique_key k WHERE k.key = $1;
END;
COMMENT ON FUNCTION notifyq.find_unique_task(text) IS 'Internal: the newest task with a unique_key.';

-- =====================================================================================================================
-- 6 Limits and order
-- =====================================================================================================================
--
-- Some tasks must wait for more than a free handler: for others with the same limit_key or order_key, or in a queue
-- that is limited over all workers. They are inserted as ready, like any task, so their INSERT costs nothing more and
-- locks nothing, and claims find them in their order. After the claim, notifyq.admit decides whether they run:
--
--     claimed --admit--> runs         the slot is the row itself: a row whose attempt was admitted counts
--                `-----> parked       no claim looks at it until a slot is granted to it. It has begun no attempt, so
--                                     attempts is set back
--     its end, or its worker's loss of it --> a row in notifyq.slot_released --release_waiters--> slots are granted to
--                                                                  parked tasks, which are ready again, or scheduled
--
-- A slot is one of the places that a limit has, or the turn in an order. (A slot of a cron is something else.)
--
-- Keys
-- ----
-- A key is 'limit:' and a limit_key, 'queue:' and the name of a limited queue, or 'order:' and an order_key. A task may
-- have one of each kind. They are checked in this order: order, queue, limit. A task is parked at the first key that
-- keeps it back, and takes no place at the later ones. Three columns say how it waits:
--
--     parked   withheld   waiting_on
--     set      true       the key    the task waits at that key, until a slot is granted to it there
--     set      false      the key    granted, at a limit: or queue: key: a slot of that key is reserved for it. It is
--                                    ready, or scheduled for the time at which a rate lets it start
--     null     -          null       other tasks, also one whose turn in its order has come. (Parked are also crashed
--                                    tasks, at 'crashed:' and their queue, see chapter 2, and tasks that wait for
--                                    others, at no key, see chapter 7.)
--
-- A granted task, and one whose turn has come, is claimed and then admitted or parked like others. So the next task of
-- an order may be parked at its limit, and meanwhile still keeps the later ones back.
--
-- Exact
-- -----
-- There are no counters, which could become wrong: the tasks that hold a slot are counted from the rows (admitted_at =
-- processing_at; each claim sets processing_at anew, so no attempt inherits a slot). A session that admits tasks, or
-- grants slots, first locks the keys' rows of notifyq.key_lock, and then counts in a fresh snapshot. Only admit gives
-- slots, and it commits to the disk before a handler begins; and admit_running, when a queue's limit is new. So limits
-- hold whatever process dies, and a dead process holds no slot that it would have to give back.
--
-- Live
-- ----
-- Each event that may end the waiting of a task leaves a row in notifyq.slot_released, in the same commit: the end of
-- an attempt that held a slot; or that a granted task is cancelled, had no handler, or lost its worker. One event
-- leaves no row, since it happens in admit, under the key's lock: a granted task is parked at another key. The row is
-- written by the transaction that ends the attempt: by a trigger if the task has ended, otherwise in the statement
-- that gives up the lease. The next worker that settles, is about to sleep, or sends a heartbeat, calls
-- release_waiters.
--
-- release_waiters and admit grant as many slots as neither running nor granted tasks have: at limit: and queue: keys by
-- priority and id, without tasks in paused queues; in an order by id. A task that is claimed while others wait at its
-- key is parked too, even if a slot is free; with a higher priority it is granted before them.
--
-- No release is missed. A row of slot_released commits together with its cause, and a worker deletes it only after it
-- has locked the keys. An admit that still counted the ended attempt held these locks before. So it has committed by
-- then, and the worker sees the tasks that it parked.
--
-- A slot of a rate is released by time only. So it is granted in advance, for that time, and the timers do the rest.
--
-- A grant reserves its slot until 2 s after the task's run_at and, once the task is claimed, until it is admitted or
-- parked. It may never be claimed: the queue was paused a moment ago, or no worker serves it. Then the slot is for
-- others: notifyq.recheck_waiting, called now and then, has such keys looked at again. Any other claimed task holds no
-- slot before it is admitted, and none waits for it.
--
-- Mostly a task is parked and granted once. One whose keys are both full may be parked at each, several times.

-- Keys to look at again, mostly because an attempt ended. A worker deletes the rows that it has handled: the table is
-- mostly empty.
CREATE TABLE notifyq.slot_released (
    n             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task          bigint      NOT NULL,
    ended         boolean     NOT NULL,
    queue         text        NOT NULL,
    order_key     text,
    limit_key     text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

COMMENT ON TABLE notifyq.slot_released IS
    'Keys to look at again, mostly because an attempt ended. A worker takes each row, and releases the tasks that may '
    'run.';
COMMENT ON COLUMN notifyq.slot_released.n IS 'The order of the rows.';
COMMENT ON COLUMN notifyq.slot_released.task IS
    'The task whose attempt ended; or one that waits at the key; or 0, for none.';
COMMENT ON COLUMN notifyq.slot_released.ended IS
    'True: the task is over, and tasks may wait for its end. False: only the keys are to be looked at.';
COMMENT ON COLUMN notifyq.slot_released.queue IS 'The queue of that task.';
COMMENT ON COLUMN notifyq.slot_released.order_key IS 'The order_key of that task.';
COMMENT ON COLUMN notifyq.slot_released.limit_key IS 'The limit_key of that task.';

-- Locks for keys, by hash. They are rows, since any role could take and keep an advisory lock.
CREATE TABLE notifyq.key_lock (n smallint NOT NULL PRIMARY KEY) WITH (fillfactor = 50);
INSERT INTO notifyq.key_lock (n) SELECT generate_series(-1, 255);

COMMENT ON TABLE notifyq.key_lock IS
    'Locks for keys, by hash: a worker that admits or releases tasks of a key first locks its row here.';
COMMENT ON COLUMN notifyq.key_lock.n IS 'The hash, from 0 to 255; -1 is for the ends of tasks that others wait for.';

CREATE TABLE notifyq.rate_log (
    key           text        NOT NULL,
    at            timestamptz NOT NULL,
    n             integer     NOT NULL,
    seconds       float8      NOT NULL,
    PRIMARY KEY (key, at)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);

COMMENT ON TABLE notifyq.rate_log IS 'How many tasks started at keys with a rate, and when.';
COMMENT ON COLUMN notifyq.rate_log.key IS 'limit: and a limit_key, or queue: and the name of a queue.';
COMMENT ON COLUMN notifyq.rate_log.at IS 'When they started.';
COMMENT ON COLUMN notifyq.rate_log.n IS 'How many started then.';
COMMENT ON COLUMN notifyq.rate_log.seconds IS
    'How long this row matters: the longest window of a rate that was asked for.';

CREATE TABLE notifyq.queue (
    name          text        NOT NULL PRIMARY KEY CHECK (length(name) <= 200),
    paused        boolean     NOT NULL DEFAULT false,
    limit_running integer     CHECK (limit_running >= 1),
    limit_rate    integer     CHECK (limit_rate >= 1),
    limit_seconds float8      CHECK (limit_seconds > 0 AND limit_seconds <= 1e9)
);

COMMENT ON TABLE notifyq.queue IS
    'Queues that were paused or limited. Change them with notifyq.pause, notifyq.resume and notifyq.limit_queue.';
COMMENT ON COLUMN notifyq.queue.name IS 'The name of the queue.';
COMMENT ON COLUMN notifyq.queue.paused IS 'True: no task starts from it.';
COMMENT ON COLUMN notifyq.queue.limit_running IS 'At most this many of its tasks run at once; NULL: no such limit.';
COMMENT ON COLUMN notifyq.queue.limit_rate IS
    'At most this many of its tasks start in limit_seconds; NULL: no such limit.';
COMMENT ON COLUMN notifyq.queue.limit_seconds IS 'The length of the window of limit_rate, in seconds.';

-- Released slots. The trigger's WHEN costs 0.14 us for a row that no task or client waits for, and its length a
-- little for each statement, INSERTs too. Tasks that give up their lease and live don't fire it, though they could, by
-- UPDATE OF run_at: then each claimed row would be fetched once more, though claims don't name that column.
CREATE FUNCTION notifyq.on_task_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.watched THEN
        INSERT INTO notifyq.slot_released (task, ended, queue, order_key, limit_key)
        VALUES (OLD.id, true, OLD.queue, OLD.order_key, OLD.limit_key);
    END IF;
    IF OLD.awaited THEN
        PERFORM notifyq.notify_unless_full('notifyq_done', OLD.id::pg_catalog.text);
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION notifyq.on_task_deleted() IS
    'Internal: trigger on_task_deleted, which tells of the ends of tasks that others wait for.';

CREATE TRIGGER on_task_deleted AFTER DELETE ON notifyq.task FOR EACH ROW
    WHEN (OLD.watched OR OLD.awaited) EXECUTE FUNCTION notifyq.on_task_deleted();

-- A statement that sets worker = NULL calls this in its RETURNING for a watched task: the task lives, and has given up
-- any slot that it held. Only admit doesn't, as the tasks that it parks held none. Returns true.
CREATE FUNCTION notifyq.note_lease_given_up(t notifyq.task) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO notifyq.slot_released (task, ended, queue, order_key, limit_key)
    VALUES (t.id, false, t.queue, t.order_key, t.limit_key);
    RETURN true;
END $$;
COMMENT ON FUNCTION notifyq.note_lease_given_up(notifyq.task) IS
    'Internal: adds a row to notifyq.slot_released for a task that gave up its slot.';

-- Lock these keys. All sessions lock them in the same order.
CREATE FUNCTION notifyq.lock_keys(keys text[]) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    locks CONSTANT smallint[] := ARRAY(SELECT DISTINCT (hashtext(k) & 255)::smallint FROM unnest(keys) AS k);
    found_locks integer;
    moment timestamptz;
BEGIN
    PERFORM FROM notifyq.key_lock l WHERE l.n = ANY (locks) ORDER BY l.n FOR UPDATE;
    GET DIAGNOSTICS found_locks = ROW_COUNT;
    IF found_locks < cardinality(locks) THEN  -- a TRUNCATE, or a copy without rows, must not leave limits without locks
        INSERT INTO notifyq.key_lock (n) SELECT generate_series(-1, 255) ON CONFLICT DO NOTHING;
        PERFORM FROM notifyq.key_lock l WHERE l.n = ANY (locks) ORDER BY l.n FOR UPDATE;
    END IF;
    -- Starts in the future happened before the clock was set back. They count as of now: else they would block their
    -- key until that time.
    moment := clock_timestamp();
    IF EXISTS (SELECT FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at > moment) THEN
        WITH ahead AS (
            DELETE FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at > moment RETURNING s.key, s.n, s.seconds
        )
        INSERT INTO notifyq.rate_log AS known (key, at, n, seconds)
        SELECT a.key, moment, sum(a.n), max(a.seconds) FROM ahead a GROUP BY a.key
        ON CONFLICT (key, at) DO UPDATE
        SET n = known.n + excluded.n, seconds = greatest(known.seconds, excluded.seconds);
    END IF;
END $$;
COMMENT ON FUNCTION notifyq.lock_keys(text[]) IS 'Internal: locks the rows of notifyq.key_lock for keys.';

-- The limits that a task's options set for its limit_key. A person's UPDATE may have written anything into options; no
-- claim may fail because of that.
CREATE FUNCTION notifyq.parse_limits(options jsonb)
    RETURNS TABLE (limit_running integer, limit_rate integer, limit_seconds float8)
    LANGUAGE sql IMMUTABLE ROWS 1 BEGIN ATOMIC
    SELECT jsonb_path_query_first($1, '$.limit_running ? (@ >= 1 && @ <= 2147483647)')::integer,
           jsonb_path_query_first($1, '$.limit_rate ? (@ >= 1 && @ <= 2147483647)')::integer,
           jsonb_path_query_first($1, '$.limit_seconds ? (@ > 0 && @ <= 1000000000 && @.double() > 0)')::float8;
END;
COMMENT ON FUNCTION notifyq.parse_limits(jsonb) IS 'Internal: the limits in a task''s options.';

-- Four functions count and check. Each is one SELECT, STABLE, which PostgreSQL inlines into its caller's statement: so
-- it is planned once for a session.

-- How the slots of a limit: or queue: key are used, by tasks other than `ids`. held: running tasks have them.
-- reserved: for granted tasks. has_waiters: a task that may be granted one waits; then newcomers wait too, and slots
-- are granted by priority and id.
CREATE FUNCTION notifyq.count_slots(key text, moment timestamptz, ids bigint[])
    RETURNS TABLE (held bigint, reserved bigint, has_waiters boolean) LANGUAGE sql STABLE ROWS 1 BEGIN ATOMIC
    SELECT CASE split_part($1, ':', 1)
               WHEN 'queue' THEN (
                   SELECT count(*) FROM notifyq.task t
                   WHERE t.queue = substr($1, 7) AND t.worker IS NOT NULL AND t.admitted_at = t.processing_at
                     AND t.id <> ALL (coalesce($3, '{}')))
               ELSE (
                   SELECT count(*) FROM notifyq.task t
                   WHERE t.limit_key = substr($1, 7) AND t.worker IS NOT NULL AND t.admitted_at = t.processing_at
                     AND t.id <> ALL (coalesce($3, '{}')))
           END,
           (SELECT count(*) FROM notifyq.task t
            WHERE t.waiting_on = $1 AND NOT t.withheld AND t.id <> ALL (coalesce($3, '{}'))
              AND (t.worker IS NOT NULL OR t.run_at > $2 - interval '2 seconds')),
           EXISTS (SELECT FROM notifyq.task t
                   WHERE t.waiting_on = $1 AND t.withheld
                     AND NOT EXISTS (SELECT FROM notifyq.queue q WHERE q.name = t.queue AND q.paused));
END;
COMMENT ON FUNCTION notifyq.count_slots(text, timestamptz, bigint[]) IS 'Internal: how the slots of a key are used.';

-- Grant. The keys are locked.

-- Make the next task of an order ready, if it waits for its turn. Returns how many are: 1 or 0.
CREATE FUNCTION notifyq.grant_turn(name text) RETURNS integer
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    key CONSTANT text := 'order:' || name;
    head record;
    granted integer;
BEGIN
    SELECT t.id, t.withheld AND t.waiting_on IS NOT DISTINCT FROM key AS waits INTO head
    FROM notifyq.task t
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
    -- If the head is locked, grant nothing: skipping it would break the order.
    UPDATE notifyq.task t
    SET withheld = false, parked = NULL, waiting_on = NULL, run_at = clock_timestamp(), promoted = true
    WHERE t.id = ANY (ARRAY(
        SELECT h.id FROM notifyq.task h
        WHERE h.id = head.id AND h.worker IS NULL AND h.withheld AND h.waiting_on = key
        FOR NO KEY UPDATE SKIP LOCKED));
    GET DIAGNOSTICS granted = ROW_COUNT;
    RETURN granted;
END $$;
COMMENT ON FUNCTION notifyq.grant_turn(text) IS 'Internal: makes the next task of an order_key ready.';

-- Grant the free slots of a limit: or queue: key. Returns how many tasks became ready, or scheduled.
CREATE FUNCTION notifyq.grant_slots(key text) RETURNS integer
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    most CONSTANT integer := 1000;
    kind CONSTANT text := split_part(key, ':', 1);
    name CONSTANT text := substr(key, length(kind) + 2);
    moment CONSTANT timestamptz := clock_timestamp();
    limits record;
    used record;
    free integer;
BEGIN
    -- The limits of a limit: key are those of the first task that waits there. Tasks with other limits are checked by
    -- their own once claimed.
    SELECT l.* INTO limits FROM notifyq.task t CROSS JOIN LATERAL notifyq.parse_limits(t.options) AS l
    WHERE t.waiting_on = key AND t.withheld
      AND NOT EXISTS (SELECT FROM notifyq.queue q WHERE q.name = t.queue AND q.paused)
    ORDER BY t.priority DESC, t.id LIMIT 1;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF kind = 'queue' THEN
        SELECT q.limit_running, q.limit_rate, q.limit_seconds INTO limits FROM notifyq.queue q
        WHERE 'queue:' || q.name = key;
    END IF;
    -- A rate grants at most for the length of its window in advance. A grant for later was given before the clock was
    -- set back, and would reserve its slot until that time: the task waits again, for a new grant.
    UPDATE notifyq.task t SET withheld = true
    WHERE t.id = ANY (ARRAY(
        SELECT g.id FROM notifyq.task g
        WHERE g.waiting_on = key AND NOT g.withheld AND g.worker IS NULL
          AND g.run_at > moment + interval '2 seconds' + make_interval(secs => greatest(
                  limits.limit_seconds, (SELECT l.limit_seconds FROM notifyq.parse_limits(g.options) AS l), 0))
        FOR NO KEY UPDATE SKIP LOCKED));
    SELECT u.held, u.reserved INTO used FROM notifyq.count_slots(key, moment, NULL) AS u;
    free := least(most, limits.limit_running - used.held - used.reserved, limits.limit_rate - used.reserved);
    IF free <= 0 THEN
        RETURN 0;
    END IF;
    -- With a rate, the task that is the k-th too many may start when the k-th oldest logged start leaves the window.
    WITH first AS MATERIALIZED (
        SELECT t.id, t.priority FROM notifyq.task t
        WHERE t.waiting_on = key AND t.withheld AND t.worker IS NULL
          AND NOT EXISTS (SELECT FROM notifyq.queue q WHERE q.name = t.queue AND q.paused)
        ORDER BY t.priority DESC, t.id LIMIT free FOR NO KEY UPDATE OF t SKIP LOCKED
    ), past AS MATERIALIZED (
        SELECT s.at + make_interval(secs => limits.limit_seconds) AS leaves, sum(s.n) OVER (ORDER BY s.at) AS upto
        FROM notifyq.rate_log s
        WHERE s.key = grant_slots.key AND s.at > moment - make_interval(secs => limits.limit_seconds)
    ), placed AS (
        SELECT f.id,
               f.place + used.reserved + coalesce((SELECT max(p.upto) FROM past p), 0) - limits.limit_rate AS surplus
        FROM (SELECT id, row_number() OVER (ORDER BY priority DESC, id) AS place FROM first) AS f
    ), timed AS (
        SELECT p.id,
               CASE WHEN p.surplus > 0 THEN (SELECT min(s.leaves) FROM past s WHERE s.upto >= p.surplus)
                    ELSE moment END AS at
        FROM placed p
    )
    UPDATE notifyq.task t
    SET withheld = false, run_at = w.at, promoted = w.at <= moment
    FROM (SELECT id, coalesce(at, moment) AS at FROM timed) AS w
    WHERE t.id = ANY (ARRAY[w.id]);
    GET DIAGNOSTICS free = ROW_COUNT;
    IF free = most THEN  -- there may be more: have the key looked at again
        INSERT INTO notifyq.slot_released (task, ended, queue, limit_key)
        VALUES (0, false, CASE kind WHEN 'queue' THEN name ELSE '' END, CASE kind WHEN 'limit' THEN name END);
    END IF;
    RETURN free;
END $$;
COMMENT ON FUNCTION notifyq.grant_slots(text) IS 'Internal: grants the free slots of a key to tasks that wait at it.';

-- Grant at all of these keys. Returns how many tasks became ready, or scheduled.
CREATE FUNCTION notifyq.grant_slots(keys text[]) RETURNS integer
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    key text;
    ready integer := 0;
BEGIN
    FOREACH key IN ARRAY ARRAY(
        SELECT k FROM unnest(keys) AS k  -- not EXISTS, which may become a join with all parked tasks
        WHERE (SELECT true FROM notifyq.task t WHERE t.waiting_on = k AND t.withheld LIMIT 1))
    LOOP
        ready := ready + CASE split_part(key, ':', 1)
            WHEN 'order' THEN notifyq.grant_turn(substr(key, 7)) ELSE notifyq.grant_slots(key) END;
    END LOOP;
    RETURN ready;
END $$;
COMMENT ON FUNCTION notifyq.grant_slots(text[]) IS
    'Internal: grants the free slots of keys to tasks that wait at them.';

-- Admit. There are three checks. Each is given the tasks (`ids`) that have passed the checks before it, and returns
-- those that it keeps back, and why. The two for limits number the `ids` of each key by priority and id, and keep back
-- those whose place is beyond the free slots. `claimed` are all tasks that this admit decides: none uses a slot yet.

-- A task waits for its turn while an earlier task (of lower id) of its order is ready, running, parked or due to be
-- tried again, and while any other task of its order runs that was admitted. Tasks without a place in the order
-- (place_in_order) keep none back.
CREATE FUNCTION notifyq.check_order(ids bigint[]) RETURNS TABLE (id bigint, why text)
    LANGUAGE sql STABLE BEGIN ATOMIC
    SELECT m.id, 'order'
    FROM unnest($1) AS i (id)
    JOIN notifyq.task m ON m.id = ANY (ARRAY[i.id])
    WHERE EXISTS (
        SELECT FROM notifyq.task o
        WHERE o.order_key = m.order_key
          AND notifyq.place_in_order(o.attempts, o.parked, o.promoted, o.run_at, o.created_at, o.worker) > 0
          AND (o.id < m.id OR o.id <> m.id AND o.admitted_at = o.processing_at)
        UNION ALL
        SELECT FROM notifyq.task o
        WHERE o.order_key = m.order_key
          AND notifyq.place_in_order(o.attempts, o.parked, o.promoted, o.run_at, o.created_at, o.worker) = 0
          AND o.id + 0 < m.id);
END;
COMMENT ON FUNCTION notifyq.check_order(bigint[]) IS 'Internal: which claimed tasks wait for their turn.';

-- The limits of queues. `keys` are locked; a queue that was limited only after that isn't among them, and counts later.
CREATE FUNCTION notifyq.check_queues(ids bigint[], claimed bigint[], keys text[], moment timestamptz)
    RETURNS TABLE (id bigint, why text) LANGUAGE sql STABLE BEGIN ATOMIC
    WITH limited AS MATERIALIZED (
        SELECT q.name, q.limit_running, q.limit_rate, u.held, u.reserved, u.has_waiters,
               (SELECT coalesce(sum(s.n), 0) FROM notifyq.rate_log s
                WHERE s.key = 'queue:' || q.name AND s.at > $4 - make_interval(secs => q.limit_seconds)) AS started
        FROM notifyq.queue q
        CROSS JOIN LATERAL notifyq.count_slots('queue:' || q.name, $4, $2) AS u
        WHERE 'queue:' || q.name = ANY ($3)
    )
    SELECT m.id, 'queue'
    FROM (SELECT t.id, t.queue, coalesce(t.waiting_on = 'queue:' || t.queue, false) AS granted,
                 row_number() OVER (PARTITION BY t.queue ORDER BY t.priority DESC, t.id) AS place
          FROM unnest($1) AS i (id) JOIN notifyq.task t ON t.id = ANY (ARRAY[i.id])) AS m
    JOIN limited q ON q.name = m.queue
    WHERE NOT m.granted AND q.has_waiters
       OR q.limit_running < m.place + q.held + CASE WHEN m.granted THEN 0 ELSE q.reserved END
       OR q.limit_rate < m.place + q.started + CASE WHEN m.granted THEN 0 ELSE q.reserved END;
END;
COMMENT ON FUNCTION notifyq.check_queues(bigint[], bigint[], text[], timestamptz) IS
    'Internal: which claimed tasks the limits of their queues keep back.';

-- The limits of limit_keys: 'limit' or 'rate'. Tasks of a key may have different limits; each is checked by its own.
CREATE FUNCTION notifyq.check_limits(ids bigint[], claimed bigint[], moment timestamptz)
    RETURNS TABLE (id bigint, why text) LANGUAGE sql STABLE BEGIN ATOMIC
    WITH mine AS MATERIALIZED (
        SELECT t.id, t.limit_key, l.limit_running, l.limit_rate, l.limit_seconds,
               coalesce(t.waiting_on = 'limit:' || t.limit_key, false) AS granted,
               row_number() OVER (PARTITION BY t.limit_key ORDER BY t.priority DESC, t.id) AS place
        FROM unnest($1) AS i (id)
        JOIN notifyq.task t ON t.id = ANY (ARRAY[i.id])
        CROSS JOIN LATERAL notifyq.parse_limits(t.options) AS l
        WHERE t.limit_key IS NOT NULL
    ), used AS MATERIALIZED (
        SELECT k.limit_key, u.held, u.reserved, u.has_waiters
        FROM (SELECT DISTINCT m.limit_key FROM mine m) AS k
        CROSS JOIN LATERAL notifyq.count_slots('limit:' || k.limit_key, $3, $2) AS u
    ), rated AS MATERIALIZED (
        SELECT k.limit_key, k.limit_seconds,
               (SELECT coalesce(sum(s.n), 0) FROM notifyq.rate_log s
                WHERE s.key = 'limit:' || k.limit_key AND s.at > $3 - make_interval(secs => k.limit_seconds)) AS started
        FROM (SELECT DISTINCT m.limit_key, m.limit_seconds FROM mine m WHERE m.limit_rate IS NOT NULL) AS k
    ), checked AS (
        SELECT m.id, CASE
                   WHEN NOT m.granted AND u.has_waiters
                       THEN CASE WHEN m.limit_running IS NULL THEN 'rate' ELSE 'limit' END
                   WHEN m.limit_running < m.place + u.held + CASE WHEN m.granted THEN 0 ELSE u.reserved END THEN 'limit'
                   WHEN m.limit_rate < m.place + r.started + CASE WHEN m.granted THEN 0 ELSE u.reserved END THEN 'rate'
               END AS why
        FROM mine m
        JOIN used u ON u.limit_key = m.limit_key
        LEFT JOIN rated r ON r.limit_key = m.limit_key AND r.limit_seconds = m.limit_seconds
    )
    SELECT c.id, c.why FROM checked c WHERE c.why IS NOT NULL;
END;
COMMENT ON FUNCTION notifyq.check_limits(bigint[], bigint[], timestamptz) IS
    'Internal: which claimed tasks the limits of their limit_keys keep back.';

-- These tasks start at `moment`: note it for the keys that have a rate, of these keys, which are locked.
CREATE FUNCTION notifyq.log_starts(ids bigint[], keys text[], moment timestamptz) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO notifyq.rate_log AS known (key, at, n, seconds)
    SELECT s.key, moment, count(*),
           greatest(max(s.seconds), (SELECT max(old.seconds) FROM notifyq.rate_log old WHERE old.key = s.key))
    FROM (SELECT 'limit:' || t.limit_key AS key, l.limit_seconds AS seconds
          FROM unnest(ids) AS o (id)
          JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
          CROSS JOIN LATERAL notifyq.parse_limits(t.options) AS l
          WHERE t.limit_key IS NOT NULL AND l.limit_rate IS NOT NULL AND l.limit_seconds IS NOT NULL
          UNION ALL
          SELECT 'queue:' || t.queue, q.limit_seconds
          FROM unnest(ids) AS o (id)
          JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
          JOIN notifyq.queue q ON q.name = t.queue
          WHERE 'queue:' || q.name = ANY (keys) AND q.limit_rate IS NOT NULL AND q.limit_seconds IS NOT NULL) AS s
    GROUP BY s.key
    -- Only a clock that was set back says the same time twice.
    ON CONFLICT (key, at) DO UPDATE
    SET n = known.n + excluded.n, seconds = greatest(known.seconds, excluded.seconds);
    DELETE FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at < moment - make_interval(secs => s.seconds);
END $$;
COMMENT ON FUNCTION notifyq.log_starts(bigint[], text[], timestamptz) IS
    'Internal: notes when tasks start at keys with a rate.';

-- Cancel those of the tasks that this worker has just claimed that have expired. Returns them.
CREATE FUNCTION notifyq.cancel_expired(worker integer, ids bigint[], attempts smallint[]) RETURNS bigint[]
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    expired bigint[];
    reasons text[];
BEGIN
    SELECT array_agg(m.id), array_agg(to_char(m.at, '"expired: not started by "YYYY-MM-DD HH24:MI:SS" UTC"'))
    INTO expired, reasons
    FROM (SELECT t.id, notifyq.readable_time(t.expires_at) AT TIME ZONE 'UTC' AS at
          FROM unnest(cancel_expired.ids, cancel_expired.attempts) AS o (id, attempt)
          JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
          WHERE t.worker IS NOT DISTINCT FROM cancel_expired.worker AND t.attempts = o.attempt
            AND t.expires_at <= clock_timestamp()
          FOR UPDATE OF t SKIP LOCKED) AS m;
    RETURN CASE WHEN expired IS NULL THEN '{}' ELSE notifyq.cancel_for(expired, reasons) END;
END $$;
COMMENT ON FUNCTION notifyq.cancel_expired(integer, bigint[], smallint[]) IS
    'Internal: cancels claimed tasks that have expired.';

-- Decide which of the tasks that this worker has just claimed may run. waits_for in the answer:
--
--     null             it runs, and must begin before expires_at
--     cancelled        it is gone: it has expired, or a predecessor is dead or was cancelled
--     another word     it was parked, and waits for this
--     no row           undecided: its row is locked, or was when its predecessors were asked about, or its lease is
--                      lost. The worker hands it back, which does nothing to a lost lease
CREATE FUNCTION notifyq.admit(worker integer, ids bigint[], attempts smallint[])
    RETURNS TABLE (id bigint, waits_for text, expires_at timestamptz)
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    limited text[];       -- queues with limits
    keys text[];
    kinds text[];         -- the kinds of these keys
    moment timestamptz;
    waiting bigint[];     -- tasks that wait for their predecessors: see chapter 7
    expired bigint[];     -- tasks that were cancelled because they expired
    cancelled bigint[];   -- tasks that were cancelled because of a predecessor
    passed bigint[];      -- tasks that no check has kept back so far
    kept bigint[];        -- tasks that were kept back
    reasons text[];       -- for each of these what it waits for
    decided bigint[];
    answers text[];
    times timestamptz[];
BEGIN
    PERFORM set_config('synchronous_commit', 'on', true);  -- a server that crashes must not forget which tasks run
    SELECT array_agg(q.name) INTO limited
    FROM notifyq.queue q
    WHERE coalesce(q.limit_running, q.limit_rate) IS NOT NULL;
    SELECT array_agg(DISTINCT k) INTO keys
    FROM notifyq.task t
    CROSS JOIN LATERAL (VALUES ('order:' || t.order_key), ('limit:' || t.limit_key),
                               (CASE WHEN t.queue = ANY (limited) THEN 'queue:' || t.queue END)) AS v (k)
    WHERE t.id = ANY (admit.ids) AND k IS NOT NULL;
    kinds := ARRAY(SELECT DISTINCT split_part(k, ':', 1) FROM unnest(keys) AS k);
    PERFORM notifyq.lock_keys(keys);
    expired := notifyq.cancel_expired(admit.worker, admit.ids, admit.attempts);
    SELECT a.waiting, a.cancelled INTO waiting, cancelled
    FROM notifyq.await_predecessors(admit.worker, admit.ids, admit.attempts) AS a;
    moment := clock_timestamp();
    passed := ARRAY(
        SELECT t.id
        FROM unnest(admit.ids, admit.attempts) AS o (id, attempt)
        JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
        WHERE t.worker IS NOT DISTINCT FROM admit.worker AND t.attempts = o.attempt
          -- await_predecessors steps over a locked task. If the task isn't locked any more, its predecessors weren't
          -- asked about.
          AND (t.after IS NULL OR t.id = ANY (waiting))
        FOR UPDATE OF t SKIP LOCKED);

    kept := ARRAY(SELECT unnest(passed) INTERSECT SELECT unnest(waiting));
    reasons := array_fill('after'::text, ARRAY[cardinality(kept)]);
    IF 'order' = ANY (kinds) THEN
        passed := ARRAY(SELECT unnest(passed) EXCEPT SELECT unnest(kept));
        SELECT kept || array_agg(c.id), reasons || array_agg(c.why) INTO kept, reasons
        FROM notifyq.check_order(passed) AS c;
    END IF;
    IF 'queue' = ANY (kinds) THEN
        passed := ARRAY(SELECT unnest(passed) EXCEPT SELECT unnest(kept));
        SELECT kept || array_agg(c.id), reasons || array_agg(c.why) INTO kept, reasons
        FROM notifyq.check_queues(passed, admit.ids, keys, moment) AS c;
    END IF;
    IF 'limit' = ANY (kinds) THEN
        passed := ARRAY(SELECT unnest(passed) EXCEPT SELECT unnest(kept));
        SELECT kept || array_agg(c.id), reasons || array_agg(c.why) INTO kept, reasons
        FROM notifyq.check_limits(passed, admit.ids, moment) AS c;
    END IF;

    WITH written AS (
        UPDATE notifyq.task t
        SET watched = true, parked = d.why, withheld = d.why IS NOT NULL,
            waiting_on = CASE WHEN d.why = 'order' THEN 'order:' || t.order_key
                              WHEN d.why = 'queue' THEN 'queue:' || t.queue
                              WHEN d.why IN ('limit', 'rate') THEN 'limit:' || t.limit_key END,
            admitted_at = CASE WHEN d.why IS NULL THEN t.processing_at END,
            expires_at = CASE WHEN d.why IS NOT NULL THEN t.expires_at END,  -- else the worker looks to it
            worker = CASE WHEN d.why IS NULL THEN t.worker END,
            attempts = t.attempts - (d.why IS NOT NULL)::integer  -- a claim that parks the task begins no attempt
        FROM (SELECT k.id, k.why FROM unnest(kept, reasons) AS k (id, why)
              UNION ALL SELECT p.id, NULL FROM unnest(passed) AS p (id) WHERE p.id <> ALL (kept)) AS d
        WHERE t.id = ANY (ARRAY[d.id])
        RETURNING t.id, t.parked, (SELECT o.expires_at FROM notifyq.task o WHERE o.id = ANY (ARRAY[t.id])) AS old_time
    )
    SELECT array_agg(w.id), array_agg(w.parked), array_agg(w.old_time) INTO decided, answers, times FROM written w;
    IF kinds && '{limit,queue}' THEN
        PERFORM notifyq.log_starts(
            ARRAY(SELECT d.id FROM unnest(decided, answers) AS d (id, why) WHERE d.why IS NULL), keys, moment);
    END IF;
    PERFORM notifyq.grant_slots(keys);
    RETURN QUERY
    SELECT * FROM unnest(decided, answers, times)
    UNION ALL SELECT c, 'cancelled', NULL FROM unnest(expired || cancelled) AS c;
END $$;
COMMENT ON FUNCTION notifyq.admit(integer, bigint[], smallint[]) IS
    'Internal: which claimed tasks may run; it parks the others.';

-- Take up to `most` rows of notifyq.slot_released, grant at their keys, and release the tasks that waited for these
-- ends. Returns how many tasks became ready, or scheduled.
CREATE FUNCTION notifyq.release_waiters(most integer DEFAULT 1000) RETURNS integer
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
COMMENT ON FUNCTION notifyq.release_waiters(integer) IS
    'Internal: releases tasks that waited for what notifyq.slot_released tells of.';

-- The safety net: have up to `most` keys looked at again at which tasks wait, from key `since` on. Returns the last of
-- them; null: there are no more.
CREATE FUNCTION notifyq.recheck_waiting(since text DEFAULT '', most integer DEFAULT 200) RETURNS text
    LANGUAGE sql BEGIN ATOMIC
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
COMMENT ON FUNCTION notifyq.recheck_waiting(text, integer) IS 'Internal: has keys at which tasks wait looked at again.';

-- =====================================================================================================================
-- 7 After
-- =====================================================================================================================
--
-- The predecessors of a task are the tasks in its `after`. It is asked about them once, when it is first claimed.
-- Each of them is then in one of three places:
--
--     live        its row gets watched = true, so that its end leaves a row in notifyq.slot_released; and a row of
--                 notifyq.dependency says which task waits for it. This row, the mark, and the parking of the task that
--                 waits commit together. Until then the predecessor's row is locked, so no end can fall in between
--     locked      by a session that may be open for an hour, or that is just ending it. No worker waits for that: the
--                 row of notifyq.dependency is not confirmed. While such a row exists, workers call release_waiters,
--                 which tries again, at the latest after their next heartbeat
--     gone        it has ended, or never existed: see notifyq.finished. One that isn't known there counts as done
--
-- The end of a predecessor deletes its rows of dependency. A task that has none left is ready, and its `after` is
-- NULL: what happens to its predecessors from now on, a retry for example, doesn't concern it. The ids stay in its
-- options. A predecessor that is dead or was cancelled cancels the tasks that wait for it, and the tasks that wait
-- for those in turn; unless on_dead is 'run'. A task that a person retries waits again for those predecessors that
-- live then, and runs whatever became of the others.
--
-- A task can only wait for ids lower than its own, whether such tasks exist or not: so there are no circles.

CREATE TABLE notifyq.dependency (
    needs         bigint      NOT NULL,
    task          bigint      NOT NULL,
    confirmed     boolean     NOT NULL,
    PRIMARY KEY (needs, task)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, vacuum_truncate = off);
CREATE INDEX dependency_task ON notifyq.dependency (task);
CREATE INDEX dependency_unconfirmed ON notifyq.dependency (needs) WHERE NOT confirmed;

COMMENT ON TABLE notifyq.dependency IS 'Which parked task waits for the end of which other.';
COMMENT ON COLUMN notifyq.dependency.needs IS 'The task whose end is waited for.';
COMMENT ON COLUMN notifyq.dependency.task IS 'The task that waits.';
COMMENT ON COLUMN notifyq.dependency.confirmed IS
    'True: the end of the other will add a row to notifyq.slot_released. False: look again.';

-- Have the ends of these tasks recorded, of those that live and are not locked. Returns these; they live until this
-- transaction ends.
CREATE FUNCTION notifyq.watch_ends(ids bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE notifyq.task t SET watched = true
    WHERE t.id = ANY (ARRAY(
        SELECT d.id FROM notifyq.task d WHERE d.id = ANY (ids) AND NOT d.watched FOR NO KEY UPDATE SKIP LOCKED));
    RETURN ARRAY(SELECT d.id FROM notifyq.task d WHERE d.id = ANY (ids) AND d.watched FOR KEY SHARE SKIP LOCKED);
END $$;
COMMENT ON FUNCTION notifyq.watch_ends(bigint[]) IS 'Internal: has the ends of tasks recorded.';

-- Of the tasks that this worker has just claimed, and that have `after`: which have to wait, and which were cancelled
-- because a predecessor is dead or was cancelled. The others have waited for theirs.
CREATE FUNCTION notifyq.await_predecessors(worker integer, ids bigint[], attempts smallint[],
                                           OUT waiting bigint[], OUT cancelled bigint[])
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    asked bigint[];
    needed bigint[];
    live bigint[];
BEGIN
    waiting := '{}';
    cancelled := '{}';
    SELECT array_agg(m.id) INTO asked
    FROM (SELECT t.id
          FROM unnest(await_predecessors.ids, await_predecessors.attempts) AS o (id, attempt)
          JOIN notifyq.task t ON t.id = ANY (ARRAY[o.id])
          WHERE t.worker IS NOT DISTINCT FROM await_predecessors.worker AND t.attempts = o.attempt
            AND t.after IS NOT NULL
          FOR UPDATE OF t SKIP LOCKED) AS m;
    IF asked IS NULL THEN
        RETURN;
    END IF;
    FOR n IN 1..3 LOOP
        needed := ARRAY(
            SELECT d.id
            FROM (SELECT DISTINCT a.id
                  FROM notifyq.task t CROSS JOIN unnest(t.after) AS a (id) WHERE t.id = ANY (asked)) AS a
            JOIN notifyq.task d ON d.id = ANY (ARRAY[a.id]));
        EXIT WHEN needed = '{}';
        live := notifyq.watch_ends(needed);
        EXIT WHEN cardinality(live) = cardinality(needed) OR n = 3;
        PERFORM pg_sleep(0.003);  -- mostly a worker is just claiming or ending it
    END LOOP;
    IF needed <> '{}' THEN
        -- A predecessor that is gone by now isn't waited for.
        INSERT INTO notifyq.dependency (needs, task, confirmed)
        SELECT d.id, t.id, false
        FROM notifyq.task t
        CROSS JOIN unnest(t.after) AS a (id)
        JOIN notifyq.task d ON d.id = ANY (ARRAY[a.id])
        WHERE t.id = ANY (asked)
        ON CONFLICT DO NOTHING;
        UPDATE notifyq.dependency d SET confirmed = true
        WHERE d.needs = ANY (live) AND d.task = ANY (asked) AND NOT d.confirmed;
    END IF;
    cancelled := notifyq.cancel_dependents(ARRAY(
        SELECT t.id FROM notifyq.task t WHERE t.id = ANY (asked) AND t.options ->> 'on_dead' IS DISTINCT FROM 'run'));
    waiting := ARRAY(SELECT DISTINCT d.task FROM notifyq.dependency d WHERE d.task = ANY (asked));
    UPDATE notifyq.task t SET after = NULL WHERE t.id = ANY (asked) AND t.id <> ALL (waiting);
END $$;
COMMENT ON FUNCTION notifyq.await_predecessors(integer, bigint[], smallint[]) IS
    'Internal: which claimed tasks have to wait for the ends of others.';

-- Cancel those of these tasks that have a predecessor which is dead or was cancelled. Returns them. The caller has
-- locked the rows of all.
CREATE FUNCTION notifyq.cancel_dependents(ids bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    bad bigint[];
    reasons text[];
BEGIN
    SELECT array_agg(b.id), array_agg(b.reason) INTO bad, reasons
    FROM (SELECT DISTINCT ON (t.id) t.id,
                 'task ' || f.id || ' (' || left(f.type, 200) || '), which it was to run after, '
                     || CASE f.state WHEN 'dead' THEN 'is dead' ELSE 'was cancelled' END AS reason
          FROM notifyq.task t
          CROSS JOIN unnest(t.after) AS a (id)
          JOIN notifyq.finished f ON f.id = ANY (ARRAY[a.id])
          WHERE t.id = ANY (ids) AND f.state <> 'done'
            AND NOT EXISTS (SELECT FROM notifyq.task d WHERE d.id = f.id)  -- an older task may have had the same id
          ORDER BY t.id, f.id) AS b;
    RETURN CASE WHEN bad IS NULL THEN '{}' ELSE notifyq.cancel_for(bad, reasons) END;
END $$;
COMMENT ON FUNCTION notifyq.cancel_dependents(bigint[]) IS
    'Internal: cancels tasks that wait for one which is dead or was cancelled.';

-- These tasks have ended: make the tasks ready that waited for them and wait for no others, or cancel them. Returns
-- how many are ready. It also looks at dependencies that are not confirmed.
CREATE FUNCTION notifyq.release_dependents(ended bigint[]) RETURNS integer
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
    -- One session at a time. Of two that each end one of a task's last two predecessors, neither would see that none is
    -- left. This lock comes after those of keys.
    PERFORM FROM notifyq.key_lock l WHERE l.n = -1 FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO notifyq.key_lock (n) VALUES (-1) ON CONFLICT (n) DO NOTHING;
        PERFORM FROM notifyq.key_lock l WHERE l.n = -1 FOR UPDATE;
    END IF;
    LOOP
        needed := ARRAY(
            SELECT d.needs FROM notifyq.dependency d WHERE d.needs = ANY (ended)
            UNION SELECT d.needs FROM notifyq.dependency d WHERE NOT d.confirmed);
        EXIT WHEN needed = '{}';
        held := notifyq.watch_ends(needed);  -- also tasks that had ended, and were retried before this came to look
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
            IF cardinality(mine) < cardinality(locked) THEN  -- have release_waiters called for the others
                INSERT INTO notifyq.slot_released (task, ended, queue) VALUES (0, false, '');
            END IF;
        END IF;
        stuck := ARRAY(  -- tasks that are locked, or too large together: the next call looks at them
            SELECT t.id FROM notifyq.task t
            WHERE t.id = ANY (ARRAY(SELECT DISTINCT d.task FROM notifyq.dependency d WHERE d.needs = ANY (gone)))
            EXCEPT SELECT unnest(mine));
        UPDATE notifyq.dependency d SET confirmed = false
        WHERE d.confirmed AND d.needs = ANY (gone) AND d.task = ANY (stuck);
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
        EXIT WHEN ended = '{}';  -- else go on with the tasks that waited for the cancelled ones
    END LOOP;
    RETURN total;
END $$;
COMMENT ON FUNCTION notifyq.release_dependents(bigint[]) IS
    'Internal: releases tasks that waited for the ends of others.';

-- =====================================================================================================================
-- 8 Queues
-- =====================================================================================================================
--
-- The table notifyq.queue is in chapter 6. Workers read it at least four times a second while they claim, and when a
-- notification says 'queues'.

-- No more tasks start from the queue; running ones go on. Returns whether the queue wasn't paused before.
CREATE FUNCTION notifyq.pause(queue text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    WITH changed AS (
        INSERT INTO notifyq.queue AS q (name, paused) VALUES ($1, true)
        ON CONFLICT (name) DO UPDATE SET paused = true WHERE NOT q.paused
        RETURNING notifyq.notify_unless_full('notifyq', 'queues')
    )
    SELECT EXISTS (SELECT FROM changed);
END;
COMMENT ON FUNCTION notifyq.pause(text) IS
    'Start no more tasks from a queue; running ones go on. Returns whether the queue was not paused before.';

CREATE FUNCTION notifyq.resume(queue text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    WITH changed AS (
        UPDATE notifyq.queue q SET paused = false WHERE q.name = $1 AND q.paused
        RETURNING notifyq.notify_unless_full('notifyq', 'queues')
    )
    SELECT EXISTS (SELECT FROM changed)
    -- Grants passed over its tasks.
    FROM (SELECT notifyq.recheck_waiting('', 10000) FROM changed UNION ALL SELECT NULL LIMIT 1) AS told;
END;
COMMENT ON FUNCTION notifyq.resume(text) IS
    'Start tasks from a paused queue again. Returns whether the queue was paused.';

-- Of the queue's tasks at most `running` run at the same time, and at most `rate` start in any `seconds`, over all
-- workers; null: no such limit. Running tasks count.
CREATE FUNCTION notifyq.limit_queue(queue text, running integer DEFAULT NULL, rate integer DEFAULT NULL,
                                    seconds float8 DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (rate IS NULL) <> (seconds IS NULL) THEN
        RAISE EXCEPTION 'rate and seconds go together: at most this many starts in any period of this length'
            USING ERRCODE = '22023';
    END IF;
    INSERT INTO notifyq.queue AS q (name, limit_running, limit_rate, limit_seconds) VALUES ($1, $2, $3, $4)
    ON CONFLICT (name) DO UPDATE SET limit_running = $2, limit_rate = $3, limit_seconds = $4;
    PERFORM notifyq.admit_running(ARRAY[$1]);
    INSERT INTO notifyq.slot_released (task, ended, queue) VALUES (0, false, $1);  -- a higher limit has free slots
    PERFORM notifyq.notify_unless_full('notifyq', 'queues');
END $$;
COMMENT ON FUNCTION notifyq.limit_queue(text, integer, integer, float8) IS
    'Limit a queue over all workers: at most this many running at once, and at most this many starts in this many '
    'seconds. NULL: no such limit.';

-- Running tasks of these queues that were claimed by workers which knew of no limit count from now on.
CREATE FUNCTION notifyq.admit_running(queues text[], worker integer DEFAULT NULL) RETURNS void LANGUAGE sql BEGIN ATOMIC
    UPDATE notifyq.task SET admitted_at = processing_at, watched = true
    WHERE id = ANY (ARRAY(
        SELECT t.id FROM notifyq.task t
        WHERE t.worker IS NOT NULL AND t.queue = ANY ($1) AND ($2 IS NULL OR t.worker = $2)
          AND t.admitted_at IS DISTINCT FROM t.processing_at
          AND t.limit_key IS NULL AND t.order_key IS NULL AND t.after IS NULL
        ORDER BY t.id FOR UPDATE));
END;
COMMENT ON FUNCTION notifyq.admit_running(text[], integer) IS
    'Internal: has running tasks count against the limits of their queues.';

-- =====================================================================================================================
-- 9 Cron
-- =====================================================================================================================
--
-- A row says what to enqueue when. Workers whose app has the cron write the row when they start, and look here every
-- 1.5 s. In this chapter a slot is a time at which the cron is due. One that comes within 3 s is inserted as a
-- scheduled task, and next_at moves on to the slot after it, in one statement, which applies only if next_at is what it
-- was. So each slot has one task, however many workers look, and whenever one dies; and the timers that every scheduled
-- task has start it at its time. Python computes the next slot (notifyq/cron.py), in the row's time zone; the current
-- time is this server's.

CREATE TABLE notifyq.cron (
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
    -- A time that Python can't read would end the workers that look.
    next_at       timestamptz CHECK (next_at BETWEEN '0001-01-03Z' AND '9999-12-30Z'),
    last_at       timestamptz,
    recent        bigint[]    NOT NULL DEFAULT '{}'
);

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
COMMENT ON COLUMN notifyq.cron.paused IS 'True: no slot is enqueued. notifyq.cron_run works all the same.';
COMMENT ON COLUMN notifyq.cron.next_at IS 'The next slot; NULL: it is computed from now on.';
COMMENT ON COLUMN notifyq.cron.last_at IS 'The latest slot that was enqueued.';
COMMENT ON COLUMN notifyq.cron.recent IS 'The ids of the latest tasks, the newest first.';

-- From now on no slot of the cron is enqueued. Of its latest tasks (recent) those that have begun no attempt are
-- cancelled: tasks that were inserted in advance, are ready, or are parked. Returns whether there is such a cron. These
-- are statements of their own, since the second must see what the first waits for.
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
COMMENT ON FUNCTION notifyq.cron_pause(text) IS
    'Stop a cron, and cancel those of its tasks that have begun no attempt. Returns whether there is such a cron.';

-- Go on, with the next slot from now: slots of the pause don't count as missed. Returns whether there is such a cron.
CREATE FUNCTION notifyq.cron_resume(name text) RETURNS boolean LANGUAGE sql BEGIN ATOMIC
    UPDATE notifyq.cron c SET paused = false, next_at = NULL WHERE c.name = $1 AND c.paused;
    SELECT EXISTS (SELECT FROM notifyq.cron c WHERE c.name = $1);
END;
COMMENT ON FUNCTION notifyq.cron_resume(text) IS
    'Let a paused cron go on, with its next slot from now. Returns whether there is such a cron.';

-- Enqueue its task now, paused or not, in addition to its slots. Returns the task's id; NULL: there is no such cron.
CREATE FUNCTION notifyq.cron_run(name text) RETURNS bigint LANGUAGE sql BEGIN ATOMIC
    INSERT INTO notifyq.task (type, payload, queue, priority, options)
    SELECT c.type, c.payload, c.queue, c.priority, c.options FROM notifyq.cron c WHERE c.name = $1 RETURNING id;
END;
COMMENT ON FUNCTION notifyq.cron_run(text) IS
    'Enqueue the task of a cron now. Returns its id; NULL: there is no such cron.';

-- =====================================================================================================================
-- 10 Views
-- =====================================================================================================================

-- The stable way to read tasks.
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
SELECT id, queue, type, state, priority, attempts, max_attempts, created_at, run_at, processing_at, processed_at,
       payload, errors -> -1 ->> 'error', result, worker, errors, NULL, NULL, NULL, options
FROM notifyq.finished;

COMMENT ON VIEW notifyq.all_tasks IS
    'One row for every task that is still known, finished ones included: the stable way to read tasks.';
COMMENT ON COLUMN notifyq.all_tasks.id IS 'The id of the task.';
COMMENT ON COLUMN notifyq.all_tasks.queue IS 'Its queue.';
COMMENT ON COLUMN notifyq.all_tasks.type IS 'The name of the kind of task.';
COMMENT ON COLUMN notifyq.all_tasks.state IS
    'scheduled (parked tasks too: see waits_for), ready, running, done, dead or cancelled.';
COMMENT ON COLUMN notifyq.all_tasks.priority IS 'Higher runs first, within a queue.';
COMMENT ON COLUMN notifyq.all_tasks.attempts IS 'How many attempts have begun.';
COMMENT ON COLUMN notifyq.all_tasks.max_attempts IS
    'After this many failed attempts it is dead; NULL: what its type says, else 10.';
COMMENT ON COLUMN notifyq.all_tasks.created_at IS 'When it was inserted.';
COMMENT ON COLUMN notifyq.all_tasks.run_at IS 'The earliest time to run it.';
COMMENT ON COLUMN notifyq.all_tasks.processing_at IS 'When its latest attempt was claimed.';
COMMENT ON COLUMN notifyq.all_tasks.processed_at IS 'When its latest attempt ended.';
COMMENT ON COLUMN notifyq.all_tasks.payload IS 'What its handler gets.';
COMMENT ON COLUMN notifyq.all_tasks.error IS 'The text of the latest error.';
COMMENT ON COLUMN notifyq.all_tasks.result IS 'What its handler returned.';
COMMENT ON COLUMN notifyq.all_tasks.worker IS 'host:pid of the worker that runs it, or ran it last.';
COMMENT ON COLUMN notifyq.all_tasks.errors IS 'A JSON array of what went wrong, oldest first; shortened beyond 200.';
COMMENT ON COLUMN notifyq.all_tasks.waits_for IS
    'What keeps it back: limit, rate, queue, order, after or crashed; NULL: nothing.';
COMMENT ON COLUMN notifyq.all_tasks.progress IS 'How far its handler says it is, from 0 to 1.';
COMMENT ON COLUMN notifyq.all_tasks.note IS 'What its handler says it is doing.';
COMMENT ON COLUMN notifyq.all_tasks.options IS 'The options it was enqueued with, or what notifyq.retry left of them.';

-- Queues that were paused or limited, that a live worker serves, or that have a ready or running task; unhandled tasks
-- don't count as ready here. `waiting` counts the tasks that the queue's own limits keep back.
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

COMMENT ON VIEW notifyq.all_queues IS
    'Queues that were paused or limited, that a live worker serves, or that have a ready or running task.';
COMMENT ON COLUMN notifyq.all_queues.name IS 'The name of the queue.';
COMMENT ON COLUMN notifyq.all_queues.paused IS 'True: no task starts from it.';
COMMENT ON COLUMN notifyq.all_queues.limit_running IS
    'At most this many of its tasks run at once; NULL: no such limit.';
COMMENT ON COLUMN notifyq.all_queues.limit_rate IS
    'At most this many of its tasks start in limit_seconds; NULL: no such limit.';
COMMENT ON COLUMN notifyq.all_queues.limit_seconds IS 'The length of the window of limit_rate, in seconds.';
COMMENT ON COLUMN notifyq.all_queues.running IS 'How many of its tasks run.';
COMMENT ON COLUMN notifyq.all_queues.waiting IS 'How many of its tasks the limits of the queue keep back.';
COMMENT ON COLUMN notifyq.all_queues.workers IS 'How many live workers serve it.';

-- =====================================================================================================================
-- 11 Claims
-- =====================================================================================================================
--
-- Functions of the statements in sql/worker/claim*.sql, mostly for what these return. PostgreSQL inlines a function
-- whose body is one expression without a subquery: plans and costs are as if its callers had the expression.

-- Not inlined, and called for compressed payloads only. The elements of an array aren't compressed. So payload is made
-- an element once, to be measured and to be returned.
CREATE FUNCTION notifyq.decompress_payload(payload jsonb, most integer) RETURNS jsonb STABLE LANGUAGE sql BEGIN ATOMIC
    SELECT p.whole[1] FROM (SELECT ARRAY[payload] AS whole OFFSET 0) AS p WHERE pg_column_size(p.whole) <= most;
END;
COMMENT ON FUNCTION notifyq.decompress_payload(jsonb, integer) IS
    'Internal: a compressed payload, if it is short enough.';

-- payload, if it takes at most `most` bytes when it isn't compressed; else NULL, and the runner fetches it later.
--
-- pg_column_size is the size on disk, where a compressed payload can take an 87th of its size (pglz), or a 255th (lz4).
-- To measure such a payload costs 2 us.
CREATE FUNCTION notifyq.inline_payload(payload jsonb, most integer) RETURNS jsonb STABLE LANGUAGE sql BEGIN ATOMIC
    SELECT CASE WHEN pg_column_size(payload) > most THEN NULL
                WHEN pg_column_compression(payload) IS NULL THEN payload
                ELSE notifyq.decompress_payload(payload, most) END;
END;
COMMENT ON FUNCTION notifyq.inline_payload(jsonb, integer) IS 'Internal: a payload that is short enough for a claim.';

-- Whether a claimed task must be admitted before it runs: see chapters 6 and 7.
CREATE FUNCTION notifyq.needs_admission(limit_key text, order_key text, after bigint[], expires_at timestamptz)
    RETURNS boolean IMMUTABLE LANGUAGE sql BEGIN ATOMIC
    SELECT limit_key IS NOT NULL OR order_key IS NOT NULL OR after IS NOT NULL OR expires_at IS NOT NULL;
END;
COMMENT ON FUNCTION notifyq.needs_admission(text, text, bigint[], timestamptz) IS
    'Internal: whether a task has a key, predecessors or a time by which it must start.';

-- moment, or the nearest time that Python's datetime has.
CREATE FUNCTION notifyq.readable_time(moment timestamptz) RETURNS timestamptz IMMUTABLE LANGUAGE sql BEGIN ATOMIC
    SELECT greatest(least(moment, '9999-12-30Z'), '0001-01-03Z');
END;
COMMENT ON FUNCTION notifyq.readable_time(timestamptz) IS 'Internal: a time within the bounds of Python.';

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
) RETURNS bigint[] STABLE LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
COMMENT ON FUNCTION notifyq.choose_fitting(bigint[], text[], text[], integer[], integer[], integer) IS
    'Internal: which claimable tasks fit into the free threads of a worker.';

-- =====================================================================================================================
-- 12 Roles
-- =====================================================================================================================
--
-- Roles. No privilege on the schema or its tables is granted by default; give each of your roles what it needs. EXECUTE
-- on the functions is granted to all: each function runs with its caller's rights, and no more.
--
--   may enqueue   GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT INSERT (type, payload, queue, priority, run_at, max_attempts, options) ON notifyq.task TO r;
--                 GRANT SELECT (id, created_at) ON notifyq.task TO r;
--                 GRANT INSERT ON notifyq.bell TO r;  -- to lock it; it takes no row. Without this, each INSERT rings
--   with keys     GRANT SELECT, INSERT, UPDATE ON notifyq.unique_key TO r;  -- in addition, to enqueue unique tasks
--                 GRANT SELECT (id, state) ON notifyq.all_tasks TO r;
--                 GRANT SELECT (worker, options, expires_at), UPDATE (note) ON notifyq.task TO r;  -- UPDATE, to lock
--                 GRANT SELECT (withheld, waiting_on, run_at, attempts) ON notifyq.task TO r;  -- to replace and move:
--                 GRANT UPDATE (type, payload, run_at, promoted, options, expires_at) ON notifyq.task TO r;
--   may read      GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT SELECT ON notifyq.all_tasks, notifyq.all_queues, notifyq.worker TO r;
--                 GRANT SELECT ON notifyq.queue, notifyq.cron, notifyq.schema_version TO r;
--   may await     GRANT USAGE ON SCHEMA notifyq TO r;  -- results and progress
--                 GRANT SELECT ON notifyq.all_tasks TO r;
--                 GRANT SELECT (id, awaited), UPDATE (awaited) ON notifyq.task TO r;
--   operator      GRANT USAGE ON SCHEMA notifyq TO r;  -- pause, resume and limit queues; retry and cancel tasks; crons
--                 GRANT SELECT ON ALL TABLES IN SCHEMA notifyq TO r;
--                 GRANT INSERT, DELETE ON notifyq.task, notifyq.finished TO r;
--                 GRANT UPDATE (run_at, promoted, expires_at, admitted_at, watched) ON notifyq.task TO r;
--                 GRANT INSERT ON notifyq.slot_released, notifyq.bell TO r;
--                 GRANT INSERT, UPDATE ON notifyq.queue TO r;
--                 GRANT DELETE, UPDATE (paused, next_at) ON notifyq.cron TO r;
--   worker        GRANT USAGE ON SCHEMA notifyq TO r;
--                 GRANT ALL ON ALL TABLES IN SCHEMA notifyq TO r;
--                 GRANT ALL ON ALL SEQUENCES IN SCHEMA notifyq TO r;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA notifyq FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA notifyq TO PUBLIC;
