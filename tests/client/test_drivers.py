"""Enqueue on connections of other libraries: in their transactions, with their own ways and settings; and
SyncClient."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import psycopg
import psycopg.rows
import pytest
import sqlalchemy
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as alchemy

import notifyq
from notifyq.client import drivers
from notifyq.embedded import Server
from notifyq.errors import ConfigError, DatabaseError, SchemaError

from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

COUNT = "SELECT count(*) FROM notifyq.task"


class Mail(notifyq.Task, tag="MAIL"):
    to: str


class Other(notifyq.Task):
    pass


@pytest.fixture
def app() -> notifyq.App:
    return notifyq.App()


def url(dsn: str, driver: str) -> str:
    return dsn.replace("postgresql://", f"postgresql+{driver}://")


@asynccontextmanager
async def psycopg_sync(dsn: str) -> AsyncIterator[Any]:
    # Whatever a connection's own factories make of rows and of $1.
    with psycopg.connect(dsn, row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.ClientCursor) as conn:
        yield conn


@asynccontextmanager
async def psycopg_async(dsn: str) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(dsn, row_factory=psycopg.rows.dict_row) as conn:
        yield conn


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[Any]:
    engine = sqlalchemy.create_engine(url(dsn, "psycopg"))
    with orm.Session(engine) as session:
        yield session
    engine.dispose()


@asynccontextmanager
async def scoped_session(dsn: str) -> AsyncIterator[Any]:
    engine = sqlalchemy.create_engine(url(dsn, "psycopg"))
    session = orm.scoped_session(orm.sessionmaker(engine))
    yield session
    session.remove()
    engine.dispose()


@asynccontextmanager
async def connection(dsn: str) -> AsyncIterator[Any]:
    engine = sqlalchemy.create_engine(url(dsn, "psycopg"))
    with engine.connect() as conn:
        yield conn
    engine.dispose()


@asynccontextmanager
async def async_session(dsn: str) -> AsyncIterator[Any]:
    engine = alchemy.create_async_engine(url(dsn, "asyncpg"))
    async with alchemy.AsyncSession(engine) as session:
        yield session
    await engine.dispose()


@asynccontextmanager
async def async_session_psycopg(dsn: str) -> AsyncIterator[Any]:
    engine = alchemy.create_async_engine(url(dsn, "psycopg"))
    async with alchemy.AsyncSession(engine) as session:
        yield session
    await engine.dispose()


@asynccontextmanager
async def async_connection(dsn: str) -> AsyncIterator[Any]:
    engine = alchemy.create_async_engine(url(dsn, "asyncpg"))
    async with engine.connect() as conn:
        yield conn
    await engine.dispose()


KINDS = [
    psycopg_sync, psycopg_async, session, scoped_session, connection, async_session, async_session_psycopg,
    async_connection,
]  # fmt: skip

each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


async def done(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def client(app: notifyq.App, conn: Any) -> Any:
    """The client that takes this connection. Every kind has commit and rollback, and some of them are awaited."""
    return app if inspect.iscoroutinefunction(conn.commit) else notifyq.SyncClient(app)


async def say(conn: Any, statement: str) -> None:
    await done(conn.execute(statement if isinstance(conn, psycopg.Connection | psycopg.AsyncConnection)
                            else sqlalchemy.text(statement)))  # fmt: skip


@each
async def test_in_its_transaction(app: notifyq.App, dsn: str, db: Any, kind: Any) -> None:
    """If it is rolled back, the task never existed, also if it was the transaction's first statement. If it is
    committed, the task is there as it was sent."""
    at = datetime(2100, 1, 1, tzinfo=UTC)
    text = 'ä%s :x $1 "\\\U0001f600'
    async with kind(dsn) as conn:
        to = client(app, conn)
        for end in (conn.rollback, conn.commit):
            ref = await done(to.enqueue(Mail(to=text), conn=conn, queue="q%s", priority=-7, max_attempts=3, run_at=at))
            late = await done(to.enqueue(Other(), conn=conn, delay=60, order_key=text, after=[ref]))
            more = await done(to.enqueue_many([Mail(to="b"), Other()], conn=conn, delay=2.0, priority=5))
            one = await done(to.enqueue(Other(), conn=conn, unique=text, limit_key="l", rate="1/s"))
            assert await done(to.enqueue(Mail(to="b"), conn=conn, unique=text)) == one
            assert await db.fetchval(COUNT) == 0
            await done(end())
    rows = await db.fetch("SELECT * FROM notifyq.task ORDER BY id")
    assert [row["id"] for row in rows] == [ref.id, late.id, *more, one.id]  # type: ignore[possibly-undefined]
    assert json.loads(rows[0]["payload"]) == {"to": text}
    assert [(r["type"], r["queue"], r["priority"], r["max_attempts"]) for r in rows] == [
        ("MAIL", "q%s", -7, 3),
        ("Other", "default", 0, None),
        ("MAIL", "default", 5, None),
        ("Other", "default", 5, None),
        ("Other", "default", 0, None),
    ]
    assert rows[0]["run_at"] == at
    assert [round((r["run_at"] - r["created_at"]).total_seconds()) for r in rows[1:]] == [60, 2, 2, 0]
    assert [row["options"] and json.loads(row["options"]) for row in rows] == [
        None,
        {"order_key": text, "after": [ref.id]},
        None,
        None,
        {"unique_key": text, "on_conflict": "keep", "limit_key": "l", "limit_rate": 1, "limit_seconds": 1},
    ]


@each
async def test_a_worker_runs_what_was_committed(app: notifyq.App, dsn: str, db: Any, kind: Any) -> None:
    seen = Seen()

    @app.handler
    async def mail(task: Mail) -> None:
        seen.add(task.to)

    async with working(app, dsn), kind(dsn) as conn:
        for to, end in (("undone", conn.rollback), ("sent", conn.commit)):
            await done(client(app, conn).enqueue(Mail(to=to), conn=conn))
            await done(end())
        assert await seen.reach(1) == ["sent"]


@each
async def test_many_more_than_one_statement_has_of_asyncpgs(app: notifyq.App, dsn: str, db: Any, kind: Any) -> None:
    """If preparing them fails half-way, none was sent, and the transaction goes on."""

    def broken() -> Any:
        yield from (Mail(to="a") for _ in range(3000))
        raise RuntimeError("no more")

    async with kind(dsn) as conn:
        to = client(app, conn)
        with pytest.raises(RuntimeError, match="no more"):
            await done(to.enqueue_many(broken(), conn=conn))
        assert await done(to.enqueue_many([], conn=conn)) == []
        ids = await done(to.enqueue_many((Mail(to=str(n)) for n in range(4321)), conn=conn))
        await done(conn.commit())
    rows = await db.fetch("SELECT id, payload FROM notifyq.task ORDER BY id")
    assert [row["id"] for row in rows] == ids
    assert [json.loads(row["payload"])["to"] for row in rows] == [str(n) for n in range(4321)]


@each
async def test_what_postgresql_has_against_it(app: notifyq.App, dsn: str, server: Server, kind: Any) -> None:
    """The error is the one that asyncpg gives, whatever the library wraps it in, without the statement and its
    values."""

    async def fails(error: type[Exception], message: str, *tasks: Mail) -> None:
        with pytest.raises(error, match=message) as caught:
            await done(client(app, conn).enqueue(tasks[0], conn=conn))
        assert "[SQL" not in str(caught.value)
        await done(conn.rollback())
        with pytest.raises(error, match=message):
            await done(client(app, conn).enqueue_many(tasks, conn=conn))
        await done(conn.rollback())

    async with kind(dsn) as conn:
        await fails(ConfigError, r"task MAIL: PostgreSQL can't store this payload: .*unsupported", Mail(to="\x00"))
        await say(conn, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        await done(conn.commit())
        await fails(DatabaseError, r"this server, or this transaction, is read-only", Mail(to="a"))
        await say(conn, "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
        await say(conn, "SET ROLE pg_monitor")
        await done(conn.commit())
        await fails(DatabaseError, r"this user may not enqueue: permission denied", Mail(to="a"))
    async with kind(server.dsn("postgres")) as conn:
        await fails(SchemaError, "this database has no schema notifyq; install it: notifyq migrate", Mail(to="a"))


@each
async def test_its_other_errors_are_its_own(app: notifyq.App, dsn: str, kind: Any) -> None:
    async with kind(dsn) as conn:
        with pytest.raises((psycopg.errors.DivisionByZero, sqlalchemy.exc.DBAPIError)):
            await say(conn, "SELECT 1 / 0")
        if isinstance(conn, psycopg.Connection | psycopg.AsyncConnection):
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                await done(client(app, conn).enqueue(Other(), conn=conn))


@pytest.mark.parametrize("kind", [session, connection, async_session, async_connection], ids=lambda kind: kind.__name__)
async def test_a_savepoint_of_sqlalchemys(app: notifyq.App, dsn: str, db: Any, kind: Any) -> None:
    async with kind(dsn) as conn:
        ref = await done(client(app, conn).enqueue(Other(), conn=conn))
        savepoint = await done(conn.begin_nested())
        await done(client(app, conn).enqueue(Other(), conn=conn))
        await done(savepoint.rollback())
        await done(conn.commit())
    assert await db.fetchval("SELECT array_agg(id) FROM notifyq.task") == [ref.id]


async def test_autocommit_commits_at_once(app: notifyq.App, dsn: str, db: Any) -> None:
    async def failing(conn: psycopg.AsyncConnection) -> None:
        async with conn.transaction():
            await app.enqueue(Other(), conn=conn)
            raise ZeroDivisionError

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await app.enqueue(Other(), conn=conn)
        assert await db.fetchval(COUNT) == 1
        with pytest.raises(ZeroDivisionError):
            await failing(conn)
    assert await db.fetchval(COUNT) == 1


BUSY = r"conn was busy for 0\.1 s; inside cursor\.stream\(\), cursor\.copy\(\) and conn\.notifies\(\) psycopg runs"
PILE, FILL = "CREATE TEMP TABLE pile (n integer)", "COPY pile FROM STDIN"


async def test_psycopg_in_the_middle_of_a_result(
    app: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside of stream() and copy() it would wait for itself, for ever. After them it takes tasks again."""
    monkeypatch.setattr(drivers, "BUSY_SECONDS", 0.1)
    client = notifyq.SyncClient(app)

    def use() -> None:
        with psycopg.connect(dsn) as conn:
            for _ in conn.cursor().stream("SELECT generate_series(1, 3)"):
                with pytest.raises(ConfigError, match=BUSY):
                    client.enqueue(Other(), conn=conn)
            conn.execute(PILE)
            with conn.cursor().copy(FILL), pytest.raises(ConfigError, match=BUSY):
                client.enqueue_many([Other()], conn=conn)
            client.enqueue(Other(), conn=conn)

    with anyio.fail_after(limit()):
        await anyio.to_thread.run_sync(use, abandon_on_cancel=True)
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            async for _ in conn.cursor().stream("SELECT generate_series(1, 3)"):
                with pytest.raises(ConfigError, match=BUSY):
                    await app.enqueue(Other(), conn=conn)
            await conn.execute(PILE)
            async with conn.cursor().copy(FILL):
                with pytest.raises(ConfigError, match=BUSY):
                    await app.enqueue_many([Other()], conn=conn)
            await app.enqueue(Other(), conn=conn)
    assert await db.fetchval(COUNT) == 2


