"""One embedded PostgreSQL for a test session, a database of its own for each test, and workers to put there.

A database is a copy of one that was migrated once, and often some other test's before. Nothing here waits by the clock;
what a test waits for has a limit, which only a failing test reaches.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.abc
import asyncpg
import pytest
from anyio.from_thread import BlockingPortal
from hypothesis import HealthCheck, settings

import notifyq
from notifyq.database import connection, schema
from notifyq.embedded import Server
from notifyq.testing import Databases
from notifyq.worker import heartbeat

from .helpers.machine import LIMIT_SECONDS, Probe, limit, probing

pytest_plugins = ["notifyq.testing.plugin"]

# How long an example takes, or takes to be made, says how busy the machine is, and nothing about the code.
settings.register_profile("notifyq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("notifyq")

_numbers = itertools.count()

# The files that take longest are begun first, so that no process is left with one at the end.
FIRST = (
    *("faults", "clock_steps", "bytes", "left_out", "migrations", "refusals", "forked", "network", "embedded"),
    *("cli", "statements", "doorbell", "schedule", "unique", "testing", "transactions", "batch", "findings", "schema"),
    *("cancel", "limits", "cron", "models", "lifecycle", "after"),
)


def pytest_configure() -> None:
    """A shell starts `make test &` in a script with SIGINT ignored. Programs that tests start would inherit that, and
    what they start in turn: no SIGINT would end them. A signal with a handler is the default again in a new program."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported is there to stay, and need not be looked through again


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The session's server. A test that stops or restarts it makes one of its own."""
    with Server(settings={"max_connections": "300", "max_prepared_transactions": "10"}) as running:
        yield running


@pytest.fixture(scope="session")
def notifyq_server_dsn(server: Server) -> str:
    """The plugin's databases are on it too."""
    return server.dsn("postgres")


async def admin(server: Server, *statements: str) -> None:
    """Run statements in the server's own database."""
    conn = await connection.connect(server.dsn("postgres"), role="test")
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


