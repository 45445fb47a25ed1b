"""Fixtures that any test may use: a database, connections, roles, worker processes, commands, log records.

The tests of one process share one embedded PostgreSQL. Each test has its own database: a copy of a template, or one
that an earlier test used and that was emptied. No test waits for a fixed time: it waits for an event, and the limit of
that wait is reached only by a test that fails.
"""

from __future__ import annotations

import gc
import io
import logging
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio.to_thread
import pytest
from anyio.from_thread import BlockingPortal
from hypothesis import HealthCheck, settings

from notifyq.cli import main
from notifyq.database import connection
from notifyq.embedded import Server
from notifyq.testing import Databases
from notifyq.worker import heartbeat

from .helpers.command import Run, Said
from .helpers.databases import Sessions, Stock, admin, database, grants
from .helpers.logs import Logged
from .helpers.machine import Probe, probing
from .helpers.processes import Process, Spawn
from .helpers.steps import Steps, steps

pytest_plugins = ["notifyq.testing.plugin"]

# How long an example takes, or takes to be made, says how busy the machine is, and nothing about the code.
settings.register_profile("notifyq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("notifyq")


# The files that take longest begin first, so that at the end no process is left alone with one of them.
FIRST = (
    *("faults", "connections_lost", "clock_steps", "bytes", "left_out", "migrations", "refusals", "smaller_outcomes"),
    *("forked", "network", "embedded", "models", "plans", "doorbell", "schedule", "cli_worker", "cancel", "unique"),
    *("cli_processes", "docs_snippets", "batch_leases", "results_cost", "unique_keys", "django", "stop", "odd_values"),
    *("progress", "options", "limits", "drain", "after", "findings", "transactions", "drivers", "publication"),
    *("interleavings_turn", "dsn", "statements", "cron", "cli", "refs", "lifecycle"),
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
async def s(dsn: str) -> AsyncIterator[Steps]:
    """Sessions on the test's database, which the test steps by hand."""
    async with steps(dsn) as s:
        yield s


@pytest.fixture
async def probe(server: Server) -> AsyncIterator[Probe]:
    """`with probe.within(0.2): ...`: for a promise with a bound in time."""
    async with probing(server.dsn("postgres")) as probe:
        yield probe


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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`await run("tasks --limit 1", dsn=dsn)`; further arguments that aren't to be split follow the first."""

    async def command(words: str, *more: str, dsn: str | None = None, stdin: bytes = b"") -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        args = [*words.split(), *more, *([] if dsn is None else ["--dsn", dsn])]
        code = await anyio.to_thread.run_sync(main, args)
        return Said(code, *capsys.readouterr())

    return command


@pytest.fixture
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process have a heartbeat every 0.4 s: for tests that wait for one, whenever it comes."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.2)


@pytest.fixture
def spawn(dsn: str) -> Iterator[Spawn]:
    """`spawn("SLEEP")`: a worker process, killed at the end of the test at the latest."""
    processes: list[Process] = []

    def start(*args: str) -> Process:
        processes.append(Process(dsn, *args))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """`logged("lease lost")`: the fields of each record so far whose message has this text."""
    caplog.set_level(logging.DEBUG, logger="notifyq")
    return lambda text: [getattr(r, "fields", {}) for r in caplog.records if text in r.getMessage()]
