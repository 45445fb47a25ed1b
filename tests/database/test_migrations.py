"""Upgrades: to a made-up next version, from wherever one was interrupted, under workers and producers that go on.

tests/helpers/next_version.py has the made-up version, which this process takes for its own while a test runs. Workers
of the version before are those of this notifyq: helpers/old_worker.py, and processes that a test starts.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection, schema, upgrade
from notifyq.database.connection import SQL
from notifyq.database.schema import SCHEMA_VERSION
from notifyq.embedded import Server
from notifyq.errors import DatabaseError, SchemaError
from notifyq.worker import job as claims

from ..helpers import next_version
from ..helpers.databases import Sessions, admin, grants
from ..helpers.machine import Probe, limit
from ..helpers.next_version import EARLIER, FROZEN, LEFT, NEXT, install, installation
from ..helpers.old_worker import OldWorker
from ..helpers.processes import Process, started
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually
from .test_schema import TEMPORARY

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    next_version.use(monkeypatch)


@pytest.fixture
async def conn(empty_dsn: str) -> AsyncIterator[Any]:
    conn = await connection.connect(empty_dsn, role="test")
    yield conn
    conn.terminate()


async def drop(conn: Any) -> None:
    await conn.execute("DROP SCHEMA notifyq CASCADE")


# --- The same, whichever way it came


CATALOGS = """
    SELECT 'relation ' || relname AS what,
           concat_ws(' ', relkind, relpersistence, reloptions::text, relrowsecurity, obj_description(oid, 'pg_class'),
                     coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))) AS how
    FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace AND relkind <> 'i'
    UNION ALL
    SELECT format('column %s of %s', attname, attrelid::regclass),
           concat_ws(' ', rank() OVER (PARTITION BY attrelid ORDER BY attnum), format_type(atttypid, atttypmod),
                     CASE WHEN attnotnull THEN 'not null' END, 'default ' || pg_get_expr(adbin, adrelid), attidentity,
                     attgenerated, attstorage, attcompression, attcollation::regcollation, attstattarget,
                     attoptions::text, attacl::text, col_description(attrelid, attnum))
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attnum > 0 AND NOT attisdropped AND attrelid IN (
        SELECT oid FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace AND relkind IN ('r', 'v', 'p'))
    UNION ALL
    SELECT format('constraint %s of %s', conname, conrelid::regclass),
           concat_ws(' ', pg_get_constraintdef(oid), convalidated)
    FROM pg_constraint WHERE connamespace = 'notifyq'::regnamespace
    UNION ALL
    SELECT 'index ' || relname, concat_ws(' ', pg_get_indexdef(oid), indisvalid, indisreplident, reloptions::text)
    FROM pg_class JOIN pg_index ON indexrelid = oid WHERE relnamespace = 'notifyq'::regnamespace
    UNION ALL
    SELECT 'sequence ' || seqrelid::regclass,
           concat_ws(' ', seqtypid::regtype, seqstart, seqincrement, seqmax, seqcache,
                     pg_describe_object(refclassid, refobjid, refobjsubid))
    FROM pg_sequence JOIN pg_depend ON objid = seqrelid AND deptype IN ('a', 'i')
    UNION ALL
    SELECT 'function ' || oid::regprocedure,
           concat_ws(' ', pg_get_functiondef(oid), coalesce(proacl, acldefault('f', proowner)),
                     obj_description(oid, 'pg_proc'))
    FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace
    UNION ALL
    SELECT format('trigger %s of %s', tgname, tgrelid::regclass), concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled)
    FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
    WHERE relnamespace = 'notifyq'::regnamespace AND NOT tgisinternal
    UNION ALL
    SELECT 'view ' || relname, pg_get_viewdef(oid) FROM pg_class
    WHERE relnamespace = 'notifyq'::regnamespace AND relkind = 'v'
    UNION ALL
    SELECT 'type ' || typname, typtype::text FROM pg_type
    WHERE typnamespace = 'notifyq'::regnamespace AND typtype NOT IN ('c', 'b')
    UNION ALL
    SELECT 'rows of key_lock', count(*) || ' to ' || max(n) FROM notifyq.key_lock
    UNION ALL
    SELECT 'what version ' || max(version) || ' serves', max(serves)::text FROM notifyq.schema_version"""


async def catalogs(conn: Any) -> dict[str, str]:
    """Each object of the schema, and everything about it."""
    rows = await conn.fetch(CATALOGS)
    found = {row["what"]: row["how"] for row in rows}
    assert len(found) == len(rows) > 100
    return found


def differences(fresh: dict[str, str], upgraded: dict[str, str]) -> list[str]:
    return [
        f"{what}: schema.sql has {fresh.get(what)!r}, an upgrade {upgraded.get(what)!r}"
        for what in sorted({*fresh, *upgraded} - set(LEFT))
        if fresh.get(what) != upgraded.get(what)
    ]


@pytest.fixture
async def fresh(conn: Any) -> dict[str, str]:
    """The catalogs after an installation, which is removed again."""
    await schema.migrate(conn)
    found = await catalogs(conn)
    await drop(conn)
    return found


@pytest.mark.parametrize("version", EARLIER)
async def test_an_upgrade_makes_what_an_installation_makes(conn: Any, fresh: dict[str, str], version: int) -> None:
    """A change of schema.sql without one of migrations/, or the other way round, is named here."""
    await install(conn, version)
    assert await schema.installed_version(conn) == version
    assert await schema.migrate(conn) == (version, NEXT)
    upgraded = await catalogs(conn)
    assert differences(fresh, upgraded) == []
    assert set(LEFT) <= set(upgraded) - set(fresh), "LEFT has what isn't left"


async def test_an_upgrade_takes_no_names_from_temporary_tables(conn: Any, fresh: dict[str, str]) -> None:
    await install(conn)
    await conn.execute(TEMPORARY)
    assert await schema.migrate(conn) == (SCHEMA_VERSION, NEXT)
    await conn.execute("DISCARD TEMP")
    assert differences(fresh, await catalogs(conn)) == []


def test_there_is_a_migration_to_each_version_and_a_frozen_schema_of_each_before() -> None:
    numbers = sorted(int(path.stem) for path in (Path(upgrade.__file__).parent / "migrations").glob("*.sql"))
    assert numbers == list(range(2, SCHEMA_VERSION + 1))
    assert sorted(int(path.stem) for path in FROZEN.glob("*.sql")) == list(range(1, SCHEMA_VERSION))


def test_every_function_trigger_and_view_of_schema_sql_is_replaced() -> None:
    """The pattern takes each of them whole, and nothing else."""
    text = schema.schema_sql()
    wanted = re.findall(r"^CREATE (?:OR REPLACE )?(FUNCTION|TRIGGER|VIEW) (\S+?)[ (]", text, re.MULTILINE)
    replaced = [one for one in upgrade.replaced(text)[:-1] if not one.startswith("COMMENT")]
    names = [re.match(r"CREATE OR REPLACE (FUNCTION|TRIGGER|VIEW) (\S+?)[ (]", one) for one in replaced]
    assert sorted(match.groups() for match in names if match) == sorted(wanted)
    for one in replaced:
        assert len(re.findall(r"^CREATE ", one, re.MULTILINE)) == 1, one
    comments = [one for one in upgrade.replaced(text) if one.startswith("COMMENT")]
    assert len(comments) == len(re.findall(r"^COMMENT ON ", text, re.MULTILINE)) - 2, (
        "the bell's are a step of their own"
    )


@pytest.mark.parametrize("version", EARLIER)
async def test_an_interrupted_upgrade_is_run_again(conn: Any, fresh: dict[str, str], version: int) -> None:
    """It is interrupted after each step in turn, and after the last one, whose answer was lost. Until then the old
    version counts."""
    count = len(upgrade.steps(version, schema.schema_sql()))
    for stop in range(count):
        await install(conn, version)
        for step in upgrade.steps(version, schema.schema_sql())[:stop]:
            await conn.execute(step.sql)
        assert await schema.installed_version(conn) == version
        assert await schema.migrate(conn) == (version, NEXT)
        assert differences(fresh, await catalogs(conn)) == [], f"after {stop} steps"
        await drop(conn)


def steps_from(version: int) -> Sequence[upgrade.Step]:
    return upgrade.steps(version, schema.schema_sql())


async def invalid(conn: Any) -> list[str]:
    rows = await conn.fetch("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
    return [row[0] for row in rows]


async def test_one_cut_off_while_it_makes_an_index(empty_dsn: str, conn: Any, fresh: dict[str, str]) -> None:
    """It leaves an invalid index. The next upgrade makes it anew."""
    await install(conn)
    writes: Any = await connection.connect(empty_dsn, role="test")
    reads: Any = await connection.connect(empty_dsn, role="test")
    # CREATE INDEX CONCURRENTLY waits for snapshots, and the steps before it for nothing that this one holds.
    await reads.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    doomed: Any = await connection.connect(empty_dsn, role="test")
    migrating = asyncio.create_task(schema.migrate(doomed))
    await eventually(lambda: invalid(conn), ["notifyq.task_label"])
    await writes.fetchval("SELECT pg_terminate_backend($1, 5000)", doomed.get_server_pid())
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError, asyncpg.AdminShutdownError)):
        await migrating
    assert await invalid(conn) == ["notifyq.task_label"]
    assert await schema.installed_version(conn) == SCHEMA_VERSION
    await reads.execute("COMMIT")
    assert await schema.migrate(conn) == (SCHEMA_VERSION, NEXT)
    assert await invalid(conn) == []
    assert differences(fresh, await catalogs(conn)) == []
    writes.terminate()
    reads.terminate()


async def test_every_index_that_was_left_is_made_anew(conn: Any, fresh: dict[str, str]) -> None:
    """This holds for whatever an interrupted upgrade has left under the name of an index."""
    await install(conn)
    names = re.findall(
        r"CREATE INDEX CONCURRENTLY (?:IF NOT EXISTS )?(\w+)", "".join(s.sql for s in steps_from(SCHEMA_VERSION))
    )
    assert len(names) == 3
    for name in names:
        await conn.execute(f"CREATE INDEX {name} ON notifyq.task (id)")
    await schema.migrate(conn)
    assert differences(fresh, await catalogs(conn)) == []


async def test_upgrades_at_once_take_turns(empty_dsn: str, conn: Any) -> None:
    """One does the work, and the others find it done. That they wait doesn't hold up its indexes."""
    await install(conn)
    said: list[str] = []
    found = []

    async def migrate() -> None:
        one: Any = await connection.connect(empty_dsn, role="test")
        found.append(await schema.migrate(one, said.append))
        one.terminate()

    reads: Any = await connection.connect(empty_dsn, role="test")
    await reads.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")

    async def waiting() -> int:
        return said.count("another `notifyq migrate` is at work; waiting for it")

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(migrate)
        await eventually(waiting, 2)
        assert found == []
        await reads.execute("COMMIT")
    reads.terminate()
    assert sorted(found) == [(SCHEMA_VERSION, NEXT), (NEXT, NEXT), (NEXT, NEXT)]
    made = [line for line in said if line.startswith("CREATE INDEX")]
    assert len(made) == len(set(made)) > 1