@asynccontextmanager
async def database(server: Server, template: str) -> AsyncIterator[str]:
    """A copy of `template`: its DSN. Gone at the end, whoever is still connected."""
    name = f"t{next(_numbers)}"
    await admin(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.dsn(name)
    await admin(server, f"DROP DATABASE {name} WITH (FORCE)")


class Stock:
    """`async with stock.database() as dsn: ...`: a database with the schema and nothing in it.

    When it is done with, it is emptied for the next test. That takes some ms; a copy and a drop take 40, and were a
    fifth of the whole run. One that has grown, or in which anything but rows has changed, goes to nobody. Each has a
    session that stays, as one that is new looks up every table anew, which takes longer than all the rest.
    """

    # All that a test might do to a schema: what is new anywhere has a higher oid, and what has changed in notifyq's
    # own objects, or in short lists, another xmin. And what is written without a new row.
    _STATE = """
    WITH ours AS (SELECT oid, xmin, reltuples, relname FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace)
    SELECT (SELECT max(oid) FROM pg_class), (SELECT max(oid) FROM pg_proc), (SELECT max(oid) FROM pg_type),
           (SELECT max(oid) FROM pg_constraint),
           (SELECT bool_or(reltuples > 0) OR sum(pg_relation_size(oid)) > 1000000 FROM ours
            WHERE relname !~ '^(key_lock|schema_version)'),
           count(*), max(xmin::text::bigint)
    FROM (SELECT xmin FROM ours
          UNION ALL SELECT xmin FROM pg_attribute WHERE attrelid IN (SELECT oid FROM ours)
          UNION ALL SELECT xmin FROM pg_attrdef UNION ALL SELECT xmin FROM pg_trigger
          UNION ALL SELECT xmin FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace
          UNION ALL SELECT xmin FROM pg_constraint WHERE connamespace = 'notifyq'::regnamespace
          UNION ALL SELECT xmin FROM pg_namespace UNION ALL SELECT xmin FROM pg_extension
          UNION ALL SELECT xmin FROM pg_publication UNION ALL SELECT xmin FROM pg_policy
          UNION ALL SELECT xmin FROM pg_event_trigger UNION ALL SELECT xmin FROM pg_default_acl
          UNION ALL SELECT xmin FROM pg_database WHERE datname = current_database()
          UNION ALL SELECT s.xmin FROM pg_db_role_setting s
          JOIN pg_database d ON d.oid = s.setdatabase AND d.datname = current_database()
          UNION ALL SELECT xmin FROM notifyq.schema_version UNION ALL SELECT '1' FROM notifyq.key_lock) it"""
    _TABLES = """
    SELECT array_agg(oid::regclass::text) FROM pg_class
    WHERE relnamespace = 'notifyq'::regnamespace AND relkind = 'r' AND relname NOT IN ('key_lock', 'schema_version')"""
    _LEAVE = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    _EMPTY = """
    {deletes};
    SELECT setval(format('%I.%I', schemaname, sequencename), start_value, false) FROM pg_sequences
    WHERE schemaname = 'notifyq'"""

    def __init__(self, server: Server, template: str) -> None:
        self._server = server
        self._template = template
        self._empty = ""
        self._clean: list[Copy] = []

    async def __aenter__(self) -> Stock:
        conn = await connection.connect(self._server.dsn(self._template), role="test")
        tables = await conn.fetchval(self._TABLES)
        self._empty = self._EMPTY.format(deletes=";".join(f"DELETE FROM {table}" for table in tables))
        await conn.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._clean:
            await self._clean.pop().stack.aclose()

    async def _copy(self) -> Copy:
        stack = AsyncExitStack()
        dsn = await stack.enter_async_context(database(self._server, self._template))
        conn = await asyncpg.connect(dsn, server_settings={"session_replication_role": "replica"})  # no triggers
        stack.callback(conn.terminate)
        return Copy(dsn, stack, conn, await conn.fetchrow(self._STATE))

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        copy = self._clean.pop() if self._clean else await self._copy()
        yield copy.dsn
        clean = False
        try:
            await copy.conn.execute(self._LEAVE)
            if clean := await copy.conn.fetchrow(self._STATE) == copy.new:
                await copy.conn.execute(self._empty)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            clean = False  # a test has dropped the schema, or has ended the session
        if clean:
            self._clean.append(copy)
        else:
            await copy.stack.aclose()


class Copy(NamedTuple):
    """A database of the stock, what drops it, its session that stays, and its state when it was new."""

    dsn: str
    stack: AsyncExitStack
    conn: Any
    new: Any


@pytest.fixture(scope="session")
def stock(_notifyq_portal: BlockingPortal, server: Server, template: str) -> Iterator[Stock]:
    with _notifyq_portal.wrap_async_context_manager(Stock(server, template)) as stock:
        yield stock


@pytest.fixture(scope="session")
def template(notifyq_databases: Databases) -> str:
    """The name of a database with the schema, to make copies of."""
    return notifyq_databases.template


@pytest.fixture
def dsn(_notifyq_portal: BlockingPortal, stock: Stock) -> Iterator[str]:
    """A database with the schema, and nothing in it."""
    with _notifyq_portal.wrap_async_context_manager(stock.database()) as dsn:
        yield dsn


@pytest.fixture
async def empty_dsn(server: Server) -> AsyncIterator[str]:
    """A database without the schema."""
    async with database(server, "template0") as dsn:
        yield dsn


class Sessions:
    """Connections to one database, closed at the end."""

    def __init__(self, dsn: str, stack: AsyncExitStack) -> None:
        self.dsn = dsn
        self._stack = stack

    async def __call__(self, dsn: str | None = None) -> Any:
        conn = await connection.connect(dsn or self.dsn, role="test")
        self._stack.callback(conn.terminate)
        return conn


@pytest.fixture
async def connect(dsn: str) -> AsyncIterator[Sessions]:
    """`await connect()`: another connection to the test's database."""
    async with AsyncExitStack() as stack:
        yield Sessions(dsn, stack)


@pytest.fixture
async def db(connect: Sessions) -> Any:
    """A connection to the test's database."""
    return await connect()


@pytest.fixture
async def probe(server: Server) -> AsyncIterator[Probe]:
    """`with probe.within(0.2): ...`: for a promise with a bound in time."""
    async with probing(server.dsn("postgres")) as probe:
        yield probe


# Roles, by the GRANTs that schema.sql documents.


def grants(role: str, schema_sql: str = schema.schema_sql()) -> list[str]:
    """The GRANTs for this role, as they stand in the comment at the end of schema.sql."""
    text = schema_sql.rpartition("-- Roles.")[2]
    lines = [line.removeprefix("--").strip().partition("  -- ")[0] for line in text.splitlines()]
    starts = {
        "enqueuer": "may enqueue",
        "keys": "with keys",
        "reader": "may read",
        "awaiter": "may await",
        "operator": "operator",
        "worker": "worker",
    }
    found: list[str] = []
    inside = False
    for line in lines:
        if any(line.startswith(start) for start in starts.values()):
            inside = line.startswith(starts[role])
            line = line[line.index("GRANT") :]  # noqa: PLW2901
        if inside and line.startswith("GRANT") and " TO r;" in line:
            found.append(line.replace("TO r;", f"TO {role};"))
    return found


@pytest.fixture(scope="module")
async def roles(server: Server, template: str) -> AsyncIterator[Any]:
    """A database where each role has exactly what is documented, and `roles("reader")` is a DSN for it."""
    await admin(server, f"CREATE DATABASE roles TEMPLATE {template}")
    for role in ("enqueuer", "reader", "awaiter", "operator", "worker"):
        await admin(server, f"CREATE ROLE {role} LOGIN")
        conn = await connection.connect(server.dsn("roles"), role="test")
        assert len(grants(role)) >= 2
        for grant in grants(role):
            await conn.execute(grant)
        await conn.close()

    def dsn(role: str) -> str:
        return server.dsn("roles").replace("://notifyq@", f"://{role}@")

    yield dsn
    await admin(server, "DROP DATABASE roles WITH (FORCE)", "DROP ROLE enqueuer, reader, awaiter, operator, worker")


@pytest.fixture
async def as_role(roles: Any) -> AsyncIterator[Any]:
    conns: list[Any] = []

    async def connect(role: str) -> Any:
        conns.append(await connection.connect(roles(role), role="test"))
        assert await conns[-1].fetchval("SELECT current_user") == role
        return conns[-1]

    yield connect
    for conn in conns:
        conn.terminate()


# Functions that an extension adds under the names of PostgreSQL's own make a call with untyped arguments ambiguous.


async def overload(db: Any) -> None:
    """Overload what notifyq calls, each with types that an untyped or shorter call could mean as well."""
    overloads = {
        "pg_terminate_backend": ("bigint", "text", "integer"),
        "pg_cancel_backend": ("bigint", "text"),
        "pg_notify": ("name, name",),
        "set_config": ("name, name, boolean", "text, integer, boolean"),
        "make_interval": ("secs integer", "secs numeric", "secs text"),
    }
    for lock in ("advisory_lock", "try_advisory_lock", "try_advisory_lock_shared", "advisory_unlock"):
        overloads[f"pg_{lock}"] = ("integer, bigint", "bigint, bigint", "integer, text")
    overloads["pg_try_advisory_xact_lock"] = overloads["pg_advisory_xact_lock"] = overloads["pg_advisory_lock"]
    for name, arguments in overloads.items():
        for types in arguments:
            await db.execute(f"""CREATE FUNCTION pg_catalog.{name}({types}) RETURNS boolean LANGUAGE plpgsql
                                 AS $$ BEGIN RAISE EXCEPTION 'the wrong {name}'; END $$""")


# Workers.


class RunningWorker:
    """A worker in this process."""

    def __init__(self, info: notifyq.WorkerInfo, stop: anyio.Event, force: anyio.Event, done: anyio.Event) -> None:
        self.info = info
        self.stop = stop
        self.force = force
        self.done = done  # set when it has returned

    async def stopped(self) -> None:
        self.stop.set()
        with anyio.fail_after(limit()):
            await self.done.wait()


@asynccontextmanager
async def working(app: notifyq.App, dsn: str, **options: Any) -> AsyncIterator[RunningWorker]:
    """A worker of `app` that works inside the block, the fallback poll off; drained at its end."""
    options = {"poll_interval": 0.0, "shutdown_timeout": 5.0, **options}
    stop, force, done = anyio.Event(), anyio.Event(), anyio.Event()

    async def run(*, task_status: anyio.abc.TaskStatus[notifyq.WorkerInfo]) -> None:
        try:
            await app.run_worker(dsn=dsn, stop=stop, force=force, task_status=task_status, **options)
        finally:
            done.set()

    async with anyio.create_task_group() as group:
        with anyio.fail_after(limit()):
            info = await group.start(run)
        yield RunningWorker(info, stop, force, done)
        stop.set()


@pytest.fixture
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process have a heartbeat every 0.4 s: for tests that wait for one, whenever it comes."""
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.2)


class Seen:
    """What handlers have done, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._changed = anyio.Event()

    def add(self, item: Any) -> None:
        self.items.append(item)
        self._changed.set()
        self._changed = anyio.Event()

    async def reach(self, count: int, seconds: float = LIMIT_SECONDS) -> list[Any]:
        """Wait for that many."""
        with anyio.fail_after(limit(seconds)):
            while len(self.items) < count:
                await self._changed.wait()
        return self.items


def ids_of(lines: list[dict[str, Any]]) -> list[int]:
    """The ids of all tasks that these log lines name, in order: one that is named twice is there twice."""
    return sorted(id for line in lines for id in line["ids"])


async def eventually(query: Callable[[], Any], want: Any = True, seconds: float = LIMIT_SECONDS) -> None:
    """Wait until what the database says is `want`: for what only it knows, and nobody signals."""
    value, seconds = None, limit(seconds)
    try:
        with anyio.fail_after(seconds):
            while (value := await query()) != want:
                await anyio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"after {seconds:.0f} s it is {value!r}, not {want!r}") from None