async def test_psycopg_while_another_uses_it(app: notifyq.App, dsn: str, db: Any) -> None:
    """It waits for another thread's, or another coroutine's, statement."""
    client = notifyq.SyncClient(app)
    with psycopg.connect(dsn) as blocking:
        async with anyio.create_task_group() as group:
            blocking.lock.acquire()
            group.start_soon(anyio.to_thread.run_sync, lambda: client.enqueue(Other(), conn=blocking))
            await anyio.wait_all_tasks_blocked()
            blocking.lock.release()
    conn = await psycopg.AsyncConnection.connect(dsn)
    async with conn, anyio.create_task_group() as group:
        await conn.lock.acquire()
        group.start_soon(partial(app.enqueue, Other(), conn=conn))
        await anyio.wait_all_tasks_blocked()
        conn.lock.release()
    assert await db.fetchval(COUNT) == 2


async def test_a_subclass_is_what_its_bases_are(app: notifyq.App, dsn: str, db: Any) -> None:
    class Mine(psycopg.AsyncConnection[Any]):
        pass

    class Ours(alchemy.AsyncSession):
        pass

    async with await Mine.connect(dsn) as conn:
        await app.enqueue(Other(), conn=conn)
    engine = alchemy.create_async_engine(url(dsn, "asyncpg"))
    async with Ours(engine) as session, session.begin():
        await app.enqueue(Other(), conn=session)
    await engine.dispose()
    assert await db.fetchval(COUNT) == 2


