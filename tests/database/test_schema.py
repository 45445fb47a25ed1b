"""schema.sql: how it is installed, what people call and read, and what each role may and may not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.database.schema import SCHEMA_VERSION
from notifyq.embedded import Server
from notifyq.errors import DatabaseError, SchemaError
from notifyq.worker import job as claims

from ..helpers.databases import admin, grants
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen

# --- Installing


@pytest.fixture
async def empty(empty_dsn: str) -> AsyncIterator[Any]:
    conn = await connection.connect(empty_dsn, role="test")
    yield conn
    conn.terminate()


async def test_migrate_installs_and_then_does_nothing(empty: Any) -> None:
    assert await schema.installed_version(empty) is None
    assert await schema.migrate(empty) == (None, schema.SCHEMA_VERSION)
    await empty.execute("INSERT INTO notifyq.task (type) VALUES ('T')")
    assert await schema.migrate(empty) == (schema.SCHEMA_VERSION, schema.SCHEMA_VERSION)
    assert await schema.check(empty) == schema.SCHEMA_VERSION
    assert await empty.fetchval("SELECT count(*) FROM notifyq.task") == 1


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_two_migrations_at_once_take_turns(empty_dsn: str, isolation: str) -> None:
    """Whatever the default is in this database: one that waited must see what the other has installed."""
    found = []

    async def migrate() -> None:
        settings = {"default_transaction_isolation": isolation}
        conn = await connection.connect(empty_dsn, role="test", settings=settings)
        found.append(await schema.migrate(conn))
        await conn.close()

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(migrate)
    assert sorted(found, key=str) == [(SCHEMA_VERSION, SCHEMA_VERSION)] * 2 + [(None, SCHEMA_VERSION)]


async def test_migrate_takes_no_names_from_the_search_path(empty_dsn: str) -> None:
    settings = {"search_path": "evil, pg_catalog"}
    conn: Any = await connection.connect(empty_dsn, role="test", settings=settings)
    await conn.execute(EVIL)
    await schema.migrate(conn)
    assert await conn.fetchval("SELECT notifyq.enqueue('T', '{}')") == 1
    assert await conn.fetchval("SELECT called FROM evil.called") == 0
    await conn.close()


async def test_a_missing_schema_says_how_to_install_it(empty: Any) -> None:
    name = await empty.fetchval("SELECT current_database()")
    with pytest.raises(SchemaError, match=rf"^database '{name}' has no schema notifyq; .*notifyq migrate$"):
        await schema.check(empty)


async def test_a_newer_schema_is_refused(empty: Any) -> None:
    await schema.migrate(empty)
    await empty.execute("INSERT INTO notifyq.schema_version (version, serves) VALUES (7, 7)")
    for refuse in (schema.check, schema.migrate):
        with pytest.raises(SchemaError, match=rf"is version 7, newer than .* knows {SCHEMA_VERSION}; upgrade notifyq"):
            await refuse(empty)


async def test_an_older_schema_asks_for_migrate(empty: Any) -> None:
    await schema.migrate(empty)
    await empty.execute("UPDATE notifyq.schema_version SET version = 0")
    with pytest.raises(SchemaError, match=f"is version 0, this notifyq needs {SCHEMA_VERSION}; run: notifyq migrate"):
        await schema.check(empty)


@pytest.mark.parametrize(
    "what",
    [
        "",
        "CREATE TABLE notifyq.task (id integer)",
        "CREATE TABLE notifyq.schema_version (name text)",
        "CREATE TABLE notifyq.schema_version (version text); INSERT INTO notifyq.schema_version VALUES ('v1')",
        "CREATE TABLE notifyq.schema_version (version integer)",
    ],
    ids=["empty", "other tables", "other columns", "other types", "no version"],
)
async def test_a_strangers_schema_of_that_name_is_left_alone(empty: Any, what: str) -> None:
    await empty.execute(f"CREATE SCHEMA notifyq; {what}")
    for refuse in (schema.check, schema.migrate):
        with pytest.raises(SchemaError, match="has a schema notifyq that notifyq didn't make; rename or drop"):
            await refuse(empty)
    assert await empty.fetchval("SELECT to_regclass('notifyq.finished')") is None


async def test_a_migration_that_fails_leaves_nothing(empty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = schema.schema_sql()
    monkeypatch.setattr(schema, "schema_sql", lambda: f"{text}; SELECT 1 / 0")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await schema.migrate(empty)
    assert await schema.installed_version(empty) is None


async def test_who_may_not_create_is_told_so(empty: Any) -> None:
    await empty.execute("SET ROLE pg_monitor")
    with pytest.raises(DatabaseError, match=r"may not create the schema, .* as the database's owner"):
        await schema.migrate(empty)


async def test_a_standby_is_told_so(empty_dsn: str) -> None:
    conn = await connection.connect(empty_dsn, role="test", settings={"default_transaction_read_only": "on"})
    with pytest.raises(DatabaseError, match="read-only"):
        await schema.migrate(conn)
    await conn.close()


# --- What people call and read


@pytest.fixture
async def conn(dsn: str) -> AsyncIterator[Any]:
    """A person's connection, in a transaction that is rolled back at the end."""
    conn = await connection.connect(dsn, role="test")
    transaction = conn.transaction()
    await transaction.start()
    yield conn
    conn.terminate()