TASKS = """
    INSERT INTO notifyq.worker (id, name, queues, types, max_attempts, concurrency, lease)
    VALUES (1, 'host:1', '{default}', '{T}', '{10}', 1, '30 s');
    INSERT INTO notifyq.task (type, payload, queue, priority, max_attempts) VALUES ('ready', '{"a": 1}', 'q', 3, 5);
    INSERT INTO notifyq.task (type, run_at) VALUES ('scheduled', now() + interval '1 h'), ('never', 'infinity');
    INSERT INTO notifyq.task (type, run_at, promoted) VALUES ('promoted', now() + interval '1 h', true);
    INSERT INTO notifyq.task (type, withheld) VALUES ('unhandled', true);
    INSERT INTO notifyq.task (type, worker, attempts, processing_at, errors)
    VALUES ('running', 1, 2, now(), '[{"error": "x"}]');
    INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts, state, queue,
                                  type, worker, payload, result, errors)
    SELECT 100 + n, now(), now(), now(), now(), 0, 1, state, 'q', 'T', 'host:1', '{"b": [2]}', '3', '[{"error": "y"}]'
    FROM unnest('{done,dead,cancelled}'::text[]) WITH ORDINALITY AS s (state, n);"""


@pytest.mark.parametrize("version", EARLIER)
async def test_tasks_survive(conn: Any, version: int) -> None:
    """Tasks in every state, and finished ones. The columns that an upgrade adds are empty in them."""
    await install(conn, version)
    await conn.execute(TASKS)
    look = "SELECT * FROM notifyq.all_tasks ORDER BY id"
    before = [dict(row) for row in await conn.fetch(look)]
    assert len(before) == 9
    await schema.migrate(conn)
    after = [dict(row) for row in await conn.fetch(look)]
    assert [row | old for row, old in zip(after, before, strict=True)] == after
    assert {row[name] for row in after for name in row.keys() - before[0].keys()} == {None}
    [job] = await claims.claim(conn, 1, {"q": 9}, 9)
    assert (job.type, job.attempt) == ("ready", 1)
    assert await conn.fetchval("SELECT notifyq.retry(102)") is True
    assert await conn.fetchval("SELECT notifyq.enqueue('next')") == 7


