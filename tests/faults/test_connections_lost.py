"""Connections that end, a database out of reach, a server that crashes: workers reconnect, nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection, schema
from notifyq.embedded import Server

from ..helpers.databases import Sessions, outage
from ..helpers.logs import Logged
from ..helpers.machine import Probe, limit
from ..helpers.rows import insert, states
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow


# Connections.


class Bench:
    """An app whose handlers count their runs."""

    def __init__(self) -> None:
        self.app = notifyq.App()
        self.seen = seen = Seen()
        self.begun = begun = list[tuple[int, float]]()  # which ran, and when that began
        self.held = held = Seen()
        self.release = release = anyio.Event()

        class Note(notifyq.Task):
            seconds: float = 0

        class Hold(notifyq.Task):
            pass

        @self.app.handler
        async def note(task: Note, ctx: notifyq.Context) -> None:
            begun.append((ctx.id, time.monotonic()))
            seen.add(ctx.id)
            await anyio.sleep(task.seconds)

        @self.app.handler
        async def hold(task: Hold, ctx: notifyq.Context) -> None:
            held.add(ctx.id)
            await release.wait()

    async def ran(self, id: int) -> float:
        """Wait until task `id` has begun. Returns how long that took."""
        began = time.monotonic()
        with anyio.fail_after(limit()):
            while id not in self.seen.items:
                await anyio.sleep(0.002)
        return time.monotonic() - began


HELD_SECONDS = 3.5
CONNECTIONS = ("bell %", "claims %", "settle", "heartbeat%")


async def terminate(db: Any, role: str) -> int:
    end = """SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
             WHERE application_name LIKE 'notifyq ' || $1 AND datname = current_database()"""
    return int(await db.fetchval(end, role))


async def end_both(db: Any, role: str, over: set[int]) -> None:
    """Wait until two workers have this session, and end both at once. `over` are the process ids of those that were
    ended before, or that a worker closes since it has lost another one: pg_stat_activity shows them a moment longer.

    One alone is left in peace. If each new session were ended as soon as it is seen, a worker would wait longer before
    each try, up to 5 s, and the two would hardly ever be seen together.
    """
    pair = CONNECTIONS[:2]  # a worker that has lost one of them closes the other
    names = [f"notifyq {name}" for name in (pair if role in pair else (role,))]
    end = """WITH session AS (SELECT pid, application_name LIKE $1 AS meant FROM pg_stat_activity
                              WHERE datname = current_database() AND application_name LIKE ANY ($2::text[])
                                AND pid <> ALL ($3::integer[]))
             SELECT pid, CASE WHEN meant THEN pg_terminate_backend(pid) END AS ended FROM session
             WHERE (SELECT count(*) FROM session WHERE meant) >= 2"""

    async def ended() -> bool:
        found = await db.fetch(end, f"notifyq {role}", names, list(over))
        over.update(row["pid"] for row in found)
        return sum(bool(row["ended"]) for row in found) >= 2

    await eventually(ended)


async def test_each_connection_is_ended_while_idle(db: Any, dsn: str, logged: Logged, probe: Probe) -> None:
    """The next task runs soon nevertheless, and both workers log once that the connection was lost and is back."""
    bench, over = Bench(), set[int]()
    async with working(bench.app, dsn) as worker, working(bench.app, dsn):
        ids = await insert(db, "Hold", 3)
        await bench.held.reach(3)
        ids += await insert(db, "Note")
        await bench.seen.reach(1)
        for role in CONNECTIONS:
            await end_both(db, role, over)
            [id] = await insert(db, "Note")
            with probe.within(4):
                print(f"{role} {await bench.ran(id):.3f} s")
            ids.append(id)
        bench.release.set()
        await eventually(lambda: states(db, ids), {("done", 1): len(ids)})
        everybody = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1852990827 AND granted"
        await eventually(lambda: db.fetchval(everybody), 2 * len(CONNECTIONS))  # each session proves its worker alive
        assert not worker.done.is_set()
    assert len(bench.held.items) == 3, "what ran meanwhile was not run again"
    assert sorted(bench.seen.items) == sorted(set(bench.seen.items))
    lost = Counter(fields["stage"] for fields in logged("lost the database, trying again"))
    assert lost == Counter(fields["stage"] for fields in logged("the database is back") if fields)
    assert set(lost) == {"claim", "settle"}
    assert len(logged("heartbeat: the database is out of reach")) == len(logged("heartbeat: the database is back")) == 2


async def test_each_connection_is_ended_under_load(db: Any, dsn: str, connect: Sessions, probe: Probe) -> None:
    """Every committed task is done, and none is run twice."""
    bench, ids, over = Bench(), list[int](), set[int]()
    enqueuer, enough = await connect(), anyio.Event()

    async def enqueue() -> None:
        while not enough.is_set():
            ids.extend(await insert(enqueuer, "Note", 5, seconds=0.02))
            await anyio.sleep(0.004)

    async with working(bench.app, dsn, concurrency=30), working(bench.app, dsn, concurrency=30):
        async with anyio.create_task_group() as group:
            group.start_soon(enqueue)
            for role in CONNECTIONS * 2:
                await end_both(db, role, over)
                [id] = await insert(db, "Note")
                ids.append(id)
                with probe.within(5):
                    await bench.ran(id)
            enough.set()
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    assert len(ids) > 100
    assert await states(db, ids) == {("done", 1): len(ids)}
    assert Counter(bench.seen.items).most_common(1)[0][1] == 1


async def test_a_claim_whose_answer_never_came(db: Any, dsn: str, logged: Logged, probe: Probe) -> None:
    """The claim was committed, and the connection was cut before its answer: the worker finds the tasks."""
    bench = Bench()
    async with working(bench.app, dsn) as worker:
        [held] = await insert(db, "Hold")
        await bench.held.reach(1)
        [taken] = await db.fetch(
            "INSERT INTO notifyq.task (type, worker, attempts) VALUES ('Note', $1, 1) RETURNING id", worker.info.id
        )
        assert await terminate(db, "claims %") == 1
        with probe.within(4):
            await bench.ran(taken[0])
        bench.release.set()
        await eventually(lambda: states(db, [held, taken[0]]), {("done", 1): 2})
    assert len(bench.held.items) == 1


async def test_an_outcome_that_is_being_written_is_not_reclaimed(db: Any, dsn: str, connect: Sessions) -> None:
    """A session has locked the row, so the outcome waits, while the connection for claims is lost: the worker leaves
    that task alone, and neither waits for it nor runs it again."""
    bench, someone = Bench(), await connect()
    async with working(bench.app, dsn):
        [held] = await insert(db, "Hold")
        await bench.held.reach(1)
        async with someone.transaction():
            await someone.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", held)
            bench.release.set()
            waits = """SELECT count(*) FROM pg_stat_activity WHERE application_name = 'notifyq settle'
                       AND wait_event_type = 'Lock' AND datname = current_database()"""
            await eventually(lambda: db.fetchval(waits), 1)
            assert await terminate(db, "claims %") == 1
            [other] = await insert(db, "Note")
            await bench.ran(other)
        await eventually(lambda: states(db, [held, other]), {("done", 1): 2})
    assert len(bench.held.items) == 1


async def test_a_database_out_of_reach(db: Any, dsn: str, connect: Sessions, logged: Logged, probe: Probe) -> None:
    """It is out of reach for longer than the 2 s after which workers look dead. Both come back, and neither takes tasks
    of the other."""
    bench = Bench()
    async with working(bench.app, dsn), working(bench.app, dsn):
        ids = await insert(db, "Hold", 5)
        await bench.held.reach(5)
        async with outage(dsn):
            await anyio.sleep(2.5)
            bench.release.set()  # outcomes that can't be written yet
            await anyio.sleep(0.2)
        began = time.monotonic()
        again = await connect()
        [id] = await insert(again, "Note")
        with probe.within(8):
            await bench.ran(id)
        print(f"healed after {time.monotonic() - began:.2f} s")
        await eventually(lambda: states(again, [*ids, id]), {("done", 1): 6})
        with anyio.fail_after(limit()):
            while len(logged("heartbeat: the database is back")) < 2:
                await anyio.sleep(0.01)
    assert len(bench.held.items) == 5
    assert not logged("rescued") + logged("took this worker for dead") + logged("lease lost")


# The server.


@pytest.fixture
async def own() -> AsyncIterator[Server]:
    """A server of the test's own, with the schema."""
    server = Server()
    await anyio.to_thread.run_sync(server.start)
    try:
        conn = await connection.connect(server.dsn(), role="test")
        await schema.migrate(conn)
        await conn.close()
        yield server
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.stop)