CONTRACT = {
    "id": "bigint",
    "queue": "text",
    "type": "text",
    "state": "text",
    "priority": "smallint",
    "attempts": "smallint",
    "max_attempts": "smallint",
    "created_at": "timestamp with time zone",
    "run_at": "timestamp with time zone",
    "processing_at": "timestamp with time zone",
    "processed_at": "timestamp with time zone",
    "payload": "jsonb",
    "error": "text",
    "result": "jsonb",
    "worker": "text",
    "errors": "jsonb",  # from here on beside the contract
    "waits_for": "text",
    "progress": "real",
    "note": "text",
    "options": "jsonb",
}


async def test_all_tasks_has_the_columns_of_the_contract(conn: Any) -> None:
    rows = await conn.fetch(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = 'notifyq.all_tasks'::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert [tuple(row) for row in rows] == list(CONTRACT.items())


MAKE = {
    "ready": "INSERT INTO notifyq.task (type) VALUES ('T')",
    "scheduled": "INSERT INTO notifyq.task (type, run_at) VALUES ('T', now() + interval '1 h')",
    "promoted": "INSERT INTO notifyq.task (type, run_at, promoted) VALUES ('T', now() + interval '1 h', true)",
    "unhandled": "INSERT INTO notifyq.task (type, withheld) VALUES ('T', true)",
    "running": "INSERT INTO notifyq.task (type, worker, attempts, errors) VALUES ('T', 1, 2, '[{\"error\": \"x\"}]')",
} | {
    state: f"""INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, state, queue,
                                             type, payload, errors)
               VALUES (50, now(), now(), now(), 3, 10, '{state}', 'q', 'T', '{{"a": 1}}', '[{{"error": "x"}}]')"""
    for state in ("done", "dead", "cancelled")
}


async def make(conn: Any, what: str) -> int:
    """A task in this state, held by worker 1 if it is running."""
    await conn.fetchval(SQL["register_worker"], "host:1", ["default"], ["T"], [10], 1, 30.0)
    await conn.execute("UPDATE notifyq.worker SET id = 1")
    id: int = await conn.fetchval(f"{MAKE[what]} RETURNING id")
    return id


async def see(conn: Any, id: int) -> Any:
    return await conn.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id)


@pytest.mark.parametrize("what", MAKE)
async def test_all_tasks_names_the_state(conn: Any, what: str) -> None:
    row = await see(conn, await make(conn, what))
    assert row["state"] == {"promoted": "ready", "unhandled": "ready"}.get(what, what)
    assert row["worker"] == ("host:1" if what == "running" else None)
    assert row["error"] == ("x" if what in ("running", "done", "dead", "cancelled") else None)