ODD_TIMES = ("infinity", "-infinity", "4713-01-01 BC")
ODD_STATES = {
    "times without an end": "".join(
        f"INSERT INTO notifyq.task (type, {column}) VALUES ('odd', '{time}');"
        "INSERT INTO notifyq.finished"
        " (id, created_at, run_at, processed_at, priority, attempts, state, queue, type, payload)"
        f" VALUES ({1000 + number}, '{time}', '{time}', '{time}', 0, 1, 'dead', 'q', 'odd', '{{}}');"
        for number, (column, time) in enumerate(
            (column, time) for column in ("created_at", "run_at", "processing_at", "processed_at") for time in ODD_TIMES
        )
    ),
    "rows from the future": """
        INSERT INTO notifyq.task (type, created_at, run_at, processed_at, attempts)
        SELECT 'odd', now() + interval '1 year', now() + interval '366 days', now() + interval '1 year', 1;
        INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease, seen_at)
        VALUES ('host:1', '{default}', '{T}', '{10}', 1, '30 s', now() + interval '1 year')""",
    "triggers that are disabled": "ALTER TABLE notifyq.task DISABLE TRIGGER ALL",
    "triggers for replicas": "ALTER TABLE notifyq.task ENABLE REPLICA TRIGGER ring",
    "a publication": "CREATE PUBLICATION everything FOR ALL TABLES",
    "row level security": """
        ALTER TABLE notifyq.task ENABLE ROW LEVEL SECURITY; ALTER TABLE notifyq.finished ENABLE ROW LEVEL SECURITY;
        ALTER TABLE notifyq.worker ENABLE ROW LEVEL SECURITY;
        ALTER TABLE notifyq.schema_version ENABLE ROW LEVEL SECURITY;
        CREATE POLICY mine ON notifyq.task USING (queue = current_user)""",
    "unlogged": "ALTER TABLE notifyq.task SET UNLOGGED; ALTER TABLE notifyq.finished SET UNLOGGED",
    "rows that make no sense": """
        INSERT INTO notifyq.task (type, worker, attempts, withheld, promoted, processing_at)
        VALUES ('odd', 77, -3, true, true, NULL), ('odd', NULL, 32767, true, true, now()),
               ('odd', 77, 0, false, false, NULL)""",
    "nothing in the row of the version but the number": "UPDATE notifyq.schema_version SET installed_at = '-infinity'",
}


