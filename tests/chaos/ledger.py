"""Triggers that write down every transition of every row, in the transaction that makes it; for chaos runs only.

A row of the ledger is there if and only if what it tells of was committed. Of one task they are in the order in which
they happened, as each needs the lock of the task's row; when each was committed PostgreSQL itself keeps.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .history import Row

INSTALL = """
CREATE SCHEMA chaos;
CREATE TABLE chaos.ledger (
    seq bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz DEFAULT clock_timestamp(),
    who text DEFAULT session_user,
    app text DEFAULT current_setting('application_name'),
    op text, id bigint, was_worker integer, was_attempts integer, worker integer, attempts integer,
    run_at timestamptz, withheld boolean, queue text, type text, n text, note text, bytes integer,
    limit_key text, order_key text, options jsonb
) WITH (autovacuum_enabled = false);

-- The writer's session_user stays what it is: who did it. Of a large payload the number is
-- read once, as that decompresses all of it.
CREATE FUNCTION chaos.task() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE r notifyq.task; o notifyq.task;
BEGIN
    IF TG_OP <> 'INSERT' THEN o := OLD; END IF;
    IF TG_OP = 'DELETE' THEN r := OLD; ELSE r := NEW; END IF;
    INSERT INTO chaos.ledger (op, id, was_worker, was_attempts, worker, attempts, run_at, withheld, queue, type, n,
                              note, limit_key, order_key, options)
    VALUES (left(TG_OP, 1), r.id, o.worker, o.attempts, CASE WHEN TG_OP <> 'DELETE' THEN r.worker END, r.attempts,
            r.run_at, r.withheld, r.queue, r.type,
            CASE WHEN TG_OP = 'INSERT' OR pg_column_size(r.payload) < 1000 THEN r.payload ->> 'n' END,
            CASE WHEN TG_OP = 'UPDATE' AND r.errors IS DISTINCT FROM o.errors THEN r.errors -> -1 ->> 'error' END,
            r.limit_key, r.order_key, r.options);
    RETURN NULL;
END $$;
CREATE FUNCTION chaos.finished() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE r notifyq.finished;
BEGIN
    IF TG_OP = 'DELETE' THEN r := OLD; ELSE r := NEW; END IF;
    INSERT INTO chaos.ledger (op, id, attempts, queue, type, note, bytes)
    VALUES (CASE TG_OP WHEN 'INSERT' THEN 'F' ELSE 'X' END, r.id, r.attempts, r.queue, r.type,
            r.state || ' ' || left(coalesce(r.result::text, r.errors -> -1 ->> 'error', ''), 1000),
            octet_length(r.result ->> 0));
    RETURN NULL;
END $$;
CREATE FUNCTION chaos.worker() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN INSERT INTO chaos.ledger (op, id, note) VALUES ('W', NEW.id, NEW.name);
    ELSE INSERT INTO chaos.ledger (op, id, note) VALUES ('B', OLD.id, OLD.name); END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos AFTER INSERT OR UPDATE OR DELETE ON notifyq.task FOR EACH ROW EXECUTE FUNCTION chaos.task();
CREATE TRIGGER chaos AFTER INSERT OR DELETE ON notifyq.finished FOR EACH ROW EXECUTE FUNCTION chaos.finished();
CREATE TRIGGER chaos AFTER INSERT OR DELETE ON notifyq.worker FOR EACH ROW EXECUTE FUNCTION chaos.worker();

-- The three roles of schema.sql's last page; every worker process logs in as a member of the first.
CREATE ROLE chaos_worker;
GRANT USAGE ON SCHEMA notifyq TO chaos_worker;
GRANT ALL ON ALL TABLES IN SCHEMA notifyq TO chaos_worker;
GRANT ALL ON ALL SEQUENCES IN SCHEMA notifyq TO chaos_worker;
GRANT pg_signal_backend TO chaos_worker;  -- they take the turn from each other, and are not one role here
CREATE ROLE chaos_stranger LOGIN;
"""

READ = """
SELECT op, id, seq, extract(epoch FROM at)::float8 AS at,
       extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 AS committed, who, app,
       was_worker, coalesce(was_attempts, 0) AS was_attempts, worker, coalesce(attempts, 0) AS attempts,
       coalesce(extract(epoch FROM greatest(run_at, 'epoch')), 0)::float8 AS run_at,
       coalesce(withheld, false) AS withheld, coalesce(queue, '') AS queue, coalesce(type, '') AS type, n,
       coalesce(note, '') AS note,
       coalesce(bytes, 0) AS bytes, limit_key, (options ->> 'limit_running')::integer AS most,
       (options ->> 'limit_rate')::integer AS rate, (options ->> 'limit_seconds')::float8 AS seconds,
       order_key, options ->> 'unique_key' AS unique_key,
       ARRAY(SELECT jsonb_array_elements_text(options -> 'after')::bigint) AS after, options ->> 'on_dead' AS on_dead
FROM chaos.ledger ORDER BY seq
"""


async def read(conn: Any) -> list[Row]:
    return [msgspec.convert(dict(row), Row) for row in await conn.fetch(READ)]
