"""Batches under stops, cancels, lost leases, kills and freezes."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

import notifyq
from notifyq import Context
from notifyq.worker.batch import Batches
from notifyq.worker.calls import Calls
from notifyq.worker.group import RunGroup
from notifyq.worker.services import Services
from notifyq.worker.slots import Slots

from ..helpers.batches import CONTEXT, Bench, Item, claimed, items
from ..helpers.logs import Logged, ids_of
from ..helpers.machine import Probe
from ..helpers.processes import Process, started, whose
from ..helpers.rows import handed_back, insert, nobody_left, states
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually
from .test_batch_checks import _async, listed


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench


async def test_what_is_gathered_is_handed_back_at_once(db: Any, dsn: str) -> None:
    """A running batch has its time, as a handler has."""
    app, seen, release = notifyq.App(), Seen(), anyio.Event()

    @app.handler(batch=10, linger=120)
    async def items(tasks: list[Item]) -> None:
        seen.add(len(tasks))
        await release.wait()

    async with app.connect(dsn), working(app, dsn, shutdown_timeout=3600) as worker:
        ids = await app.enqueue_many([Item() for _ in range(14)])
        await seen.reach(1)
        await eventually(lambda: claimed(db), 14)
        worker.stop.set()
        await eventually(lambda: claimed(db), 10)
        assert await handed_back(db, *ids[10:])
        assert not worker.done.is_set()
        release.set()
        await worker.stopped()
    assert await states(db, ids) == {("done", 1): 10, ("ready", 0): 4}
    assert seen.items == [10]


@pytest.mark.parametrize("how", ["", "to its end"])
async def test_at_the_deadline(db: Any, dsn: str, how: str) -> None:
    """The batch is cancelled, and each task is handed back. But the tasks of a handler that gets to its end all the
    same are done."""
    app, seen = notifyq.App(), Seen()

    @app.handler(batch=10, linger=120)
    async def items(tasks: list[Item]) -> None:
        seen.add("begun")
        try:
            await anyio.sleep(60)
        except BaseException:
            seen.add("cancelled")
            if not how:
                raise

    async with app.connect(dsn), working(app, dsn, shutdown_timeout=0.1) as worker:
        ids = await app.enqueue_many([Item() for _ in range(10)])
        await seen.reach(1)
        await worker.stopped()
    assert seen.items == ["begun", "cancelled"]
    assert await states(db, ids) == ({("done", 1): 10} if how else {("ready", 0): 10})
    assert await nobody_left(db)


async def test_cancelling_run_worker_hands_everything_back(dsn: str, db: Any) -> None:
    app, seen = notifyq.App(), Seen()

    @app.handler(batch=10, linger=120)
    async def items(tasks: list[Item]) -> None:
        seen.add(len(tasks))
        await anyio.sleep(3600)

    async with app.connect(dsn), anyio.create_task_group() as group:
        await group.start(lambda *, task_status: app.run_worker(dsn=dsn, poll_interval=0, task_status=task_status))
        ids = await app.enqueue_many([Item() for _ in range(15)])
        await seen.reach(1)
        await eventually(lambda: claimed(db), 15)
        group.cancel_scope.cancel()
    assert await handed_back(db, *ids)
    assert await nobody_left(db)


async def test_one_that_will_not_be_cancelled_cannot_keep_the_worker(dsn: str, db: Any, logged: Logged) -> None:
    app, seen, release = notifyq.App(), Seen(), asyncio.Event()

    @app.handler(batch=3, linger=120)
    async def stubborn(tasks: list[Item]) -> None:
        seen.add(len(tasks))
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    async with app.connect(dsn), working(app, dsn, shutdown_timeout=0.1) as worker:
        ids = await app.enqueue_many([Item() for _ in range(3)])
        await seen.reach(1)
        await worker.stopped()
        assert await handed_back(db, *ids)
        [fields] = logged("didn't end when cancelled")
        assert len(fields["handlers"]) == 3
        assert "stubborn" in fields["handlers"][0]
        release.set()


async def test_a_cancel_of_one_and_then_of_all(db: Any, dsn: str, logged: Logged, quick_heart: None) -> None:
    """The call goes on for the others, and its end changes nothing for the cancelled one. When all are cancelled, so is
    the call."""
    app, seen, release = notifyq.App(), Seen(), anyio.Event()

    @app.handler(batch=3, linger=120)
    async def items(tasks: list[Item], ctxs: list[Context]) -> list[Any]:
        seen.add([ctx.id for ctx in ctxs])
        try:
            await release.wait()
        except BaseException:
            seen.add("cancelled")
            raise
        assert [ctx.cancelled for ctx in ctxs] == [len(seen.items) == 1, False, False]
        return [ValueError("lost, and not told"), "result", "result"]

    async with app.connect(dsn), working(app, dsn):
        ids = await app.enqueue_many([Item() for _ in range(3)])
        await seen.reach(1)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ids[0])
        await eventually(lambda: _async(len(logged("cancelled while it ran"))), 1)
        assert seen.items == [ids], "it goes on"
        release.set()
        await eventually(lambda: states(db, ids), {("cancelled", 1): 1, ("done", 1): 2})
        assert not logged("trying again")
        assert not logged("settled nothing")

        release = anyio.Event()
        more = await app.enqueue_many([Item() for _ in range(3)])
        await seen.reach(2)
        for id in more:
            await db.fetchval("SELECT notifyq.cancel($1)", id)
        assert (await seen.reach(3))[2] == "cancelled"
        await eventually(lambda: states(db, more), {("cancelled", 1): 3})
        # Its slots are free.
        release.set()
        assert await app.enqueue_many([Item() for _ in range(3)])
        await seen.reach(4)


async def test_a_cancel_of_one_that_is_gathered(
    bench: Bench, db: Any, dsn: str, logged: Logged, quick_heart: None
) -> None:
    async with working(bench.app, dsn):
        ids = await bench.app.enqueue_many(items(3))
        await eventually(lambda: claimed(db), 3)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ids[1])
        await eventually(lambda: _async(len(logged("cancelled while it ran"))), 1)
        more = await bench.app.enqueue_many(items(8))
        assert await bench.seen.reach(1) == [[ids[0], ids[2], *more]]
        last = await bench.app.enqueue(Item())
        await eventually(lambda: claimed(db), 1)
        assert await db.fetchval("SELECT notifyq.cancel($1)", last.id)
        await eventually(lambda: _async(len(logged("cancelled while it ran"))), 2)
        again = await bench.app.enqueue_many(items(10))
        assert (await bench.seen.reach(2))[1] == again, "the batch of one that was left empty is gone"


async def test_all_leave_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are cancelled between two steps of the loop. The handler, which might get far without waiting for anything,
    is never called."""
    app, began, numbers = notifyq.App(), Seen(), itertools.count()
    app.handler(batch=2, linger=0.01)(listed)
    handler = app.registry.get("Item")
    assert handler is not None

    async def call(*_: Any) -> None:
        raise AssertionError("no task is in it")

    calls, group = Calls(1), RunGroup()
    monkeypatch.setattr(calls, "call", call)
    monkeypatch.setattr(group, "start", lambda run, function, argument: began.add((function, argument)))
    batches = Batches(2, Slots(app.registry), calls, group, Services())

    async def join() -> tuple[Any, asyncio.Task[Any]]:
        job: Any = type("Claimed", (), {"id": next(numbers), "attempt": 1})()
        waiting = asyncio.create_task(batches.join(handler, job, Item(), CONTEXT))
        await asyncio.sleep(0)
        return job, waiting

    job, alone = await join()
    assert batches.remove_member(job)
    assert not batches.remove_member(job)
    alone.cancel()
    await anyio.sleep(0.05)
    assert alone.cancelled()
    assert not began.items, "its time is over, and there is nothing to begin"

    pair = [await join(), await join()]
    [(run, argument)] = began.items
    for job, waiting in pair:
        assert not batches.remove_member(job)
        waiting.cancel()
    await asyncio.sleep(0)
    assert not any(waiting.done() for _, waiting in pair)
    await run(argument)
    await asyncio.wait([waiting for _, waiting in pair])
    assert all(waiting.cancelled() for _, waiting in pair)