class Process:
    """A worker in a process of its own, running tests/helpers/workers.py; it prints a line of JSON for each event."""

    def __init__(self, dsn: str, *args: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "helpers" / "workers.py"), dsn, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.pid = self.popen.pid

    async def line(self, event: str) -> dict[str, Any]:
        """The next line that tells of `event`; others are skipped."""
        assert self.popen.stdout is not None
        with anyio.fail_after(limit()):
            while True:
                text = await anyio.to_thread.run_sync(self.popen.stdout.readline, abandon_on_cancel=True)
                if not text:
                    raise AssertionError(f"the worker ended before {event!r}: {self.popen.communicate()[1]}")
                line: dict[str, Any] = json.loads(text)
                if line["event"] == event:
                    return line

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def wait(self) -> int:
        with anyio.fail_after(limit()):
            return await anyio.to_thread.run_sync(self.popen.wait, abandon_on_cancel=True)

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def spawn(dsn: str) -> Iterator[Callable[..., Process]]:
    """`spawn("SLEEP")`: a worker process, killed at the end of the test at the latest."""
    processes: list[Process] = []

    def start(*args: str) -> Process:
        processes.append(Process(dsn, *args))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[dict[str, Any]]]:
    """`logged("lease lost")`: the fields of each record so far whose message has this text."""
    caplog.set_level(logging.DEBUG, logger="notifyq")
    return lambda text: [getattr(r, "fields", {}) for r in caplog.records if text in r.getMessage()]