@pytest.mark.parametrize("what", MAKE)
async def test_cancel(conn: Any, what: str) -> None:
    """Ends what lives, running or not, and says so; of what is over, and of the unknown, it says false."""
    id = await make(conn, what)
    before = await see(conn, id)
    lives = what not in ("done", "dead", "cancelled")
    assert await conn.fetchval("SELECT notifyq.cancel($1)", id) is lives
    after = await see(conn, id)
    if not lives:
        assert after == before
        return
    assert after["state"] == "cancelled"
    kept = ("id", "queue", "type", "priority", "attempts", "created_at", "run_at", "payload", "worker", "errors")
    assert [after[column] for column in kept] == [before[column] for column in kept]
    assert await conn.fetchval("SELECT notifyq.cancel($1)", id) is False, "once"


@pytest.mark.parametrize("what", MAKE)
async def test_retry(conn: Any, what: str) -> None:
    """Brings back what is dead or cancelled, hastens what is scheduled; the rest it leaves alone, and says false."""
    id = await make(conn, what)
    before = await see(conn, id)
    assert await conn.fetchval("SELECT notifyq.retry($1)", id) is (what in ("dead", "cancelled", "scheduled"))
    after = await see(conn, id)
    if what in ("dead", "cancelled", "scheduled"):
        assert (after["state"], after["attempts"], after["result"]) == ("ready", 0, None)
        kept = ("id", "queue", "type", "priority", "max_attempts", "created_at", "payload", "errors")
        assert [after[column] for column in kept] == [before[column] for column in kept]
        jobs = await claims.claim(conn, 1, {after["queue"]: 9}, 9)
        assert [(job.id, job.attempt) for job in jobs] == [(id, 1)]
    else:
        assert after == before
    assert await conn.fetchval("SELECT notifyq.retry($1)", id) is False, "once"


@pytest.mark.parametrize("function", ["cancel", "retry"])
async def test_of_an_unknown_id_they_say_false(conn: Any, function: str) -> None:
    for id in (1, -1, 2**63 - 1, None):
        assert await conn.fetchval(f"SELECT notifyq.{function}($1)", id) is False


async def test_a_cancelled_task_can_be_retried_and_cancelled_again(conn: Any) -> None:
    id = await make(conn, "scheduled")
    for function, state in (("cancel", "cancelled"), ("retry", "ready"), ("cancel", "cancelled")):
        assert await conn.fetchval(f"SELECT notifyq.{function}($1)", id) is True
        assert (await see(conn, id))["state"] == state


async def test_enqueue_has_the_tables_defaults(conn: Any) -> None:
    """A row by the function, and one by INSERT: the same but for id and created_at."""
    await conn.fetchval("SELECT notifyq.enqueue('T')")
    await conn.execute("INSERT INTO notifyq.task (type) VALUES ('T')")
    one, other = await conn.fetch("SELECT * FROM notifyq.task ORDER BY id")
    different = {column for column in one.keys() if one[column] != other[column]}  # noqa: SIM118 - a Record
    assert different == {"id", "created_at"}
    assert (one["queue"], one["payload"], one["priority"], one["max_attempts"]) == ("default", b"{}", 0, None)
    assert (one["attempts"], one["worker"], one["promoted"], one["withheld"]) == (0, None, False, False)
    assert one["run_at"] <= one["created_at"]


async def test_enqueue_takes_names_and_positions(conn: Any) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    id = await conn.fetchval(
        "SELECT notifyq.enqueue('T', '{\"a\": 1}', queue => 'mail', run_at => $1, priority => -5, max_attempts => 3)",
        at,
    )
    row = await see(conn, id)
    assert (row["queue"], row["payload"], row["run_at"]) == ("mail", b'{"a": 1}', at)
    assert (row["priority"], row["max_attempts"], row["state"]) == (-5, 3, "scheduled")
    assert await conn.fetchval("SELECT notifyq.enqueue('T', '{}', 'mail', now(), 1, NULL)") == id + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("NULL", 'null value in column "type"'),
        ("'T', priority => 40000", "smallint out of range"),
        ("'T', max_attempts => 40000", "smallint out of range"),
        ("'T', '{nope'", "invalid input syntax for type json"),
        ("'T', options => '{\"prio\": 1}'", "notifyq.task: prio is none of the options, which are unique_key, "),
    ],
)
async def test_enqueue_refuses(conn: Any, arguments: str, message: str) -> None:
    with pytest.raises(asyncpg.PostgresError, match=message):
        await conn.execute(f"SELECT notifyq.enqueue({arguments})")