async def test_claimed_again_while_its_batch_still_runs(db: Any, dsn: str) -> None:
    """The lease was lost, and the task is ready again: this worker takes it, and waits until the old call has ended."""
    app, seen, release = notifyq.App(), Seen(), anyio.Event()

    @app.handler(batch=2, linger=0.02)
    async def items(tasks: list[Item], ctxs: list[Context]) -> None:
        seen.add([(ctx.id, ctx.attempt) for ctx in ctxs])
        await release.wait()

    async with app.connect(dsn), working(app, dsn, concurrency=4):
        one, two = await app.enqueue_many([Item(), Item()])
        await seen.reach(1)
        await db.execute("UPDATE notifyq.task SET worker = NULL, run_at = run_at WHERE id = $1", one)
        await eventually(lambda: states(db, [one]), {("running", 2): 1})
        assert len(seen.items) == 1
        release.set()
        assert await seen.reach(2) == [[(one, 1), (two, 1)], [(one, 2)]]
        await eventually(lambda: states(db, [one, two]), {("done", 1): 1, ("done", 2): 1})


async def test_two_workers(dsn: str, db: Any) -> None:
    app, seen = notifyq.App(), Seen()

    @app.handler(batch=10, linger=0.01)
    async def items(tasks: list[Item], ctxs: list[Context]) -> None:
        assert len(tasks) <= 10
        await anyio.sleep(0.005)
        for ctx in ctxs:
            seen.add(ctx.id)

    async with app.connect(dsn), working(app, dsn, concurrency=20), working(app, dsn, concurrency=20):
        ids: list[int] = []
        for _ in range(20):
            ids += await app.enqueue_many([Item() for _ in range(25)])
        await seen.reach(500)
        await eventually(lambda: states(db, ids), {("done", 1): 500})
    assert sorted(seen.items) == ids