AWAITED = (
    r"expected a connection of asyncpg, a psycopg\.AsyncConnection, or SQLAlchemy's AsyncSession or AsyncConnection"
)


@each
async def test_the_wrong_one_of_two(app: notifyq.App, dsn: str, kind: Any) -> None:
    """It returns no coroutine where none is awaited, and makes no call that blocks the loop."""
    async with kind(dsn) as conn:
        if client(app, conn) is app:
            message = r"conn is a .*, which is awaited: `await app\.enqueue\(task, conn="
            with pytest.raises(ConfigError, match=message):
                notifyq.SyncClient(app).enqueue(Other(), conn=conn)
            with pytest.raises(ConfigError, match=message):
                notifyq.SyncClient(app).enqueue_many([Other()], conn=conn)
        else:
            message = (
                rf"conn is a .*, which would block the event loop; {AWAITED}; where nothing is awaited, notifyq\.Sync"
            )
            with pytest.raises(ConfigError, match=message):
                await app.enqueue(Other(), conn=conn)
            with pytest.raises(ConfigError, match=message):
                await app.enqueue_many([Other()], conn=conn)


async def test_what_is_no_connection(app: notifyq.App, dsn: str, db: Any) -> None:
    lite = sqlite3.connect(":memory:")
    things: list[tuple[Any, str]] = [
        (lite, "a sqlite3.Connection"),
        (dsn, "a str"),
        (psycopg.AsyncConnection, "the class psycopg.AsyncConnection itself"),
        (sqlalchemy.create_engine(url(dsn, "psycopg")), "a sqlalchemy.engine.base.Engine"),
    ]
    for thing, name in things:
        with pytest.raises(ConfigError, match=rf"conn is {re.escape(name)}; {AWAITED}$"):
            await app.enqueue(Other(), conn=thing)
        with pytest.raises(
            ConfigError, match=rf"conn is {re.escape(name)}; expected a psycopg\.Connection, SQLAlchemy's"
        ):
            notifyq.SyncClient(app).enqueue(Other(), conn=thing)
    lite.close()
    with pytest.raises(ConfigError, match=r"conn is a asyncpg\.connection\.Connection, which is awaited"):
        notifyq.SyncClient(app).enqueue(Other(), conn=db)


