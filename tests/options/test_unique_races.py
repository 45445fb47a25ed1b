"""Enqueuers of one key at the same time, against each other and against workers."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import pytest

import notifyq
from notifyq.database import connection

from ..helpers import verbs
from ..helpers.running import working
from ..helpers.steps import Steps
from ..helpers.uniques import KEY, KEYED, UNTIL_BEGUN, Known
from ..helpers.waiting import Seen, eventually
from .test_unique_sql import copy, count


def by_psql(program: str, dsn: str) -> None:
    subprocess.run([program, "-q", dsn], input=f"{KEYED};\n" * 50, text=True, check=True)


async def test_hundreds_at_once_are_one(app: notifyq.App, dsn: str, db: Any) -> None:
    """They come over asyncpg and psql."""
    refs: list[notifyq.Ref] = []

    async def send() -> None:
        refs.append(await app.enqueue(Known(), unique="k"))

    psql = shutil.which("psql")
    async with anyio.create_task_group() as group:
        for _ in range(300):
            group.start_soon(send)
        for _ in range(5 if psql is not None else 0):
            group.start_soon(anyio.to_thread.run_sync, by_psql, str(psql), dsn)
    assert len({ref.id for ref in refs}) == 1 == await count(db)
    assert sum(not ref.existed for ref in refs) <= 1


async def test_inserts_and_copies_at_once_are_one(dsn: str, db: Any) -> None:
    """The clients know nothing but the table, and each has a connection of its own."""

    async def insert(conn: Any, *keys: str) -> None:
        for _ in keys:
            await conn.execute(KEYED)

    conns = [await connection.connect(dsn, role="test") for _ in range(20)]
    async with anyio.create_task_group() as group:
        for n, conn in enumerate(conns):
            group.start_soon(copy if n % 2 else insert, conn, *["k"] * 20)
    for conn in conns:
        await conn.close()
    assert await count(db) == 1


async def test_one_at_a_time_while_they_come_and_go(app: notifyq.App, dsn: str, db: Any) -> None:
    """A worker runs them meanwhile: never two at once, each new one runs, and there is more than one."""
    running, most, ran = 0, 0, Seen()

    @app.handler
    async def known(task: Known, ctx: notifyq.Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.lowlevel.checkpoint()
        running -= 1
        ran.add(ctx.id)

    refs: list[notifyq.Ref] = []

    async def send() -> None:
        for _ in range(60):
            ref = await app.enqueue(Known(), unique="k")
            refs.append(ref)

    async with working(app, dsn):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(send)
        new = {ref.id for ref in refs if not ref.existed}
        await ran.reach(len(new))
    assert most == 1
    assert sorted(ran.items) == sorted(new)
    assert len(new) > 1
    assert {ref.id for ref in refs} == new


async def test_the_second_waits_for_the_first(s: Steps) -> None:
    a, b = await s.session("a"), await s.session("b")
    for end, there in (("ROLLBACK", 0), ("COMMIT", 1)):
        await a("BEGIN")
        await a(KEYED)
        waiting = await b.blocked_by(a, f"{KEYED} RETURNING id")
        await a(end)
        assert len(await waiting) == 1 - there
        await s.db.execute("TRUNCATE notifyq.task, notifyq.unique_key")


async def test_a_savepoint_frees_the_key(s: Steps) -> None:
    a, b = await s.session("a"), await s.session("b")
    await a("BEGIN")
    await a("SAVEPOINT x")
    await a(KEYED)
    waiting = await b.blocked_by(a, f"{KEYED} RETURNING id")
    await a("ROLLBACK TO x")
    [row] = await waiting
    assert await a(f"{KEYED} RETURNING id") == []
    await a("COMMIT")
    assert [r[0] for r in await s.db.fetch("SELECT id FROM notifyq.task")] == [row[0]]


async def test_what_stands_in_the_way_begins_after_the_enqueuer_has_committed(s: Steps) -> None:
    """Otherwise its handler could miss what was written beside the enqueue."""
    a, w = await s.session("a"), await s.worker("claims")
    [old] = await verbs.insert(s.db, options=KEY)
    me = await w(verbs.register)
    for end in ("ROLLBACK", "COMMIT"):
        await a("BEGIN")
        assert await a(f"{UNTIL_BEGUN} RETURNING id") == []
        assert await w(verbs.claim, me) == []
        await a(end)
    assert [job.id for job in await w(verbs.claim, me)] == [old]


async def test_the_worker_that_stepped_over_it_is_rung(app: notifyq.App, dsn: str, db: Any, s: Steps) -> None:
    """The worker sleeps, with nothing but the bell, and the waiting task is held back until the enqueuer commits."""
    seen = Seen()

    @app.handler
    async def known(task: Known) -> None:
        seen.add(task.n)

    a = await s.session("a")
    await app.enqueue(Known(n=1), unique="k", delay=0.3)
    await a("BEGIN")
    assert await a(f"{UNTIL_BEGUN} RETURNING id") == []
    async with working(app, dsn):
        await eventually(lambda: db.fetchval("SELECT run_at < clock_timestamp() FROM notifyq.task"), True)
        assert seen.items == []
        await a("COMMIT")
        assert await seen.reach(1) == [1]


async def test_one_that_is_being_claimed_is_waited_for(s: Steps) -> None:
    """Then it has begun. If only waiting tasks prevent a new one, there is a new one; otherwise it is kept."""
    a, w = await s.session("a"), await s.worker("claims")
    await verbs.insert(s.db, options=KEY)
    me = await w(verbs.register)
    await w("BEGIN")
    [job] = await w(verbs.claim, me)
    waiting = await a.blocked_by(w, f"{UNTIL_BEGUN} RETURNING id")
    await w("COMMIT")
    assert len(await waiting) == 1
    assert await s.db.fetchval("SELECT worker FROM notifyq.task WHERE id = $1", job.id) == me
    assert await a(f"{KEYED} RETURNING id") == []


async def test_a_claim_that_is_rolled_back_leaves_it_in_the_way(s: Steps) -> None:
    a, w = await s.session("a"), await s.worker("claims")
    await verbs.insert(s.db, options=KEY)
    me = await w(verbs.register)
    await w("BEGIN")
    await w(verbs.claim, me)
    waiting = await a.blocked_by(w, f"{UNTIL_BEGUN} RETURNING id")
    await w("ROLLBACK")
    assert await waiting == []
    assert [job.id for job in await w(verbs.claim, me)] == [1]


async def test_no_worker_waits_for_an_enqueuer(s: Steps) -> None:
    """A running task isn't locked: it is settled, handed back or scheduled while an enqueuer's transaction has its
    key."""
    a, w = await s.session("a"), await s.worker("settle")
    for settle in (verbs.finish, verbs.later, verbs.hand_back, verbs.release_unhandled):
        await s.db.execute("TRUNCATE notifyq.task, notifyq.unique_key")
        [job] = await w(verbs.held, options=KEY)
        await a("BEGIN")
        assert await a(f"{KEYED} RETURNING id") == []
        assert await w(settle, [job]) == [job.id]
        await a("ROLLBACK")


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_the_old_one_ends_while_the_new_one_is_inserted(s: Steps, end: str) -> None:
    """Its outcome isn't committed, so it is still there. Whichever way that ends, one of the two is there, or has
    run."""
    a, w = await s.session("a"), await s.worker("settle")
    [job] = await w(verbs.held, options=KEY)
    await w("BEGIN")
    assert await w(verbs.finish, [job]) == [job.id]
    assert await a(f"{KEYED} RETURNING id") == []
    await w(end)
    new = await a(f"{KEYED} RETURNING id")
    assert len(new) == (end == "COMMIT")
    assert await count(s.db) == 1


async def test_cancelled_while_the_new_one_is_inserted(s: Steps) -> None:
    a, p = await s.session("a"), await s.session("p")
    [old] = await verbs.insert(s.db, options=KEY)
    await p("BEGIN")
    assert await p(verbs.cancel, old)
    waiting = await a.blocked_by(p, f"{KEYED} RETURNING id")
    await p("COMMIT")
    assert len(await waiting) == 1
    assert await count(s.db) == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_under_a_snapshot_of_the_callers(s: Steps, level: str) -> None:
    """What others did to the key or its task since the snapshot is a serialization failure, and no second task."""
    a, b, w = await s.session("a"), await s.session("b"), await s.worker("claims")
    me = await w(verbs.register)
    for what in ("enqueued", "claimed", "nothing"):
        await s.db.execute("TRUNCATE notifyq.task, notifyq.unique_key")
        if what != "enqueued":
            await b(KEYED)
        await a(f"BEGIN ISOLATION LEVEL {level}")
        await a("SELECT count(*) FROM notifyq.task")
        if what == "enqueued":
            await b(KEYED)
        elif what == "claimed":
            await w(verbs.claim, me)
        if what == "nothing":
            assert await a(f"{KEYED} RETURNING id") == []
        else:
            with pytest.raises(asyncpg.SerializationError):
                await a(KEYED)
        await a("ROLLBACK")
        assert await count(s.db) == 1
