"""Network faults on a worker's connections, each by its role: no task is lost, none runs twice, and the next one runs
soon. Half-open connections, over which no more bytes come, are found within 15 s."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import asyncpg
import psycopg
import pytest
from asyncpg.transaction import Transaction

import notifyq
from notifyq.client import sync_pool
from notifyq.database import connection, errors, schema
from notifyq.embedded import Server
from notifyq.errors import DatabaseError

from ..helpers.databases import admin, database
from ..helpers.machine import Probe, limit, probing
from ..helpers.proxy import Proxy, free_port, proxy_to
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow

ROLES = ("claims *", "bell *", "settle", "heartbeat*", "app")
LOST = errors.TRANSIENT


@pytest.fixture(scope="module")
def tcp() -> Iterator[Server]:
    """A server on TCP."""
    with Server(port=free_port(), settings={"max_connections": "300"}) as running:
        yield running


@pytest.fixture(scope="module")
async def tcp_template(tcp: Server) -> str:
    await admin(tcp, "CREATE DATABASE template_notifyq")
    conn = await connection.connect(tcp.dsn("template_notifyq"), role="test")
    await schema.migrate(conn)
    await conn.close()
    return "template_notifyq"


class Note(notifyq.Task):
    seconds: float = 0
    ballast: str = ""


class Hold(notifyq.Task):
    pass


class Rig:
    """An app and workers behind a proxy, and a connection that bypasses it."""

    def __init__(self, proxy: Proxy, dsn: str, db: Any, probe: Probe) -> None:
        self.proxy = proxy
        self.dsn = proxy.dsn(dsn)
        self.db = db
        self.probe = probe
        self.app = notifyq.App()
        self.ran, self.held, self.release = Seen(), Seen(), anyio.Event()
        self.acknowledged: list[int] = []

        @self.app.handler
        async def note(task: Note, ctx: notifyq.Context) -> None:
            self.ran.add(ctx.id)
            await anyio.sleep(task.seconds)

        @self.app.handler
        async def hold(task: Hold, ctx: notifyq.Context) -> None:
            self.held.add(ctx.id)
            await self.release.wait()

    async def insert(self, type: str = "Note", count: int = 1, ballast: int = 0) -> list[int]:
        """Insert tasks on the connection that bypasses the proxy."""
        many = """INSERT INTO notifyq.task (type, payload)
                  SELECT $1, jsonb_build_object('ballast', repeat('.', $3::integer))
                  FROM generate_series(1, $2::integer) RETURNING id"""
        ids = [row[0] for row in await self.db.fetch(many, type, count, ballast)]
        self.acknowledged += ids
        return ids

    async def woken(self, seconds: float) -> float:
        """Insert a task in the same way, which runs in time. Returns how long that took."""
        began = time.monotonic()
        with self.probe.within(seconds):
            [id] = await self.insert()
            while id not in self.ran.items:
                await anyio.sleep(0.002)
        return time.monotonic() - began

    async def all_done_once(self) -> None:
        """Every acknowledged task is done, at its first attempt, and no handler ran twice."""
        await eventually(lambda: self.db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
        rows = await self.db.fetch("SELECT id, state, attempts FROM notifyq.finished")
        assert {(row[1], row[2]) for row in rows} == {("done", 1)}
        assert set(self.acknowledged) <= {row[0] for row in rows}
        assert Counter(self.ran.items + self.held.items).most_common(1)[0][1] == 1


@asynccontextmanager
async def rig(server: Server, template: str) -> AsyncIterator[Rig]:
    async with database(server, template) as dsn, proxy_to(server._port or 0) as proxy:
        db = await connection.connect(dsn, role="test")
        try:
            async with probing(dsn) as probe:
                yield Rig(proxy, dsn, db, probe)
        finally:
            await db.close()


@pytest.fixture
async def net(tcp: Server, tcp_template: str) -> AsyncIterator[Rig]:
    async with rig(tcp, tcp_template) as net:
        yield net


async def hurt(proxy: Proxy, fault: str, role: str) -> None:
    """A fault that passes, or that is found at once, on all connections of a role."""
    match fault:
        case "cut":
            assert proxy.cut(role)
        case "reset":
            assert proxy.reset(role)
        case "reset in mid-result":
            assert proxy.reset_in_result(role)
        case "stall":
            assert proxy.stall(role)
            await anyio.sleep(0.3)
            assert proxy.resume(role)
        case "delay":
            assert proxy.delay(role, 0.2)
        case "throttle":
            assert proxy.throttle(role, 20_000)
        case _:
            raise AssertionError(fault)


FAULTS = ("cut", "reset", "reset in mid-result", "stall", "delay", "throttle")


@pytest.mark.parametrize("fault", FAULTS)
async def test_while_idle(net: Rig, fault: str) -> None:
    """The next task runs soon, whichever connection failed, and the task that ran meanwhile is done."""
    proxy = net.proxy
    async with net.app.connect(net.dsn), working(net.app, net.dsn) as worker:
        net.acknowledged.append((await net.app.enqueue(Note())).id)  # the app connects when it has something to say
        await net.insert("Hold", 3)
        await net.held.reach(3)
        await net.woken(5)
        for role in ROLES:
            await proxy.new(role, 0.0)
            await hurt(proxy, fault, role)
            took = [await net.woken(3), await net.woken(3)]
            if role == "app":
                # In mid-result, whose doing it is can't be known, and the caller is told.
                for _ in range(2):
                    try:
                        net.acknowledged.append((await net.app.enqueue(Note())).id)
                    except LOST:
                        assert fault == "reset in mid-result"
            print(f"{fault}, {role}: woken after {max(took):.3f} s")
            proxy.delay(role, 0)
            proxy.throttle(role, 0)
        net.release.set()
        await net.all_done_once()
        assert not worker.done.is_set()


@pytest.mark.parametrize("fault", FAULTS)
async def test_under_load(net: Rig, fault: str) -> None:
    """Two workers and an enqueuer: each task whose enqueuing was acknowledged is done, once."""
    proxy, over = net.proxy, anyio.Event()

    async def enqueue() -> None:
        while not over.is_set():
            try:
                net.acknowledged += await net.app.enqueue_many([Note(seconds=0.02)] * 5)
            except LOST:
                assert fault in ("cut", "reset", "reset in mid-result")
            await anyio.sleep(0.004)

    async with (
        net.app.connect(net.dsn),
        working(net.app, net.dsn, concurrency=30),
        working(net.app, net.dsn, concurrency=30),
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(enqueue)
            for role in ROLES:
                load = len(net.acknowledged) + 10
                with anyio.fail_after(limit()):
                    while len(net.acknowledged) < load:
                        await anyio.sleep(0.002)
                await proxy.new(role, 0.0)
                await hurt(proxy, fault, role)
                await net.woken(5)
                proxy.delay(role, 0)
                proxy.throttle(role, 0)
            over.set()
        await net.all_done_once()


async def test_a_claim_cut_in_mid_result(net: Rig) -> None:
    """The claim took 100 tasks, and the worker received ten: the others are found, and none has lost an attempt."""
    async with working(net.app, net.dsn, concurrency=200):
        await net.woken(5)
        assert net.proxy.reset_in_result("claims *", 100_000) == 1
        await net.insert(count=100, ballast=10_000)
        await net.ran.reach(101)
        await net.all_done_once()
    assert net.ran.items[0] == 1


async def test_a_host_that_vanished(net: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two hosts accepts connections and gives no answer: the second is used."""
    monkeypatch.setattr(connection, "HOST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        dsn = net.dsn.replace("@", f"@127.0.0.1:{mute.getsockname()[1]},") + "&target_session_attrs=read-write"
        async with net.app.connect(dsn), working(net.app, dsn):
            net.acknowledged.append((await net.app.enqueue(Note())).id)
            await net.woken(3)
            await net.all_done_once()


async def test_each_of_several_hosts_is_asked(net: Rig) -> None:
    """The first host is a primary where a standby is wanted: the second is tried too."""
    asked = Seen()

    async def standby(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.add("the second")
        writer.close()

    server = await asyncio.start_server(standby, "127.0.0.1", 0)
    user, primary = net.dsn.split("@")
    second = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        with pytest.raises(DatabaseError):
            await connection.connect(f"{user}@{primary.replace('/', f',{second}/')}&target_session_attrs=standby")
    assert asked.items


async def test_both_ends_of_a_connection_notice_that_the_other_has_vanished(tcp: Server) -> None:
    """Within 15 s the kernels on both sides notice, on an idle connection and on one that has sent something; and so
    does a backend in the middle of a statement."""
    conn = await connection.connect_worker(tcp.dsn("postgres"), "test")
    sock = conn._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, interval, count = (
        sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}")) for name in ("IDLE", "INTVL", "CNT")
    )
    assert 3 <= idle + interval * count <= 15
    assert 3_000 <= sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 15_000
    idle, interval, count = [
        int(await conn.fetchval(f"SELECT current_setting('tcp_keepalives_{name}')"))
        for name in ("idle", "interval", "count")
    ]
    assert 3 <= idle + interval * count <= 15
    assert await conn.fetchval(
        """SELECT setting::integer BETWEEN 500 AND 15000 FROM pg_settings
           WHERE name = 'client_connection_check_interval'"""
    )
    await conn.close()


@pytest.mark.parametrize("busy", [True, pytest.param(False, marks=pytest.mark.long)])
async def test_half_open(tcp: Server, tcp_template: str, busy: bool) -> None:
    """Bytes vanish both ways, and the kernels find nothing: the worker does within 15 s, ends what the server still
    takes for its old connection, and keeps its lease. Tasks are woken meanwhile: by the fallback poll, or once it is
    found. Not busy, there is no poll either, and nothing to do."""

    async def one(role: str) -> None:
        async with rig(tcp, tcp_template) as net, working(net.app, net.dsn, poll_interval=5 if busy else 0):
            await net.insert("Hold", 3)
            await net.held.reach(3)
            await net.woken(5)
            await net.proxy.new(role, 0.0)
            if not busy:
                await eventually(lambda: net.db.fetchval(ASLEEP), 1)
            began = time.monotonic()
            assert net.proxy.half_open(role) == 1
            woken = list[float]()

            async def wake() -> None:
                while True:
                    woken.append(await net.woken(15))
                    await anyio.sleep(0.5)

            # Left before anything else is asked of the rig's connection, which can do one thing at a time.
            async with anyio.create_task_group() as group:
                if busy:
                    group.start_soon(wake)
                found = await net.proxy.new(role, began)
                group.cancel_scope.cancel()
            print(f"half-open, {role}: found after {found:.1f} s, woken after {max(woken, default=0):.3f} s")
            assert found < 15 + net.probe.late(began)
            took = [await net.woken(3) for _ in range(3)]
            print(f"half-open, {role}: then woken after {max(took):.3f} s")
            assert await net.db.fetchval(STALE) == 1
            net.release.set()
            await net.all_done_once()

    async with anyio.create_task_group() as group:
        for role in ROLES[:-1] if busy else ("claims *", "bell *", "heartbeat*"):
            group.start_soon(one, role)


STALE = """SELECT count(*) FROM pg_stat_activity
           WHERE application_name LIKE 'notifyq bell %' AND datname = current_database()"""
ASLEEP = """SELECT count(*) FROM pg_locks
            WHERE relation = 'notifyq.bell'::regclass AND mode = 'ShareLock' AND granted
              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


# Enqueuers. A host that vanished, or a server that is frozen, says nothing on any of the connections that were open.


async def several(net: Rig) -> int:
    """Let the app open more than one connection; then they are idle. Returns how many."""
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(net.app.enqueue, Note())
    opened = len(net.proxy.open("app"))
    assert opened >= 2
    return opened


async def test_an_app_after_a_host_vanished(net: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call without an answer cuts the other connections too, since they lead to the same host. Its own is
    cut at once."""
    gone: list[bool] = []
    release = asyncpg.Pool.release

    async def noted(self: Any, conn: Any, *, timeout: float | None = None) -> None:
        gone.append(conn._con is None)
        await release(self, conn, timeout=timeout)

    async with net.app.connect(net.dsn, timeout=1.0):
        opened = await several(net)
        assert net.proxy.half_open("app") == opened
        monkeypatch.setattr(asyncpg.Pool, "release", noted)
        with (
            anyio.fail_after(25),
            pytest.raises(notifyq.DatabaseError, match=r"in time \(1 s\); what was asked may have been done, or not"),
        ):
            await net.app.enqueue(Note())
        assert gone == [True], "before the pool has it back, which would wait for it to be free"
        for _ in range(opened):
            await net.app.enqueue(Note())
        assert await net.app.cancel((await net.app.enqueue(Note())).id)


@pytest.mark.parametrize("many", [1, 100, 5000])
async def test_an_app_s_call_that_its_caller_gives_up(net: Rig, many: int) -> None:
    """The call doesn't wait for an answer to a request to cancel, or to a ROLLBACK: none would come for 30 or 60 s. The
    other connections are cut too, so that the next call has one that is answered."""
    async with net.app.connect(net.dsn):
        opened = await several(net)
        async with net.db.transaction():
            await net.db.execute("LOCK TABLE notifyq.task IN SHARE MODE")  # so that it isn't answered
            began = time.monotonic()
            call = asyncio.create_task(net.app.enqueue_many([Note()] * many))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            await eventually(lambda: net.db.fetchval(waiting), 1)
            assert net.proxy.half_open("app") == opened
            call.cancel()  # once, as asyncio does it; anyio cancels whatever is awaited after that too
            await asyncio.wait([call])
            assert call.cancelled()
            assert time.monotonic() - began < 25 + net.probe.late(began)
        await net.app.enqueue(Note())


async def test_an_app_s_call_that_is_cancelled_as_its_transaction_begins(
    net: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app can't know whether the transaction has begun. A connection that may be in one is never used again."""
    monkeypatch.setattr("notifyq.client.pool.FREE_SECONDS", 60.0)
    begins, start = asyncio.Event(), Transaction.start

    async def noted(self: Any) -> None:
        begins.set()
        await start(self)

    monkeypatch.setattr(Transaction, "start", noted)
    async with net.app.connect(net.dsn):
        await net.app.enqueue(Note())
        assert net.proxy.stall("app") == 1
        call = asyncio.create_task(net.app.enqueue_many([Note()] * 3000))
        await begins.wait()
        await anyio.lowlevel.checkpoint()
        call.cancel()
        await anyio.lowlevel.checkpoint()
        net.proxy.resume("app")
        await asyncio.wait([call])
        assert call.cancelled()
        await net.app.enqueue(Note())
        assert await net.db.fetchval("SELECT count(*) FROM notifyq.task") == 2


async def test_an_app_s_transaction_that_is_not_answered(net: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more statements are sent to that host: a ROLLBACK would wait for its own timeout."""

    async def asked(_: object) -> None:
        raise AssertionError("ROLLBACK")

    async with net.app.connect(net.dsn, timeout=1.0), net.db.transaction():
        await net.db.execute("LOCK TABLE notifyq.task IN SHARE MODE")
        with monkeypatch.context() as patched:
            patched.setattr(Transaction, "rollback", asked)
            with pytest.raises(notifyq.DatabaseError, match="no answer from the database in time"):
                await net.app.enqueue_many([Note()] * 5000)


async def test_a_client_without_async_after_a_host_vanished(net: Rig) -> None:
    """The client tests each connection before it uses it. The first without an answer cuts the others too."""
    client = notifyq.SyncClient(net.app)

    async def enqueue(count: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(anyio.to_thread.run_sync, lambda: client.enqueue(Note()))

    with await anyio.to_thread.run_sync(client.connect, net.dsn):
        while len(net.proxy.open("client")) < 3:
            await enqueue(10)
        vanished = net.proxy.half_open("client")
        before = await net.db.fetchval("SELECT count(*) FROM notifyq.task")
        began = time.monotonic()
        await enqueue(1)
        assert time.monotonic() - began < connection.PROOF_SECONDS * vanished + net.probe.late(began)
        await enqueue(5)
        assert await net.db.fetchval("SELECT count(*) FROM notifyq.task") == before + 6


async def test_a_client_s_statement_that_is_not_answered(net: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_pool, "COMMAND_TIMEOUT_SECONDS", 1.0)
    client, failed = notifyq.SyncClient(net.app), list[BaseException]()

    def enqueue() -> None:
        try:
            client.enqueue(Note())
        except notifyq.DatabaseError as error:
            failed.append(error)

    with await anyio.to_thread.run_sync(client.connect, net.dsn):
        await anyio.to_thread.run_sync(client.enqueue, Note())
        async with net.db.transaction():
            await net.db.execute("LOCK TABLE notifyq.task IN SHARE MODE")
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.to_thread.run_sync, enqueue)
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                await eventually(lambda: net.db.fetchval(waiting), 1)
                net.proxy.half_open("client")
        assert re.search(r"no answer within 1\S* s; the task may have been enqueued, or not", str(failed))
        await anyio.to_thread.run_sync(client.enqueue, Note())


def keepalives(fileno: int) -> list[int]:
    with socket.socket(fileno=os.dup(fileno)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        return [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]


def test_a_client_s_dsn_wins() -> None:
    """A time in the DSN wins. The application_name and UTF-8 are the client's own."""
    settings = sync_pool._settings(  # pyright: ignore[reportPrivateUsage]
        "host=h connect_timeout=9 tcp_user_timeout=0 application_name=mine client_encoding=LATIN1"
    )
    assert "tcp_user_timeout" not in settings
    assert "connect_timeout" not in settings
    assert (settings["application_name"], settings["client_encoding"]) == ("notifyq client", "UTF8")
    assert sync_pool._settings("host=h")["connect_timeout"] == 3  # pyright: ignore[reportPrivateUsage]


async def test_sockets_of_enqueuers_notice_a_host_that_vanished(net: Rig) -> None:
    """Where no kernel acknowledges what is sent, the connection is dead after 12 s."""
    client = notifyq.SyncClient(net.app)

    def of_client() -> list[int]:
        with (
            client.connect(net.dsn),
            client._opened().connection() as conn,  # pyright: ignore[reportPrivateUsage]
        ):
            return keepalives(conn.fileno())

    assert await anyio.to_thread.run_sync(of_client) == [5, 2, 3, 12_000]
    async with net.app.connect(net.dsn) as app:
        assert app._pool is not None  # pyright: ignore[reportPrivateUsage]
        async with app._pool.acquire() as conn:  # pyright: ignore[reportPrivateUsage]
            transport: asyncio.Transport = conn._con._transport  # type: ignore[attr-defined]  # pyright: ignore
            assert keepalives(transport.get_extra_info("socket").fileno()) == [5, 2, 3, 12_000]


def test_a_client_s_connection_is_lost_by_some_errors_and_has_time_for_large_payloads(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = sync_pool._is_lost  # pyright: ignore[reportPrivateUsage]
    conn = sync_pool.Bounded.connect(dsn)
    assert lost(conn, psycopg.OperationalError("no answer"))
    assert lost(conn, psycopg.errors.AdminShutdown())
    assert not lost(conn, psycopg.errors.QueryCanceled())
    monkeypatch.setattr("notifyq.client.drivers.fetch", lambda *_: [])
    for payloads, size in (("x" * 100, 100), (["x" * 3_000_000] * 2, 6_000_000)):
        conn.run("", ("T", payloads))
        assert conn.seconds == pytest.approx(connection.COMMAND_TIMEOUT_SECONDS + size / connection.SLOWEST)
    conn.close()
    assert lost(conn, psycopg.errors.QueryCanceled())