async def test_enqueue_takes_null_for_the_default(conn: Any) -> None:
    """Of every argument that has one; a type has none."""
    names = ("payload", "queue", "run_at", "priority", "max_attempts", "options")
    nulls = ", ".join(f"{name} => NULL" for name in names)
    for call in (f"notifyq.enqueue('T', {nulls})", "notifyq.enqueue('T', NULL, NULL, NULL, NULL, NULL, NULL)"):
        ids = await conn.fetchval(f"SELECT {call}"), await conn.fetchval("SELECT notifyq.enqueue('T')")
        rows = await conn.fetch(
            """SELECT payload, queue, priority, max_attempts, options, run_at = now(), run_at <= created_at
               FROM notifyq.task WHERE id = ANY ($1::bigint[])""",
            ids,
        )
        assert len(rows) == 2
        assert rows[0] == rows[1]
    with pytest.raises(asyncpg.NotNullViolationError):
        await conn.fetchval("SELECT notifyq.enqueue(NULL)")


PUBLIC = "enqueue cancel retry pause resume limit_queue cron_pause cron_resume cron_run"

WITHOUT_COMMENT = """
    SELECT format('notifyq.%I', relname) FROM pg_class
    WHERE relnamespace = 'notifyq'::regnamespace AND relkind IN ('r', 'p', 'v')
      AND obj_description(oid, 'pg_class') IS NULL
    UNION ALL
    SELECT format('notifyq.%I.%I', c.relname, a.attname)
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = 'notifyq'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND a.attnum > 0
      AND NOT a.attisdropped AND col_description(c.oid, a.attnum) IS NULL
    UNION ALL
    SELECT oid::regprocedure::text FROM pg_proc
    WHERE pronamespace = 'notifyq'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL
    UNION ALL
    SELECT 'the schema' WHERE obj_description('notifyq'::regnamespace, 'pg_namespace') IS NULL"""


async def test_everything_has_a_comment(conn: Any) -> None:
    assert [row[0] for row in await conn.fetch(WITHOUT_COMMENT)] == []
    await conn.execute("CREATE TABLE notifyq.another (n integer)")
    assert len(await conn.fetch(WITHOUT_COMMENT)) == 2, "what has none is found"


async def test_the_functions_that_anybody_may_call_are_named(conn: Any) -> None:
    """In the head of schema.sql; the others' comments say that they are internal."""
    rows = await conn.fetch(
        """SELECT DISTINCT proname::text FROM pg_proc
           WHERE pronamespace = 'notifyq'::regnamespace AND obj_description(oid, 'pg_proc') NOT LIKE 'Internal: %'"""
    )
    assert {row[0] for row in rows} == set(PUBLIC.split())
    head = " ".join(line.lstrip("- ") for line in schema.schema_sql().partition("CREATE SCHEMA")[0].splitlines())
    said = head.partition("What a user of the database may call: ")[2].partition(". ")[0]
    assert re.findall(r"[a-z_]{5,}", said.replace(" of queues", "")) == PUBLIC.split()


async def test_nobody_chooses_an_id_by_accident(conn: Any) -> None:
    with pytest.raises(asyncpg.GeneratedAlwaysError):
        await conn.execute("INSERT INTO notifyq.task (id, type) VALUES (1, 'T')")


async def test_the_bell_takes_no_row(conn: Any) -> None:
    for values in ("DEFAULT VALUES", "VALUES (NULL)", "VALUES (true)", "VALUES (false)"):
        with pytest.raises(asyncpg.CheckViolationError):
            async with conn.transaction():
                await conn.execute(f"INSERT INTO notifyq.bell {values}")


# Everything that somebody who may make a schema could shadow, and a table that tells.
def shadow(name: str, returns: str, does: str) -> str:
    return f"""CREATE FUNCTION evil.{name} RETURNS {returns} LANGUAGE sql AS
               'UPDATE evil.called SET called = called OPERATOR(pg_catalog.+) 1; SELECT {does}';"""