async def test_killed_in_a_batch(spawn: Callable[..., Process], db: Any, probe: Probe) -> None:
    """One batch runs and one is half gathered. All tasks run in another worker within 5 s, each once more."""
    workers = [await started(spawn, "lease=3600") for _ in range(2)]
    ids = await insert(db, "Part", 30)
    await eventually(lambda: states(db, ids), {("running", 1): 30})
    victim, heir = await whose(db, workers)
    await victim.reach(2, "batch")
    killed = time.monotonic()
    victim.process.signal(signal.SIGKILL)
    last = await heir.reach(2, "batch")
    assert last - killed < 5 + probe.late(killed)
    batches = [line for _, line in heir.of("batch")]
    assert ids_of(batches) == ids
    assert {attempt for line in batches for attempt in line["attempts"]} == {2}
    assert await states(db, ids) == {("running", 2): 30}


@pytest.mark.slow
async def test_frozen_past_its_lease(spawn: Callable[..., Process], db: Any) -> None:
    """All its leases are lost. When the worker goes on, it cancels the batch and settles nothing."""
    workers = [await started(spawn, "lease=6", "shutdown_timeout=0.1") for _ in range(2)]
    ids = await insert(db, "Part", 20)
    await eventually(lambda: states(db, ids), {("running", 1): 20})
    frozen, other = await whose(db, workers)
    await frozen.reach(1, "batch")
    frozen.process.signal(signal.SIGSTOP)
    await other.reach(1, "batch")
    frozen.process.signal(signal.SIGCONT)
    await frozen.reach(1, "log", message="lease lost: cancelled its handler")
    assert not frozen.of("ended")
    assert await states(db, ids) == {("running", 2): 20}