@pytest.mark.parametrize("odd", ODD_STATES)
async def test_an_upgrade_of_odd_states(empty_dsn: str, conn: Any, odd: str) -> None:
    """It succeeds, and beside it and after it tasks of every kind run."""
    await install(conn)
    await conn.execute(ODD_STATES[odd])
    await conn.execute("INSERT INTO notifyq.task (type) VALUES ('Note')")
    assert await schema.migrate(conn) == (SCHEMA_VERSION, NEXT)
    assert await conn.fetch(connection.SQL["list_findings"], False) == [], "an upgrade makes the triggers anew"
    seen = Seen()
    app = notifyq.App()

    class Note(notifyq.Task):
        text: str = "before"

    @app.handler
    async def note(task: Note) -> None:
        seen.add(task.text)

    async with app.connect(empty_dsn), working(app, empty_dsn):
        await app.enqueue(Note("plain"))
        first = await app.enqueue(Note("limited"), limit_key="k", limit=1)
        await app.enqueue(Note("last"), order_key="o", after=[first])
        await seen.reach(4)
    assert sorted(seen.items) == ["before", "last", "limited", "plain"]
    assert await conn.fetchval("SELECT count(*) FROM notifyq.all_tasks") >= 4


async def test_an_owner_that_does_not_see_its_version_is_told(server: Server, empty_dsn: str, conn: Any) -> None:
    """Row level security that is forced on the owner hides the version: nothing is changed, and no error advises to
    drop anything."""
    await install(conn)
    await admin(server, "CREATE ROLE landlady LOGIN")
    try:
        await conn.execute(
            "ALTER SCHEMA notifyq OWNER TO landlady; ALTER TABLE notifyq.schema_version OWNER TO landlady;"
            "ALTER TABLE notifyq.schema_version ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
        )
        owner: Any = await connection.connect(empty_dsn.replace("://notifyq@", "://landlady@"), role="test")
        with pytest.raises(DatabaseError, match="row level security hides the rows of"):
            await schema.migrate(owner)
        owner.terminate()
        assert await schema.installed_version(conn) == SCHEMA_VERSION
    finally:
        await conn.execute("REASSIGN OWNED BY landlady TO notifyq; DROP OWNED BY landlady")
        await admin(server, "DROP ROLE landlady")


