"""schema.sql: the functions that people call, the views that they read, and their comments."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.worker import job as claims


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
    """It ends a task that hasn't ended, running or not, and returns true. For a finished or unknown task it returns
    false."""
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
    """It brings back a dead or cancelled task, and makes a scheduled one ready. It leaves others alone, and returns
    false."""
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
    """A row by the function and one by INSERT are the same but for id and created_at."""
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
        ("'T', options => '{\"prio\": 1}'", "notifyq.task: prio is none of the options, which are order_key, "),
    ],
)
async def test_enqueue_refuses(conn: Any, arguments: str, message: str) -> None:
    with pytest.raises(asyncpg.PostgresError, match=message):
        await conn.execute(f"SELECT notifyq.enqueue({arguments})")


async def test_enqueue_takes_null_for_the_default(conn: Any) -> None:
    """This holds for every argument that has a default; the type has none."""
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


async def test_the_functions_that_people_may_call_are_named(conn: Any) -> None:
    """They are named in the head of schema.sql. The comments of the others say that they are internal."""
    rows = await conn.fetch(
        """SELECT DISTINCT proname::text FROM pg_proc
           WHERE pronamespace = 'notifyq'::regnamespace AND obj_description(oid, 'pg_proc') NOT LIKE 'Internal: %'"""
    )
    assert {row[0] for row in rows} == set(PUBLIC.split())
    head = " ".join(line.lstrip("- ") for line in schema.schema_sql().partition("CREATE SCHEMA")[0].splitlines())
    said = head.partition("What a user of the database may call: ")[2].partition(". ")[0]
    assert re.findall(r"[a-z_]{5,}", said.replace(" of queues", "")) == PUBLIC.split()


async def test_no_insert_chooses_an_id_by_accident(conn: Any) -> None:
    with pytest.raises(asyncpg.GeneratedAlwaysError):
        await conn.execute("INSERT INTO notifyq.task (id, type) VALUES (1, 'T')")


async def test_the_bell_takes_no_row(conn: Any) -> None:
    for values in ("DEFAULT VALUES", "VALUES (NULL)", "VALUES (true)", "VALUES (false)"):
        with pytest.raises(asyncpg.CheckViolationError):
            async with conn.transaction():
                await conn.execute(f"INSERT INTO notifyq.bell {values}")


# All that a role with the right to make a schema could shadow, and a table that tells.
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


# These have few names, all of them qualified. So they need no SET search_path, for which each call would pay.
QUALIFIED = {
    "bell_wanted", "enqueue", "fall_asleep", "note_lease_given_up", "on_task_deleted", "ring", "take_turn",
    "write_outcome",
}  # fmt: skip
NAME_FREE = {"coalesce", "nullif", "greatest", "least"}  # PostgreSQL's grammar: no schema can have them
GRAMMAR_TYPES = {"bigint", "boolean", "integer", "interval", "real", "smallint"}  # nor these


async def test_no_function_looks_names_up_by_the_search_path(conn: Any) -> None:
    """BEGIN ATOMIC has names looked up once, when the function is created. The others set search_path or qualify. Where
    search_path doesn't name pg_temp, types are looked up among temporary tables first."""
    free = await conn.fetch(
        "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace AND prosqlbody IS NULL"
        " AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)"
    )
    assert {name for name, _ in free} == QUALIFIED
    for name, body in free:
        code = re.sub(r"--.*|'[^']*'|OPERATOR\(pg_catalog\.[^)]+\)|:=|ERRCODE =", " ", body)
        assert set(re.findall(r"(?<![.\w])(\w+)\(", code)) <= NAME_FREE, name
        assert not re.search(r"[-<>=+*/|&~!@#%^?]", code), name
        assert not re.search(r"::(?!pg_catalog\.)|\bcast\b", code, re.IGNORECASE), name
        declared = re.findall(r"^ +\w+ (?:constant )?(\w+)", code.partition("BEGIN")[0], re.MULTILINE | re.IGNORECASE)
        assert set(declared) <= GRAMMAR_TYPES, name