EVIL = f"""
    CREATE SCHEMA evil;
    CREATE TABLE evil.called AS SELECT 0 AS called;
    {shadow("now()", "timestamptz", "pg_catalog.now()")}
    {shadow("clock_timestamp()", "timestamptz", "pg_catalog.now()")}
    {shadow("length(text)", "integer", "1")}
    {shadow("pg_notify(text, text)", "integer", "1")}
    {shadow("set_config(text, text, boolean)", "integer", "1")}
    {shadow("eq(bigint, bigint)", "boolean", "true")}
    {shadow("eq(text, text)", "boolean", "true")}
    {shadow("gt(timestamptz, timestamptz)", "boolean", "true")}
    CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.eq);
    CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.eq);
    CREATE OPERATOR evil.> (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = evil.gt);
    CREATE TABLE evil.task (id bigint);
    CREATE TABLE evil.bell (nothing boolean);"""


async def test_the_functions_take_no_names_from_the_search_path(conn: Any) -> None:
    """The view too. The names are those of the time they were made, and cost nothing at a call."""
    await conn.execute(EVIL)
    await conn.execute("SET LOCAL search_path = evil, pg_catalog")
    other = await conn.fetchval("SELECT notifyq.enqueue('Other')")
    id = await conn.fetchval("SELECT notifyq.enqueue('T')")
    assert await conn.fetchval("SELECT notifyq.cancel($1)", id) is True
    assert await conn.fetchval("SELECT notifyq.retry($1)", id) is True
    assert await conn.fetchval("SELECT notifyq.fall_asleep(100)") is True
    assert await conn.fetchval("SELECT notifyq.take_turn(1, 100)") is True
    rows = await conn.fetch("SELECT id, state FROM notifyq.all_tasks")
    assert sorted(tuple(row) for row in rows) == [(other, "ready"), (id, "ready")]
    assert await conn.fetchval("SELECT called FROM evil.called") == 0


# --- Roles, by the GRANTs that schema.sql documents


INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ('T', '{}')"
SAMPLES = {
    INSERT: {"enqueuer", "worker"},
    f"{INSERT} RETURNING id": {"enqueuer", "worker"},
    f"{INSERT} RETURNING payload": {"worker"},
    "SELECT notifyq.enqueue('T', queue => 'q', priority => 1, max_attempts => 2, run_at => now())": {
        "enqueuer",
        "worker",
    },
    "SELECT notifyq.enqueue('T', options => '{\"order_key\": \"a\"}')": {"enqueuer", "worker"},
    "INSERT INTO notifyq.task (type, options) VALUES ('T', '{\"order_key\": \"a\"}') RETURNING id": {
        "enqueuer",
        "worker",
    },
    "INSERT INTO notifyq.task (type, options) VALUES ('T', '{\"unique_key\": \"a\"}')": {"worker"},
    "INSERT INTO notifyq.task (type, order_key) VALUES ('T', 'a')": {"worker"},
    "INSERT INTO notifyq.task (type, limit_key) VALUES ('T', 'a')": {"worker"},
    "INSERT INTO notifyq.task (type, after) VALUES ('T', '{1}')": {"worker"},
    "INSERT INTO notifyq.task (type, worker) VALUES ('T', 1)": {"worker"},
    "INSERT INTO notifyq.task (type, withheld) VALUES ('T', true)": {"worker"},
    "INSERT INTO notifyq.task (type, created_at) VALUES ('T', now())": {"worker"},
    "LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE": {"enqueuer", "worker"},
    "SELECT notifyq.fall_asleep(10)": {"worker"},
    "SELECT count(id) FROM notifyq.task": {"enqueuer", "awaiter", "worker"},
    "SELECT id FROM notifyq.task FOR NO KEY UPDATE": {"awaiter", "worker"},
    "UPDATE notifyq.task SET awaited = true": {"awaiter", "worker"},
    "UPDATE notifyq.task SET awaited = true RETURNING payload": {"worker"},
    "UPDATE notifyq.task SET progress = 1": {"worker"},
    "SELECT payload FROM notifyq.task": {"worker"},
    "SELECT type FROM notifyq.task": {"worker"},
    "SELECT result FROM notifyq.finished": {"worker"},
    "SELECT payload, errors FROM notifyq.all_tasks": {"reader", "awaiter", "worker"},
    "SELECT * FROM notifyq.worker": {"reader", "worker"},
    "SELECT * FROM notifyq.all_queues": {"reader", "worker"},
    "SELECT * FROM notifyq.queue": {"reader", "worker"},
    "SELECT * FROM notifyq.slot_released, notifyq.key_lock, notifyq.rate_log": {"worker"},
    "SELECT notifyq.pause('q')": {"worker"},
    "SELECT notifyq.resume('q')": {"worker"},
    "SELECT notifyq.limit_queue('q', 5)": {"worker"},
    "SELECT notifyq.release_waiters()": {"worker"},
    "SELECT notifyq.admit(1, '{1}', '{1}')": {"worker"},
    "INSERT INTO notifyq.task (type, admitted_at, waiting_on) VALUES ('T', now(), 'limit:a')": {"worker"},
    "SELECT * FROM notifyq.schema_version": {"reader", "worker"},
    "UPDATE notifyq.task SET priority = 1": {"worker"},
    "UPDATE notifyq.task SET run_at = now()": {"worker"},
    "UPDATE notifyq.finished SET state = 'done'": {"worker"},
    "DELETE FROM notifyq.task": {"worker"},
    "DELETE FROM notifyq.finished": {"worker"},
    "DELETE FROM notifyq.worker": {"worker"},
    "TRUNCATE notifyq.task": {"worker"},
    "SELECT notifyq.cancel(1)": {"worker"},
    "SELECT notifyq.retry(1)": {"worker"},
    "SELECT last_value FROM notifyq.task_id_seq": {"worker"},
    "SELECT nextval('notifyq.task_id_seq')": {"worker"},
    "SELECT setval('notifyq.task_id_seq', 1)": {"worker"},
    "DROP TABLE notifyq.task": set[str](),
    "ALTER TABLE notifyq.task DISABLE TRIGGER ring": set[str](),
    "CREATE TABLE notifyq.mine (id integer)": set[str](),
    "CREATE OR REPLACE FUNCTION notifyq.ring() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'": set[str](),
}  # fmt: skip