def test_sqlalchemy_on_another_database(app: notifyq.App) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    with (
        orm.Session(engine) as session,
        pytest.raises(ConfigError, match=r"SQLAlchemy's for sqlite\+pysqlite; expected"),
    ):
        notifyq.SyncClient(app).enqueue(Other(), conn=session)
    engine.dispose()


def test_parameters_of_another_style() -> None:
    text, values = drivers.pyformat("SELECT $2, $1 % $10", list("abcdefghij"))
    assert text == "SELECT %(p2)s, %(p1)s %% %(p10)s"
    assert (values["p1"], values["p2"], values["p10"]) == ("a", "b", "j")


# SyncClient


async def test_a_client_of_many_threads(app: notifyq.App, dsn: str, db: Any) -> None:
    with notifyq.SyncClient(app).connect(dsn) as client, ThreadPoolExecutor(20) as threads:
        ids = list(threads.map(lambda n: client.enqueue(Mail(to=str(n))).id, range(200)))
        many = client.enqueue_many([Mail(to="x"), Other()], queue="bulk", priority=3)
        assert client.enqueue_many([]) == []
    rows = await db.fetch("SELECT id, payload FROM notifyq.task WHERE queue = 'default' ORDER BY id")
    assert [row["id"] for row in rows] == sorted(ids)
    assert [json.loads(row["payload"])["to"] for row in sorted(rows, key=lambda r: ids.index(r["id"]))] == [
        str(n) for n in range(200)
    ]
    assert [
        tuple(r) for r in await db.fetch("SELECT id, priority FROM notifyq.task WHERE queue = 'bulk' ORDER BY id")
    ] == [(id, 3) for id in many]
    # Closed here, a backend takes its moment to end there.
    backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'notifyq client'"
    await eventually(lambda: db.fetchval(backends), 0)


async def test_a_client_prepares_no_statement(app: notifyq.App, dsn: str) -> None:
    """Behind a pooler, the next transaction may have another backend, which doesn't know the statement."""
    client = notifyq.SyncClient(app)

    def use() -> list[Any]:
        with client.connect(dsn):
            for _ in range(10):
                client.enqueue(Mail(to="a"))
            return list(client._fetch(None, "SELECT statement FROM pg_prepared_statements", ()))

    assert await asyncio.to_thread(use) == []


async def test_a_clients_connections_that_were_cut(app: notifyq.App, dsn: str, db: Any) -> None:
    """When a server has restarted, the client's call doesn't fail."""
    with notifyq.SyncClient(app).connect(dsn) as client:
        client.enqueue(Other())
        backends = "pg_stat_activity WHERE application_name = 'notifyq client'"
        assert await db.fetchval(f"SELECT count(pg_terminate_backend(pid, 5000)) FROM {backends}") == 1
        client.enqueue(Other())
    assert await db.fetchval(COUNT) == 2