# A temporary table for each type of PostgreSQL, by the type's name. They come first wherever pg_temp isn't named.
TEMPORARY = """
    DO $do$
    DECLARE
        f record;
    BEGIN
        FOR f IN
            SELECT typname FROM pg_type
            WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'p') AND typname !~ '^_'
        LOOP
            EXECUTE format('CREATE TEMP TABLE %I (x integer)', f.typname);
        END LOOP;
    END $do$;"""

# Functions and operators that hide all those of PostgreSQL, and types that hide some. Each tells, then fails.
SHADOWS = """
    CREATE SCHEMA evil;
    CREATE SEQUENCE evil.called;
    CREATE DOMAIN evil.text AS pg_catalog.text CHECK (nextval('evil.called') IS NULL);
    CREATE DOMAIN evil.jsonb AS pg_catalog.jsonb CHECK (nextval('evil.called') IS NULL);
    CREATE DOMAIN evil.timestamptz AS pg_catalog.timestamptz CHECK (nextval('evil.called') IS NULL);
    CREATE TABLE evil.task (id bigint);
    CREATE TABLE evil.bell (nothing boolean);
    DO $do$
    DECLARE
        f record;
    BEGIN
        FOR f IN
            SELECT p.proname, pg_get_function_identity_arguments(p.oid) AS args, p.proretset,
                   format_type(p.prorettype, NULL) AS returns
            FROM pg_proc p
            WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND p.proargmodes IS NULL
              AND NOT EXISTS (SELECT FROM unnest(p.proargtypes::oid[] || p.prorettype) AS a (type)
                              JOIN pg_type t ON t.oid = a.type
                              WHERE t.typtype = 'p' AND t.typname NOT IN ('anyelement', 'anyarray'))
              AND NOT (p.prorettype IN ('anyelement'::regtype, 'anyarray'::regtype)
                       AND NOT p.proargtypes::oid[] && ARRAY['anyelement'::regtype, 'anyarray'::regtype]::oid[])
        LOOP
            EXECUTE format(
                'CREATE FUNCTION evil.%I(%s) RETURNS %s %s LANGUAGE plpgsql AS $$BEGIN'
                ' PERFORM pg_catalog.nextval(''evil.called''); RAISE ''evil %s''; END$$',
                f.proname, f.args, CASE WHEN f.proretset THEN 'SETOF' ELSE '' END, f.returns, f.proname);
        END LOOP;
        FOR f IN
            SELECT o.oprname, p.proname, o.oprleft, o.oprright
            FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode
            WHERE to_regprocedure(format(
                'evil.%I(%s)', p.proname, concat_ws(',', nullif(o.oprleft, 0)::regtype, o.oprright::regtype)))
                IS NOT NULL
        LOOP
            EXECUTE format(
                'CREATE OPERATOR evil.%s (%s RIGHTARG = %s, FUNCTION = evil.%I)', f.oprname,
                CASE WHEN f.oprleft <> 0 THEN format('LEFTARG = %s,', f.oprleft::regtype) ELSE '' END,
                f.oprright::regtype, f.proname);
        END LOOP;
    END $do$;"""

UNIQUE = """SELECT notifyq.enqueue('Unique', options => '{"unique_key": "k", "unique_for": 60}')"""
LIMITED = """SELECT notifyq.enqueue('Limited', options =>
    '{"limit_key": "l", "limit_running": 1, "limit_rate": 9, "limit_seconds": 60}')"""
ORDERED = LIMITED.replace("}'", """, "order_key": "o"}'""")