@pytest.mark.parametrize("role", ["enqueuer", "reader", "awaiter", "worker"])
async def test_what_each_role_may(as_role: Any, role: str) -> None:
    conn = await as_role(role)
    for statement, may in SAMPLES.items():
        transaction = conn.transaction()
        await transaction.start()
        try:
            await conn.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            assert role not in may, f"{role} may not: {statement}"
        else:
            assert role in may, f"{role} may: {statement}"
        await transaction.rollback()


ENQUEUES: dict[str, list[Any]] = {
    "enqueue": ["T", "{}"],
    "enqueue_many": [["T"] * 2, ["{}"] * 2],
    "enqueue_many_placed": [["T"] * 2, ["{}"] * 2],
    "enqueue_then": [["T"] * 3, ["{}"] * 3],
}
FOR_ALL = {
    *ENQUEUES,
    "read_transaction_status",
    "end_backends",
    "is_turn_stolen",
    "find_lock_holder",
    "list_findings",
    "enqueue_unique",
}


@pytest.mark.parametrize("options", [None, '{"order_key": "a"}'], ids=["plain", "ordered"])
@pytest.mark.parametrize("name", ENQUEUES)
async def test_an_enqueuer_may_run_its_own_statements(as_role: Any, name: str, options: str | None) -> None:
    """With no more than the GRANTs of "may enqueue": a plain task, one with options, many, a group."""
    conn, worker = await as_role("enqueuer"), await as_role("worker")
    rest = ["cancel"] if name == "enqueue_then" else []
    async with conn.transaction():
        values: list[Any] = ["q", None, None, 0, None, options]
        if name in ("enqueue_many_placed", "enqueue_then"):  # a queue, a priority and options for each
            many = len(ENQUEUES[name][0])
            values = [["q"] * many, None, None, [0] * many, None, [options] * 2 + [None] * (many - 2)]
        rows = await conn.fetch(SQL[name], *ENQUEUES[name], *values, *rest)
    ids = [row["id"] for row in rows]
    if name == "enqueue_then":
        [last], ids = ids, [*rows[0]["after"], *ids]
        waits = await worker.fetchrow(
            "SELECT after, options ->> 'on_dead', order_key FROM notifyq.task WHERE id = $1", last
        )
        assert tuple(waits) == (ids[:-1], "cancel", None)
        ids.pop()
    assert len(ids) == (1 if name == "enqueue" else 2)
    keys = await worker.fetch("SELECT order_key FROM notifyq.task WHERE id = ANY ($1::bigint[])", ids)
    assert [row[0] for row in keys] == [options and "a"] * len(ids)