async def test_a_server_that_crashes_under_load(own: Server, logged: Logged, probe: Probe) -> None:
    """Each task whose commit was acknowledged is done. Only tasks that a worker held at a crash may have run twice.

    A crash may lose a claim. The worker begins what it holds all the same, until a heartbeat tells that the lease is
    lost: HELD_SECONDS after the crash at most, a pause before it connects and a heartbeat.
    """
    bench, acknowledged, over = Bench(), list[int](), anyio.Event()
    begun: dict[int, float] = {}

    async def enqueue() -> None:
        conn = None
        while not over.is_set():
            try:
                conn = conn or await connection.connect(own.dsn(), role="test")
                for id in await insert(conn, "Note", 5, seconds=0.05):
                    acknowledged.append(id)
                    begun[id] = time.monotonic()
                await anyio.sleep(0.005)
            except (notifyq.DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                conn = None
                await anyio.sleep(0.02)
        if conn is not None:
            await conn.close()

    async with working(bench.app, own.dsn(), concurrency=30), working(bench.app, own.dsn(), concurrency=30):
        async with anyio.create_task_group() as group:
            group.start_soon(enqueue)
            await bench.seen.reach(100)
            crashes: list[tuple[float, float]] = []
            for _ in range(3):
                crash = time.monotonic()
                await anyio.to_thread.run_sync(own.restart, "immediate")
                back, seen = time.monotonic(), len(bench.seen.items)
                crashes.append((crash, back))
                with probe.within(5):
                    while not any(begun.get(id, 0) > back for id in bench.seen.items[seen:]):
                        await anyio.sleep(0.005)
                print(f"down for {back - crash:.2f} s, healed {time.monotonic() - back:.2f} s after")
                await bench.seen.reach(seen + 100)
            over.set()
        db = await connection.connect(own.dsn(), role="test")
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
        done = {row[0] for row in await db.fetch("SELECT id FROM notifyq.finished WHERE state = 'done'")}
        await db.close()
    assert set(acknowledged) <= done
    twice = [id for id, runs in Counter(bench.seen.items).items() if runs > 1]
    print(f"{len(acknowledged)} tasks, {len(twice)} run twice")
    assert len(twice) <= 3 * 60
    for id in twice:
        times = [at for other, at in bench.begun if other == id]
        for first, second in itertools.pairwise(times):
            held = [begun.get(id, 0) < back and first < back + HELD_SECONDS for _, back in crashes]
            assert any(was and crash < second for was, (crash, _) in zip(held, crashes, strict=True)), (
                "only what was held at a crash"
            )
