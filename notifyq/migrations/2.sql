-- From version 1 to 2: unique tasks, limits, order, dependencies, results, progress, cron. A step is a transaction, and
-- can be run again; see notifyq/schema.py.

-- step
ALTER TABLE notifyq.task
    ADD COLUMN IF NOT EXISTS unique_key text,
    ADD COLUMN IF NOT EXISTS order_key text,
    ADD COLUMN IF NOT EXISTS limit_key text,
    ADD COLUMN IF NOT EXISTS limit_running integer,
    ADD COLUMN IF NOT EXISTS limit_rate integer,
    ADD COLUMN IF NOT EXISTS limit_seconds float8,
    ADD COLUMN IF NOT EXISTS after bigint[],
    ADD COLUMN IF NOT EXISTS on_dead text,
    ADD COLUMN IF NOT EXISTS parked text,
    ADD COLUMN IF NOT EXISTS tracked boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS awaited boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS progress real,
    ADD COLUMN IF NOT EXISTS note text;

-- step: concurrently
CREATE INDEX CONCURRENTLY task_set_aside ON notifyq.task (type, queue, priority DESC, id)
    WHERE worker IS NULL AND aside AND parked IS NULL;

-- step: concurrently
DROP INDEX CONCURRENTLY IF EXISTS notifyq.task_aside;

-- step
ALTER TABLE notifyq.finished
    ADD COLUMN IF NOT EXISTS order_key text,
    ADD COLUMN IF NOT EXISTS limit_key text,
    ADD COLUMN IF NOT EXISTS limit_running integer,
    ADD COLUMN IF NOT EXISTS limit_rate integer,
    ADD COLUMN IF NOT EXISTS limit_seconds float8;

-- The rest (new tables, functions, triggers, the view) follows as it is in schema.sql.