@pytest.mark.parametrize("name", sorted(set(SQL) - FOR_ALL))
async def test_an_enqueuer_may_run_no_statement_of_a_worker(as_role: Any, name: str) -> None:
    """Claim, settle, rescue, heartbeat: refused. (Six read only what the system shows everybody.)"""
    conn = await as_role("enqueuer")
    statement = await conn.prepare(SQL[name])
    values = {
        "int2": 1,
        "int4": 1,
        "int8": 1,
        "text": "x",
        "float8": 1.0,
        "bool": True,
        "timestamptz": datetime.now(UTC),
    }
    arguments = [values.get(parameter.name, []) for parameter in statement.get_parameters()]
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await statement.fetch(*arguments)


async def test_the_roles_together(roles: Any, as_role: Any) -> None:
    """An enqueuer's task wakes the worker role's sleeping worker; the reader sees what became of it."""
    app, seen = notifyq.App(), Seen()

    class Told(notifyq.Task):
        name: str

    @app.handler
    async def told(task: Told) -> str:
        seen.add(task.name)
        return task.name

    reader = await as_role("reader")
    async with working(app, roles("worker")) as worker, app.connect(roles("enqueuer")):
        assert worker.info.bell_ms is not None
        for number in range(3):
            await app.enqueue(Told(name=str(number)))
            await seen.reach(number + 1)
        assert len(await app.enqueue_many([Told(name="a"), Told(name="b")], delay=0.01)) == 2
        await seen.reach(5)
        await worker.stopped()
    rows = await reader.fetch("SELECT state, result FROM notifyq.all_tasks WHERE type = 'Told' ORDER BY id")
    assert [tuple(row) for row in rows[:3]] == [("done", f'"{n}"'.encode()) for n in range(3)]
    assert await schema.check(reader) == schema.SCHEMA_VERSION


async def test_an_enqueuer_without_the_bell_still_enqueues(server: Server, as_role: Any) -> None:
    """It can't ask whether somebody sleeps, so it always rings."""
    await admin(server, "DROP ROLE IF EXISTS plain", "CREATE ROLE plain LOGIN")
    owner = await connection.connect(server.dsn("roles"), role="test")
    for grant in grants("enqueuer"):
        if "bell" not in grant:
            await owner.execute(grant.replace("TO enqueuer", "TO plain"))
    heard: list[str] = []
    await owner.add_listener("notifyq", lambda *args: heard.append(args[3]))
    plain = await connection.connect(server.dsn("roles").replace("://notifyq@", "://plain@"), role="test")
    await plain.execute(INSERT)
    await plain.close()
    with anyio.fail_after(limit()):
        while not heard:
            await anyio.sleep(0.001)
    await owner.execute("DROP OWNED BY plain")
    await owner.close()
    await admin(server, "DROP ROLE plain")


async def test_a_stranger_may_not_even_look(roles: Any, as_role: Any, server: Server) -> None:
    await admin(server, "DROP ROLE IF EXISTS stranger", "CREATE ROLE stranger LOGIN")
    conn: Any = await connection.connect(server.dsn("roles").replace("://notifyq@", "://stranger@"), role="test")
    for statement in ("SELECT * FROM notifyq.all_tasks", "SELECT notifyq.enqueue('T')", INSERT):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await conn.execute(statement)
    with pytest.raises(DatabaseError, match=r"user stranger may not use the schema notifyq; .*GRANTs"):
        await schema.check(conn)
    await conn.close()
    await admin(server, "DROP ROLE stranger")
