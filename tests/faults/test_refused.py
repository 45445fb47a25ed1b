"""Refusals of a server, at the start or later: a wrong password, too many connections, a session that is too slow."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection, schema
from notifyq.embedded import Server

from ..helpers.logs import Logged
from ..helpers.machine import Probe, limit
from ..helpers.proxy import free_port
from ..helpers.running import working
from ..helpers.waiting import Seen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server with few connections, where `mallory` and `worker` need a password."""
    with tempfile.TemporaryDirectory() as folder:
        hba = Path(folder) / "hba"
        hba.write_text("host all notifyq 127.0.0.1/32 trust\nlocal all all trust\nhost all all all scram-sha-256\n")
        Path(folder).chmod(0o755)
        settings = {"max_connections": "20", "superuser_reserved_connections": "0", "hba_file": str(hba)}
        with Server(port=free_port(), settings=settings) as running:
            yield running


@pytest.fixture
async def db(small: Server) -> AsyncIterator[Any]:
    """A connection that keeps its slot, to a schema without tasks, and a role `worker` that may run workers there."""
    conn = await connection.connect(small.dsn(), role="test")
    await conn.execute("DROP SCHEMA IF EXISTS notifyq CASCADE")
    await schema.migrate(conn)
    await conn.execute("DROP ROLE IF EXISTS worker")
    await conn.execute("CREATE ROLE worker LOGIN PASSWORD 'right'")
    for what in ("USAGE ON SCHEMA", "ALL ON ALL TABLES IN SCHEMA", "ALL ON ALL SEQUENCES IN SCHEMA"):
        await conn.execute(f"GRANT {what} notifyq TO worker")
    yield conn
    await conn.execute("DROP OWNED BY worker")
    await conn.close()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def app(seen: Seen) -> notifyq.App:
    app = notifyq.App()

    class Note(notifyq.Task):
        pass

    @app.handler
    async def note(task: Note, ctx: notifyq.Context) -> None:
        seen.add(ctx.id)

    return app


def as_worker(server: Server, password: str = "right") -> str:
    return server.dsn().replace("//notifyq@", f"//worker:{password}@")


async def woken(db: Any, seen: Seen) -> None:
    id = await db.fetchval("INSERT INTO notifyq.task (type) VALUES ('Note') RETURNING id")
    with anyio.fail_after(limit()):
        while id not in seen.items:
            await anyio.sleep(0.002)


async def refused(dsn: str) -> str:
    """The message of `notifyq worker` before it exits with 3."""
    args = [sys.executable, "-m", "notifyq", "worker", "tests.helpers.workers:app", "--dsn", dsn]
    done = await anyio.run_process(args, check=False)
    assert done.returncode == 3, done.stderr
    return done.stderr.decode()


async def refusals(server: Server, text: str, count: int) -> None:
    """Wait until the server's log has more of these lines. The worker's own log has only the first."""
    before = server.log_path.read_text().count(text)
    with anyio.fail_after(limit()):
        while server.log_path.read_text().count(text) < before + count:
            await anyio.sleep(0.01)


END = """SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE application_name ~ '^notifyq (claims|bell)'"""

CLAIMS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'notifyq claims%'"


async def test_a_wrong_password(small: Server, db: Any) -> None:
    """At the start it is exit code 3, with the cure and without the password."""
    said = await refused(as_worker(small, "wr0ng"))
    assert "check the user and the password" in said
    assert "wr0ng" not in said


async def test_a_password_that_is_changed(
    small: Server, db: Any, app: notifyq.App, seen: Seen, logged: Logged, probe: Probe
) -> None:
    """A running worker tries until the password is right again."""
    async with working(app, as_worker(small)) as worker:
        await woken(db, seen)
        await db.execute("ALTER ROLE worker PASSWORD 'new'")
        assert await db.fetchval(END) >= 1  # or 2: of the second, the worker may have let go by itself meanwhile
        await refusals(small, "password authentication failed", 3)
        id = await db.fetchval("INSERT INTO notifyq.task (type) VALUES ('Note') RETURNING id")
        await db.execute("ALTER ROLE worker PASSWORD 'right'")
        with probe.within(8):
            await seen.reach(2)
        assert seen.items[-1] == id
        assert not worker.done.is_set()
    stages = ["claim"], ["claim", "settle"]  # which has a connection of its own, and may have been without one
    assert sorted(fields["stage"] for fields in logged("lost the database")) in stages
    assert len(logged("lost the database")) == len(logged("the database is back"))
    assert "right" not in str(logged(""))


async def test_connections_exhausted(
    small: Server, db: Any, app: notifyq.App, seen: Seen, logged: Logged, probe: Probe
) -> None:
    """At the start it is exit code 3, with the reason. Later it is logged once, and the worker goes on when it gets a
    connection again."""
    others = list[Any]()

    async def take_all() -> None:
        while True:
            try:
                others.append(await asyncpg.connect(small.dsn()))
            except asyncpg.TooManyConnectionsError:
                return

    try:
        async with working(app, as_worker(small)) as worker:
            await woken(db, seen)
            await take_all()
            assert "too many clients" in await refused(as_worker(small))
            with probe.within(1):
                await woken(db, seen)  # a session that is open goes on
            # What is freed is taken at once, until the worker has none to claim on.
            with anyio.fail_after(limit()):
                while await db.fetchval(CLAIMS):
                    await db.fetchval(END)
                    await take_all()
            await refusals(small, "too many clients", 1)
            id = await db.fetchval("INSERT INTO notifyq.task (type) VALUES ('Note') RETURNING id")
            for other in others:
                other.terminate()
            with probe.within(8):  # the longest wait between two tries is 5 s
                while id not in seen.items:
                    await anyio.sleep(0.01)
            assert not worker.done.is_set()
    finally:
        for other in others:
            other.terminate()
    assert Counter(seen.items).most_common(1)[0][1] == 1


async def test_limits_meant_for_people(
    small: Server, db: Any, app: notifyq.App, seen: Seen, logged: Logged, probe: Probe
) -> None:
    """The timeouts of its role don't hold for a worker: it sleeps in a transaction, and waits in statements."""
    for name in ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout", "idle_session_timeout"):
        await db.execute(f"ALTER ROLE worker SET {name} = '100ms'")
    if await db.fetchval("SELECT EXISTS (SELECT FROM pg_settings WHERE name = 'transaction_timeout')"):
        await db.execute("ALTER ROLE worker SET transaction_timeout = '100ms'")
    async with working(app, as_worker(small)), working(app, as_worker(small)):
        began = await db.fetchval("SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE usename = 'worker'")
        await woken(db, seen)
        await anyio.sleep(1.0)  # of the other: ten times what is allowed
        with probe.within(1):
            await woken(db, seen)
        now = await db.fetch("SELECT pid FROM pg_stat_activity WHERE usename = 'worker'")
        assert {row[0] for row in now} >= set(began), "every connection is the one it was"
    assert not logged("lost the database") + logged("out of reach")