# --- Which versions of the code work, and which roles may upgrade


async def test_code_of_one_version_before_works_on(conn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the row of the newer version says: its workers may start, and their `migrate` has nothing to do."""
    await schema.migrate(conn)
    newer = "INSERT INTO notifyq.schema_version (version, serves) VALUES ($1, $2)"
    await conn.execute(newer, NEXT + 1, NEXT)
    assert await schema.check(conn) == NEXT + 1
    assert await schema.migrate(conn) == (NEXT + 1, NEXT + 1)
    await conn.execute(newer, NEXT + 2, NEXT + 1)
    for refuse in (schema.check, schema.migrate):
        with pytest.raises(SchemaError, match=rf"is version {NEXT + 2}, newer .*; upgrade notifyq"):
            await refuse(conn)


async def test_code_of_this_version_asks_for_an_upgrade(conn: Any) -> None:
    await install(conn)
    with pytest.raises(SchemaError, match=f"is version {SCHEMA_VERSION}, this notifyq needs {NEXT}; run: "):
        await schema.check(conn)


async def test_a_pooler_is_no_way_to_upgrade(empty_dsn: str, conn: Any) -> None:
    """A setting or lock that outlives a transaction has no effect there. An installation is one transaction."""
    pooled: Any = await asyncpg.connect(empty_dsn, connection_class=connection.Pooled)
    assert await schema.migrate(pooled) == (None, NEXT)
    await drop(conn)
    await install(conn)
    with pytest.raises(DatabaseError, match=r"is a pooler in transaction mode.*; name the server itself"):
        await schema.migrate(pooled)
    assert await schema.installed_version(conn) == SCHEMA_VERSION
    pooled.terminate()


async def test_a_standby_is_told_so(empty_dsn: str, conn: Any) -> None:
    await install(conn)
    standby: Any = await connection.connect(empty_dsn, role="test", settings={"default_transaction_read_only": "on"})
    with pytest.raises(DatabaseError, match="read-only"):
        await schema.migrate(standby)
    standby.terminate()


async def test_an_upgrade_keeps_the_owner_and_the_roles_rights(server: Server, empty_dsn: str, conn: Any) -> None:
    """A superuser upgrades the schema of an owner who isn't one. Roles that were granted what the version before asked
    for have what the new schema.sql asks for."""
    roles = ("worker", "enqueuer", "reader")
    await admin(server, 'CREATE ROLE "The Owner" LOGIN', *(f"CREATE ROLE m_{role} LOGIN" for role in roles))
    try:
        await conn.execute(
            "GRANT CREATE ON DATABASE " + await conn.fetchval("SELECT current_database()") + ' TO "The Owner"'
        )
        await conn.execute('SET ROLE "The Owner"')
        await install(conn)
        text = installation(SCHEMA_VERSION)
        for role in roles:
            for grant in grants(role, text):
                await conn.execute(grant.replace(f"TO {role};", f"TO m_{role};"))
        await conn.execute("RESET ROLE")
        stranger: Any = await connection.connect(empty_dsn.replace("://notifyq@", "://m_worker@"), role="test")
        with pytest.raises(DatabaseError, match="run it as the"):
            await schema.migrate(stranger)
        stranger.terminate()
        assert await schema.migrate(conn) == (SCHEMA_VERSION, NEXT)
        assert await conn.fetchval("SELECT current_user") == "notifyq"
        owners = await conn.fetch(
            """SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace
               UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace"""
        )
        assert [row[0] for row in owners] == ['"The Owner"']
        upgraded = await rights(conn)
        for role in roles:
            for grant in grants(role, schema.schema_sql()):
                await conn.execute(grant.replace(f"TO {role};", f"TO m_{role};"))
        assert await rights(conn) == upgraded
    finally:
        await drop(conn)
        await conn.execute('DROP OWNED BY "The Owner"')
        await admin(server, 'DROP ROLE "The Owner"', *(f"DROP ROLE m_{role}" for role in roles))


async def rights(conn: Any) -> set[tuple[str, ...]]:
    """Which roles besides the owner may do what with which table or column."""
    rows = await conn.fetch(
        """SELECT c.oid::regclass::text, '', a.grantee::regrole::text, a.privilege_type
           FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
           WHERE relnamespace = 'notifyq'::regnamespace AND a.grantee <> relowner
           UNION
           SELECT attrelid::regclass::text, attname, a.grantee::regrole::text, a.privilege_type
           FROM pg_attribute CROSS JOIN aclexplode(attacl) AS a
           WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace)"""
    )
    return {tuple(row) for row in rows}


async def test_users_functions_that_call_ours_go_on(conn: Any) -> None:
    """notifyq.enqueue has a new parameter, so it is another function. A user's function keeps the one that it was made
    with."""
    await install(conn)
    await conn.execute(
        "CREATE FUNCTION theirs() RETURNS bigint LANGUAGE sql"
        " BEGIN ATOMIC SELECT notifyq.enqueue('T', queue => 'q'); END;"
        "CREATE VIEW public.also AS SELECT id, state FROM notifyq.all_tasks"
    )
    await schema.migrate(conn)
    assert await conn.fetchval("SELECT theirs()") == 1
    assert await conn.fetchval("""SELECT notifyq.enqueue('T', options => '{"order_key": "a"}', label => 'x')""") == 2
    assert await conn.fetch("SELECT * FROM public.also") == [(1, "ready"), (2, "ready")]


@pytest.mark.parametrize("version", EARLIER)
async def test_by_hand(conn: Any, fresh: dict[str, str], version: int) -> None:
    """What `migrate --sql --from` prints, run as psql does: a command of psql's own is a line; then one statement, or
    transaction, follows the other."""
    await install(conn, version)
    head, *parts = re.split(r"^(?=SET lock_timeout)", upgrade.script(version, schema.schema_sql()), flags=re.MULTILINE)
    assert head.count("\n\\") == 1
    await conn.execute(head.replace("\\set ON_ERROR_STOP on", ""))
    for part in parts:
        setting, _, rest = part.partition("\n")
        await conn.execute(setting)
        await conn.execute(rest)
    assert await schema.installed_version(conn) == NEXT
    await conn.execute("RESET search_path")
    assert differences(fresh, await catalogs(conn)) == []


# --- Old workers beside new ones


def planned() -> dict[str, str]:
    """The statements of workers and clients: their plans matter, and are kept."""
    folder = Path(connection.__file__).parent / "sql"
    files = [*folder.glob("client/*.sql"), *folder.glob("worker/*.sql")]
    assert len(files) > 40
    return {path.stem: SQL[path.stem] for path in sorted(files)}


async def shapes(conn: Any) -> dict[str, Any]:
    """The parameters and columns of each."""
    found = {}
    for name, text in SQL.items():
        one = await conn.prepare(text)
        attributes = [(a.name, a.type.name) for a in one.get_attributes()]
        found[name] = ([p.name for p in one.get_parameters()], attributes)
    return found


async def indexes(conn: Any) -> dict[str, set[str]]:
    """Which indexes the plans read. None among them: a table is read as a whole."""
    found = {}
    for name, text in planned().items():
        count = len((await conn.prepare(text)).get_parameters())
        arguments = f"({', '.join(['NULL'] * count)})" if count else ""
        await conn.execute(f"PREPARE planned AS {text}")
        plan = await conn.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE planned{arguments}")
        await conn.execute("DEALLOCATE planned")
        found[name] = set(re.findall(r'"Index Name": "(\w+)"', plan))
        found[name] |= set(re.findall(r'"Node Type": "(Seq Scan)"[^{]*"Relation Name": "(?:task|finished)"', plan))
    return found


async def test_an_old_workers_statements_mean_the_same_after_an_upgrade(empty_dsn: str, conn: Any) -> None:
    """Each takes and returns what it did, and reads the same indexes: none reads a whole table from then on."""
    await install(conn)
    worker = await connection.connect_worker(empty_dsn, "test")
    try:
        before = {"shapes": await shapes(worker), "indexes": await indexes(worker)}
        await schema.migrate(conn)
        after = {"shapes": await shapes(worker), "indexes": await indexes(worker)}
        for what, of in before.items():
            assert {name: after[what][name] for name in of if after[what][name] != of[name]} == {}, what
    finally:
        worker.terminate()


async def test_old_and_new_workers_side_by_side(empty_dsn: str, conn: Any) -> None:
    """An old worker works while its schema is upgraded, and then beside a new one. Each task ends once."""
    await install(conn)
    app, seen = notifyq.App(), Seen()

    class Quick(notifyq.Task):
        pass

    @app.handler
    async def quick(task: Quick, ctx: notifyq.Context) -> None:
        seen.add(ctx.id)
        await anyio.sleep(0.001)

    old, stop = OldWorker(empty_dsn), anyio.Event()
    insert = "INSERT INTO notifyq.task (type) SELECT 'Quick' FROM generate_series(1, 100) RETURNING id"
    ids: list[int] = []

    async def enqueue(over: anyio.Event) -> None:
        enqueuer: Any = await connection.connect(empty_dsn, role="test")
        while not over.is_set():
            ids.extend(row[0] for row in await enqueuer.fetch(insert))
            await anyio.sleep(0.01)
        enqueuer.terminate()

    async with anyio.create_task_group() as group:
        group.start_soon(old.run, stop)
        over = anyio.Event()
        group.start_soon(enqueue, over)
        await eventually(old.has_settled(500))
        assert await schema.migrate(conn) == (SCHEMA_VERSION, NEXT)
        async with working(app, empty_dsn, concurrency=5):
            await seen.reach(500)
            await eventually(old.has_settled(len(old.settled) + 500))
            over.set()
            await eventually(lambda: conn.fetchval("SELECT count(*) FROM notifyq.task"), 0)
            stop.set()
    ended = [row[0] for row in await conn.fetch("SELECT id FROM notifyq.finished ORDER BY id")]
    assert ended == sorted(ids)
    assert sorted({*old.settled, *seen.items}) == ended
    assert len(set(old.settled)) == len(old.settled)
    assert not set(old.settled) & set(seen.items)


async def test_real_workers_under_an_upgrade(
    dsn: str, db: Any, spawn: Callable[..., Process], connect: Sessions
) -> None:
    """An upgrade was interrupted at its very end, so that all of it is run again, and again, while workers work; one of
    them is killed. Each task ends once, and the workers' prepared statements are prepared anew where they must be."""
    workers = [await started(spawn, "concurrency=20") for _ in range(2)]  # which has all read that they say
    app = notifyq.App()

    class Quick(notifyq.Task):
        pass

    ids: list[int] = []
    async with app.connect(dsn), anyio.create_task_group() as group:
        over = anyio.Event()

        async def enqueue() -> None:
            while not over.is_set():
                ids.append((await app.enqueue(Quick())).id)
                ids.extend(await app.enqueue_many([Quick()] * 5, delay=0.02))

        group.start_soon(enqueue)
        for number in range(5):
            await db.execute(f"DELETE FROM notifyq.schema_version WHERE version = {NEXT}")
            assert await schema.migrate(await connect()) == (SCHEMA_VERSION, NEXT)
            if number == 2:
                workers[0].process.signal(signal.SIGKILL)
        over.set()
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    rows = await db.fetch("SELECT id, state, errors ->> 0 AS error FROM notifyq.finished ORDER BY id")
    assert [row["id"] for row in rows] == sorted(ids)
    assert {row["state"] for row in rows} == {"done"}
    vanished = f":{workers[0].process.pid} vanished while it ran"
    assert all(vanished in row["error"] for row in rows if row["error"]), "those that the killed worker had, no others"