async def test_the_functions_take_no_names_from_the_search_path(conn: Any) -> None:
    """Nor of temporary tables; and the views don't. Each function in PL/pgSQL is called, as the statements of clients
    and workers call them."""
    await conn.execute(SHADOWS)
    assert await conn.fetchval("SELECT count(*) FROM pg_operator WHERE oprnamespace = 'evil'::regnamespace") > 700
    worker = await conn.fetchval(
        "INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)"
        " VALUES ('host:1', '{default}', '{}', '{}', 1, '1 minute') RETURNING id"
    )
    functions = await conn.fetchval(
        "SELECT array_agg(p.oid) FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang"
        " WHERE p.pronamespace = 'notifyq'::regnamespace AND l.lanname = 'plpgsql'"
    )

    # asyncpg learns of these types here, with names that it doesn't qualify.
    await conn.prepare("SELECT $1::bigint[], $2::smallint[], $3::text[], $4::integer[], oid FROM pg_class")
    await conn.execute(TEMPORARY)
    with pytest.raises(asyncpg.CannotCoerceError):
        async with conn.transaction():
            await conn.execute("SELECT 1::text")

    async def own(sql: str, *args: Any) -> Any:
        """A statement of this test's own, with names that it needn't qualify."""
        await conn.execute("SET LOCAL search_path = pg_catalog")
        rows = await conn.fetch(sql, *args)
        await conn.execute("SET LOCAL search_path = evil, pg_catalog")
        return [tuple(row) for row in rows]

    await conn.execute("SET LOCAL track_functions = 'all'; SET LOCAL search_path = evil, pg_catalog")
    with pytest.raises(asyncpg.RaiseError, match=r"^evil jsonb_array_length$"):
        async with conn.transaction():
            await conn.execute("SELECT jsonb_array_length('[]')")
    await conn.execute("SELECT pg_catalog.setval('evil.called', 1, false)")

    other = await conn.fetchval("SELECT notifyq.enqueue('Other')")
    assert await conn.fetchval(UNIQUE) == await conn.fetchval(UNIQUE)
    first, second, third = [await conn.fetchval(sql) for sql in (ORDERED, ORDERED, LIMITED)]
    after = await conn.fetchval(
        "SELECT notifyq.enqueue('After', options => $1)", json.dumps({"after": [other]}).encode()
    )
    await conn.execute("SELECT notifyq.limit_queue('default', 10, 10, 60)")
    claimed = await own(
        "UPDATE notifyq.task SET worker = $1, attempts = attempts + 1, processing_at = now() RETURNING id, attempts",
        worker,
    )
    ids, attempts = [id for id, _ in claimed], [attempt for _, attempt in claimed]
    answer = dict(await conn.fetch("SELECT id, waits_for FROM notifyq.admit($1, $2, $3)", worker, ids, attempts))
    assert [answer[id] for id in (first, second, third, after)] == [None, "order", "limit", "after"]
    await conn.execute("UPDATE notifyq.task t SET worker = NULL RETURNING notifyq.note_lease_given_up(t)")
    assert await conn.fetchval("SELECT notifyq.cancel($1)", first) is True
    assert await conn.fetchval("SELECT notifyq.release_waiters()") == 2
    assert await conn.fetchval("SELECT notifyq.cancel($1)", other) is True
    assert await conn.fetchval("SELECT notifyq.release_waiters()") == 0
    assert await conn.fetchval("SELECT notifyq.retry($1)", other) is True
    assert await conn.fetchval("SELECT notifyq.fall_asleep(100)") is True
    assert await conn.fetchval("SELECT notifyq.bell_wanted()") is False
    assert await conn.fetchval("SELECT notifyq.take_turn(1, 100)") is True
    assert await conn.fetchval("SELECT notifyq.choose_fitting($1, $2, '{}', '{}', '{}', 1)", [other], ["Other"]) == [
        other
    ]
    for n in range(2):
        for entry in ("{}", '{"left_out": true}'):
            errors = json.dumps([{}] * (200 * n + 1)).encode()
            assert await conn.fetchval("SELECT notifyq.append_error($1, $2)", errors, entry.encode())
    states = dict(await conn.fetch("SELECT id, state FROM notifyq.all_tasks"))
    assert (states[other], states[first], states[after]) == ("ready", "cancelled", "cancelled")
    assert await own("SELECT is_called FROM evil.called") == [(False,)]
    called = "SELECT funcid FROM pg_stat_xact_user_functions"
    assert await own(f"SELECT proname FROM pg_proc WHERE oid = ANY ($1) AND oid NOT IN ({called})", functions) == []