async def test_a_client_after_a_fork(app: notifyq.App, dsn: str, db: Any) -> None:
    """Servers load an application and then fork: the child doesn't use its parent's connection."""
    with notifyq.SyncClient(app).connect(dsn) as client:
        client.enqueue(Mail(to="parent"))
        (said, saying), (heard, hearing) = os.pipe(), os.pipe()
        child = fork()
        if child == 0:
            try:
                client.enqueue(Mail(to="child"))
                os.write(saying, b"ok")
                os.read(heard, 1)
                client.close()
            finally:
                os._exit(0)
        os.close(saying)
        try:
            assert os.read(said, 2) == b"ok"
            backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'notifyq client'"
            assert await db.fetchval(backends) == 2
            os.write(hearing, b".")
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.waitpid(child, 0)
        for end in (said, heard, hearing):
            os.close(end)
        client.enqueue(Mail(to="parent"))
    rows = await db.fetch("SELECT payload ->> 'to' FROM notifyq.task ORDER BY id")
    assert [row[0] for row in rows] == ["parent", "child", "parent"]


def fork() -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 has one for forks of processes with threads
        return os.fork()


async def test_a_client_that_is_not_connected(app: notifyq.App, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = notifyq.SyncClient(app)
    with pytest.raises(ConfigError, match=r"not connected: call connect\(\) first, or pass conn="):
        client.enqueue(Other())
    with client.connect(dsn), pytest.raises(ConfigError, match="this client is connected already"):
        client.connect(dsn)
    with pytest.raises(ConfigError, match="not connected"):
        client.enqueue_many([Other()])
    with pytest.raises(
        DatabaseError, match=r"can't connect to the database \(the given DSN: postgresql://u:\*\*\*@127\.0\.0\.1:1/db\)"
    ):
        client.connect("postgresql://u:secret@127.0.0.1:1/db")
    with pytest.raises(ConfigError, match="the given DSN can't be used: "):
        client.connect("postgresql://127.0.0.1/db?nonsense=1")
    with pytest.raises(ConfigError, match=r"the given DSN is no URL; expected postgresql://"):
        client.connect("nonsense")
    for name in ("psycopg_pool", "psycopg"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=r"SyncClient\.connect needs psycopg .*: pip install 'notifyq\[sync\]'"):
            client.connect(dsn)


async def test_a_clients_tasks_and_options_are_checked(app: notifyq.App, dsn: str) -> None:
    calls: list[tuple[Callable[[notifyq.SyncClient], Any], str]] = [
        (lambda c: c.enqueue(Mail(to=5)), "task MAIL doesn't validate against its own type"),  # type: ignore[arg-type]
        (lambda c: c.enqueue(Other(), delay=-1), "delay is -1"),
        (lambda c: c.enqueue_many([Other()], priority=40000), "priority is 40000"),
        (lambda c: c.enqueue_many([Other(), None]), "enqueue got None"),  # type: ignore[list-item]
    ]
    with notifyq.SyncClient(app).connect(dsn) as client:
        for call, message in calls:
            with pytest.raises(ConfigError, match=re.escape(message)):
                call(client)


def typed(app: notifyq.App, client: notifyq.SyncClient) -> None:
    """This isn't run. It shows what type checkers let pass, and what they don't."""

    async def taken(
        a: psycopg.AsyncConnection,
        b: psycopg.AsyncConnection[dict[str, int]],
        c: alchemy.AsyncSession,
        d: alchemy.AsyncConnection,
        e: alchemy.async_scoped_session[alchemy.AsyncSession],
    ) -> None:
        waiting: list[Awaitable[notifyq.Ref]] = [
            app.enqueue(Other(), conn=a), app.enqueue(Other(), conn=b), app.enqueue(Other(), conn=c),
            app.enqueue(Other(), conn=d), app.enqueue(Other(), conn=e),
        ]  # fmt: skip
        client.enqueue(Other(), conn=a)  # type: ignore[arg-type]
        client.enqueue(Other(), conn=c)  # type: ignore[arg-type]
        print(waiting)

    async def blocking(
        a: psycopg.Connection, b: orm.Session, c: sqlalchemy.Connection, d: orm.scoped_session[orm.Session]
    ) -> None:
        refs: list[notifyq.Ref] = [
            client.enqueue(Other(), conn=a), client.enqueue(Other(), conn=b), client.enqueue(Other(), conn=c),
            client.enqueue(Other(), conn=d),
        ]  # fmt: skip
        await app.enqueue(Other(), conn=a)  # type: ignore[arg-type]
        await app.enqueue(Other(), conn=b)  # type: ignore[arg-type]
        await app.enqueue_many([Other()], conn=c)  # type: ignore[call-overload]
        print(refs)

    print(taken, blocking)