# --- Locks


STRONG = """
    SELECT DISTINCT relname FROM pg_locks JOIN pg_class c ON c.oid = relation
    WHERE pid = pg_backend_pid() AND relnamespace = 'notifyq'::regnamespace AND relkind IN ('r', 'v')
      AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')"""


@pytest.mark.parametrize("version", EARLIER)
async def test_a_step_locks_the_tables_that_it_says(conn: Any, version: int) -> None:
    """A step that locks the table of tasks locks no other: while it waits for one table, it must not block another. No
    step rewrites a table."""
    await install(conn, version)
    files = """SELECT relname, pg_relation_filenode(oid) FROM pg_class
               WHERE relnamespace = 'notifyq'::regnamespace AND relkind <> 'S'"""
    before = dict(await conn.fetch(files))
    *steps, last = upgrade.steps(version, schema.schema_sql())
    for step in [*steps, last]:
        if step.locks is None:
            assert "CONCURRENTLY" in step.sql or re.search(
                r"^COMMENT ON (TABLE|COLUMN) notifyq\.bell", step.sql, re.MULTILINE
            )
            await conn.execute(step.sql)
            continue
        async with conn.transaction():
            await conn.execute(step.sql)
            locked = {row[0] for row in await conn.fetch(STRONG)} & set(before)
            assert locked == set(step.locks), step.sql
        assert len(step.locks) <= 1 or step is last
    after = dict(await conn.fetch(files))
    assert {name: after.get(name) for name in before} == before


async def test_no_statement_waits_for_an_upgrade_that_waits(empty_dsn: str, conn: Any, probe: Probe) -> None:
    """A transaction that has enqueued stays open for seconds, another that reads for longer. Meanwhile others enqueue,
    claim and settle: none of their statements waits for long, however long the upgrade must wait."""
    await install(conn)
    said: list[str] = []
    told = anyio.Event()

    def say(line: str) -> None:
        said.append(line)
        told.set()

    waits: list[float] = []
    ids: list[int] = []
    upgraded = anyio.Event()

    async def enqueue() -> None:
        enqueuer: Any = await connection.connect(empty_dsn, role="test")
        while not upgraded.is_set():
            began = time.perf_counter()
            ids.append(await enqueuer.fetchval("INSERT INTO notifyq.task (type) VALUES ('Quick') RETURNING id"))
            waits.append(time.perf_counter() - began)
            await anyio.sleep(0.002)
        enqueuer.terminate()

    old, stop = OldWorker(empty_dsn), anyio.Event()
    writes: Any = await connection.connect(empty_dsn, role="writer")
    reads: Any = await connection.connect(empty_dsn, role="reader")
    async with anyio.create_task_group() as group:
        group.start_soon(old.run, stop)
        for _ in range(4):
            group.start_soon(enqueue)
        await writes.execute("BEGIN; INSERT INTO notifyq.task (type) VALUES ('Quick')")
        migrating = asyncio.create_task(schema.migrate(conn, say))
        with anyio.fail_after(limit()):
            await told.wait()
        await reads.execute("BEGIN; SELECT FROM notifyq.all_tasks LIMIT 1")
        for session in (writes, reads):
            more = len(waits) + 400
            with anyio.fail_after(limit()):
                while len(waits) < more:
                    await anyio.sleep(0.05)
            await anyio.sleep(1)  # several of its tries
            assert not migrating.done()
            await session.execute("COMMIT")
        assert await migrating == (SCHEMA_VERSION, NEXT)
        upgraded.set()
        await eventually(lambda: conn.fetchval("SELECT count(*) FROM notifyq.task"), 0)
        stop.set()
    writes.terminate()
    reads.terminate()
    late = probe.late()
    assert max(waits) < 0.5 + late, "it is 0.1 s, and what this machine adds"
    assert sum(wait > 0.2 + late for wait in waits) < len(waits) / 20, sorted(waits)[-20:]
    assert old.sleeps > 0, "it had the bell"
    assert len(old.settled) == len(ids) + 1
    assert re.fullmatch(
        r"waiting for notifyq\.task, which is in use by notifyq writer "
        r"\(process \d+, user notifyq, idle in transaction, open for \d+\.\d s\)",
        said[0],
    )
