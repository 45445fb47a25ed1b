"""Batch handlers: what is gathered and when it begins; each task's own end; stops, kills and leases in the middle."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

import notifyq
from notifyq import Cancel, Context, Dead, Retry
from notifyq.errors import ConfigError
from notifyq.testing import Ran, drain, run_inline
from notifyq.worker.batch import Batches
from notifyq.worker.calls import Calls
from notifyq.worker.group import RunGroup
from notifyq.worker.services import Services
from notifyq.worker.slots import Slots

from ..helpers.logs import Logged, ids_of
from ..helpers.machine import Probe, limit
from ..helpers.processes import Process, started, whose
from ..helpers.rows import ended, errors, handed_back, insert, nobody_left, state, states
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

CONTEXT = Context(id=1, queue="q", attempt=1, max_attempts=9, priority=0, created_at=datetime.now(UTC))
CLAIMED = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"


class Item(notifyq.Task):
    """Gathered for two minutes, or until there are ten."""

    backoff = 0.01
    max_attempts = 2
    how: str = ""


class Slow(notifyq.Task):
    timeout = 0.1
    max_attempts = 1


class Threaded(notifyq.Task):
    pass


class Score(notifyq.Task):
    n: int


class Pool:
    pass


class Bench:
    """An app with batch handlers, and what they have done."""

    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()  # ids, a list for each call

        @app.handler(batch=10, linger=120)
        async def items(tasks: list[Item], ctxs: list[Context]) -> Any:
            assert len(tasks) == len(ctxs)
            seen.add([ctx.id for ctx in ctxs])
            first = tasks[0].how
            if first == "raise":
                raise ValueError("all of it")
            if first == "return":
                return Retry(0, "all again")
            if first == "short":
                return [None]
            if first == "dict":
                return {}
            kinds = {
                "": None,
                "result": {"ok": True},
                "odd": object(),
                "error": KeyError("this one"),
                "retry": Retry(0, "this one again"),
                "cancel": Cancel("not this one"),
                "dead": Dead("not that one"),
            }
            return [kinds[task.how] for task in tasks]

        @app.handler(batch=5, linger=0.02)
        async def slow(tasks: list[Slow]) -> None:
            seen.add(len(tasks))
            await anyio.sleep(60)

        @app.handler(batch=5, linger=0)
        def threaded(tasks: list[Threaded]) -> list[str]:
            seen.add(len(tasks))
            return [threading.current_thread().name for _ in tasks]


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench


def items(count: int, how: str = "") -> list[notifyq.Task]:
    return [Item(how) for _ in range(count)]


async def claimed(db: Any) -> int:
    return int(await db.fetchval(CLAIMED))


# --- When it begins


async def test_a_hundred_of_one_transaction_are_one_batch(db: Any, dsn: str) -> None:
    app, seen = notifyq.App(), Seen()

    @app.handler(batch=100, linger=120)
    async def items(tasks: list[Item], ctxs: list[Context]) -> None:
        seen.add([ctx.id for ctx in ctxs])

    async with app.connect(dsn), working(app, dsn, concurrency=100):
        ids = await app.enqueue_many([Item() for _ in range(100)])
        assert await seen.reach(1) == [ids], "in their order"
        await eventually(lambda: states(db, ids), {("done", 1): 100})


async def test_a_full_one_does_not_wait_and_the_rest_lingers(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        ids = await bench.app.enqueue_many(items(24))
        assert await bench.seen.reach(2) == [ids[:10], ids[10:20]]
        await eventually(lambda: states(db, ids), {("done", 1): 20, ("running", 1): 4})
        more = await bench.app.enqueue_many(items(6))
        assert (await bench.seen.reach(3))[2] == ids[20:] + more


async def test_a_trickle_runs_after_the_linger(db: Any, dsn: str) -> None:
    """It is counted from the first task on: tasks that keep coming don't put the batch off."""
    app, seen = notifyq.App(), Seen()

    @app.handler(batch=100, linger=0.2)
    async def items(tasks: list[Item]) -> None:
        seen.add((len(tasks), time.monotonic()))

    async with app.connect(dsn), working(app, dsn):
        begin = time.monotonic()
        for _ in range(99):
            await app.enqueue(Item())
            await anyio.sleep(0.01)
            if seen.items:
                break
        count, at = (await seen.reach(1))[0]
        assert count < 99
        assert at - begin > 0.19


async def test_nothing_more_can_come(db: Any, dsn: str) -> None:
    """All slots are with tasks that are gathered, of two types: both begin, though neither is full. A slot that
    something else runs in will be free again, so that is waited for."""
    app, seen, release = notifyq.App(), Seen(), anyio.Event()

    @app.handler(batch=4, linger=120)
    async def first(tasks: list[Item]) -> None:
        seen.add(("Item", len(tasks)))
        await release.wait()

    @app.handler(batch=4, linger=120)
    async def second(tasks: list[Slow]) -> None:
        seen.add(("Slow", len(tasks)))

    async with app.connect(dsn), working(app, dsn, concurrency=4):
        await app.enqueue_many([Item(), Slow(), Item(), Slow()])
        assert sorted(await seen.reach(2)) == [("Item", 2), ("Slow", 2)]
        ids = await app.enqueue_many([Slow(), Slow(), Slow()])
        await eventually(lambda: claimed(db), 4)
        assert await states(db, ids) == {("running", 1): 2, ("ready", 0): 1}, "a batch counts as its tasks"
        assert len(seen.items) == 2
        more = await app.enqueue_many([Slow()])
        release.set()
        assert await seen.reach(3) == [*seen.items[:2], ("Slow", 4)]
        await eventually(lambda: states(db, ids + more), {("done", 1): 4})


async def test_no_larger_than_concurrency(bench: Bench, dsn: str, logged: Logged) -> None:
    async with working(bench.app, dsn, concurrency=3):
        ids = await bench.app.enqueue_many(items(6))
        assert await bench.seen.reach(2) == [ids[:3], ids[3:]]
    told = logged("gets no larger than that")
    assert sorted(fields["batch"] for fields in told) == [5, 5, 10]
    assert {fields["concurrency"] for fields in told} == {3}


async def test_more_than_slots(bench: Bench, db: Any, dsn: str) -> None:
    """Never more at once than `concurrency`, and all of it runs, in full batches."""
    app, seen = notifyq.App(), Seen()
    running, peak = 0, 0

    @app.handler(batch=10, linger=limit(0.3))
    async def items(tasks: list[Item]) -> None:
        nonlocal running, peak
        running += len(tasks)
        peak = max(peak, running)
        await anyio.sleep(0.001)
        running -= len(tasks)
        seen.add(len(tasks))

    async with app.connect(dsn), working(app, dsn, concurrency=25):
        ids = await app.enqueue_many([Item() for _ in range(1000)])
        await eventually(lambda: states(db, ids), {("done", 1): 1000})
    assert 20 <= peak <= 25
    assert sum(seen.items) == 1000
    assert Counter(seen.items)[10] > 80


async def test_drained(bench: Bench, dsn: str) -> None:
    """Nothing more comes, so the rest doesn't linger."""
    ids = await bench.app.enqueue_many([*items(13), Threaded(), Threaded()])
    with anyio.fail_after(limit()):
        assert (await drain(bench.app)).done == 15
    assert ids[:10] in bench.seen.items
    assert ids[10:13] in bench.seen.items


# --- How it ends


async def test_each_its_own_end(bench: Bench, db: Any, dsn: str) -> None:
    kinds = ["", "result", "odd", "error", "retry", "cancel", "dead", "", "", ""]
    ids = await bench.app.enqueue_many([Item(kind) for kind in kinds])
    async with working(bench.app, dsn):
        assert await bench.seen.reach(1) == [ids]
        found = dict(zip(reversed(kinds), reversed(ids), strict=True))
        for kind, want in {"": "done", "result": "done", "odd": "dead", "cancel": "cancelled", "dead": "dead"}.items():
            row = await ended(db, found[kind], want)
            assert row["attempts"] == 1
        await eventually(lambda: states(db, [found["error"], found["retry"]]), {("running", 2): 2})
    assert (await errors(db, found["odd"]))[0]["error"].startswith("its result, a object, can't be written as JSON")
    assert (await errors(db, found["cancel"]))[0]["error"] == "not this one"
    assert (await errors(db, found["dead"]))[0]["error"] == "not that one"
    assert (await errors(db, found["retry"]))[0]["error"] == "this one again"
    assert (await errors(db, found["error"]))[0]["error"] == "KeyError: 'this one'"
    result = "SELECT result FROM notifyq.all_tasks WHERE id = $1"
    assert await db.fetchval(result, found["result"]) == b'{"ok": true}'
    assert await db.fetchval(result, found[""]) is None


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raise", "ValueError: all of it"),
        ("return", "all again"),
        (
            "short",
            "its batch handler returned a list of 1 for 10 tasks; expected None, or a list with one item for each",
        ),
        ("dict", "its batch handler returned a dict; expected None, or a list with one item for each task"),
    ],
)
async def test_all_of_it_fails(bench: Bench, db: Any, dsn: str, how: str, error: str) -> None:
    """Each by itself: those with an attempt left try again, the others are dead."""
    async with db.transaction():
        more = await bench.app.enqueue_many(items(5, how), conn=db)
        last = await bench.app.enqueue_many(items(5, how), conn=db, max_attempts=1)
    async with working(bench.app, dsn):
        await bench.seen.reach(1)
        await eventually(lambda: states(db, last), {("dead", 1): 5})
        await eventually(lambda: states(db, more), {("running", 2): 5})
    for id in more + last:
        [found] = await errors(db, id)
        assert found["error"].startswith(error)
        assert found["attempt"] == 1


async def test_poison_among_good_ones(bench: Bench, db: Any, dsn: str) -> None:
    async with db.transaction():
        good = await bench.app.enqueue_many(items(5), conn=db)
        [bad] = await insert(db, "Item", how=[5])
        [unknown] = await insert(db, "Unheard")
        good += await bench.app.enqueue_many(items(5), conn=db)
    async with working(bench.app, dsn):
        assert await bench.seen.reach(1) == [good]
        await ended(db, bad, "dead")
        assert "expected `str`, got `array`" in str((await errors(db, bad))[0]["error"]).lower().replace("Expected", "")
        await eventually(lambda: states(db, good), {("done", 1): 10})
        assert await state(db, unknown) == "ready"


async def test_timeout(bench: Bench, db: Any, dsn: str) -> None:
    ids = await bench.app.enqueue_many([Slow() for _ in range(5)])
    async with working(bench.app, dsn):
        await eventually(lambda: states(db, ids), {("dead", 1): 5})
    assert [(await errors(db, id))[0]["error"] for id in ids] == ["timed out after 0.1 s"] * 5
    assert bench.seen.items == [5]


async def test_a_plain_def_runs_in_a_thread(bench: Bench, db: Any, dsn: str) -> None:
    ids = await bench.app.enqueue_many([Threaded() for _ in range(5)])
    async with working(bench.app, dsn):
        for id in ids:
            assert threading.current_thread().name.encode() not in (await ended(db, id, "done"))["result"]
    assert sum(bench.seen.items) == 5


async def test_no_transaction(db: Any, dsn: str) -> None:
    app = notifyq.App()

    @app.handler(batch=2, linger=0)
    async def items(tasks: list[Item], ctxs: list[Context]) -> None:
        async with ctxs[0].transaction():
            pass

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Item(), max_attempts=1)
        await ended(db, ref.id, "dead")
    assert "ConfigError: ctx.transaction() settles one task" in (await errors(db, ref.id))[0]["error"]


async def test_progress(db: Any, dsn: str) -> None:
    app, go_on = notifyq.App(), anyio.Event()

    @app.handler(batch=2, linger=120)
    async def items(tasks: list[Item], ctxs: list[Context]) -> None:
        for n, ctx in enumerate(ctxs):
            await ctx.progress(n / 2, f"number {n}")
        await go_on.wait()

    async with app.connect(dsn), working(app, dsn):
        await app.enqueue_many([Item(), Item()])
        query = "SELECT array_agg(note || ' ' || progress ORDER BY id) FROM notifyq.all_tasks"
        await eventually(lambda: db.fetchval(query), ["number 0 0", "number 1 0.5"])
        go_on.set()


async def test_a_handler_that_cancels_the_asyncio_task_it_runs_in(db: Any, dsn: str) -> None:
    app, seen = notifyq.App(), Seen()

    @app.handler(batch=2, linger=0)
    async def items(tasks: list[Item]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        seen.add(len(tasks))
        if tasks[0].how == "wait":
            await anyio.sleep(1)

    async with app.connect(dsn), working(app, dsn):
        for how, want in (("", "done"), ("wait", "dead"), ("", "done")):
            ref = await app.enqueue(Item(how), max_attempts=1)
            await ended(db, ref.id, want)


# --- Stops


async def test_what_is_gathered_is_handed_back_at_once(db: Any, dsn: str) -> None:
    """And a running batch has its time, as a handler has."""
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
    """Cancelled, and each handed back; but a handler that gets to its end all the same has done its work."""
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


# --- Leases


async def test_a_cancel_of_one_and_then_of_all(db: Any, dsn: str, logged: Logged, quick_heart: None) -> None:
    """The call goes on for the others, and its end changes nothing for that one. With nobody left, it is cancelled."""
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
    """Between two steps of the loop. The handler, which might get far without waiting for anything, is never called."""
    app, began, numbers = notifyq.App(), Seen(), itertools.count()
    app.handler(batch=2, linger=0.01)(listed)
    handler = app.registry.get("Item")
    assert handler is not None

    async def call(*_: Any) -> None:
        raise AssertionError("nobody is in it")

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
    assert batches.give_up(job)
    assert not batches.give_up(job)
    alone.cancel()
    await anyio.sleep(0.05)
    assert alone.cancelled()
    assert not began.items, "its time is over, and there is nothing to begin"

    pair = [await join(), await join()]
    [(run, argument)] = began.items
    for job, waiting in pair:
        assert not batches.give_up(job)
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


# --- Several workers


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
    """One batch runs and one is half gathered: all of it runs in another within 5 s, each once more."""
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
    """All its leases are lost: thawed, it cancels the batch and settles nothing."""
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


# --- Written wrongly


def one(task: Item) -> None: ...
def listed(tasks: list[Item]) -> None: ...
def of_ints(tasks: list[int]) -> None: ...
def one_context(tasks: list[Item], ctx: Context) -> None: ...
def both(tasks: list[Item], *, given: "list[str]") -> None: ...  # noqa: UP037


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (listed, {"batch": 0}, r"@app\.handler\(batch=0\): expected 1 to 10000 tasks"),
        (listed, {"batch": True}, r"@app\.handler\(batch=True\): expected"),
        (listed, {"batch": 2.5}, r"@app\.handler\(batch=2\.5\): expected"),
        (listed, {"batch": 10_001}, "expected 1 to 10000 tasks"),
        (listed, {"batch": 2, "linger": -0.1}, r"@app\.handler\(linger=-0\.1\): expected seconds, 0 to 3600"),
        (listed, {"batch": 2, "linger": float("nan")}, "expected seconds"),
        (listed, {"batch": 2, "linger": "1"}, "expected seconds"),
        (listed, {"batch": 2, "linger": True}, r"linger=True\): expected seconds"),
        (listed, {"linger": 1}, "expected batch= beside it"),
        (
            one,
            {"batch": 2},
            r"its first parameter is a <class '.*Item'>; with batch= it is a list: async def send\(tasks: list",
        ),
        (listed, {}, r"first parameter is a list\[.*Item\], which a batch handler has: @app\.handler\(batch=100\)"),
        (of_ints, {"batch": 2}, "expected a subclass of notifyq.Task"),
        (one_context, {"batch": 2}, r"parameter 'ctx' is a 'Context'; expected list\[notifyq\.Context\]"),
        (both, {"batch": 2}, r"parameter 'given' is a .*; expected list\[notifyq\.Context\], or a class of which"),
    ],
)
def test_what_cannot_be(function: Any, options: dict[str, Any], message: str) -> None:
    app = notifyq.App()
    with pytest.raises(ConfigError, match=message):
        app.handler(**options)(function)
    assert not app.registry.types


async def test_middleware_goes_around_one_task(dsn: str) -> None:
    for around in (True, False):
        app, seen = notifyq.App(), Seen()
        app.handler(batch=2, middleware=around)(listed)

        @app.handler
        async def slow(task: Slow) -> None: ...

        @app.middleware
        async def timing(task: notifyq.Task, ctx: Context, call: Any) -> object:
            seen.add(type(task).__name__)  # noqa: B023 - called in this round
            return await call(task, ctx)

        async with app.connect(dsn):
            await app.enqueue_many([Item(), Slow()])
            if around:
                with pytest.raises(ConfigError, match="listed: this app has middleware, which goes around one task"):
                    await app.run_worker(drain=True)
            else:
                await app.run_worker(drain=True)
                assert set(seen.items) == {"Slow"}


# --- Tested


async def test_inline(bench: Bench) -> None:
    assert await run_inline(bench.app, Item("result")) == Ran(state="done", result={"ok": True})
    assert bench.seen.items == [[1]]
    ran = await run_inline(bench.app, [Item(how) for how in ("", "result", "error", "cancel")], id=7)
    assert [one.state for one in ran] == ["done", "done", "retry", "cancelled"]
    assert bench.seen.items[1] == [7, 8, 9, 10]
    ran = await run_inline(bench.app, [Item() for _ in range(25)])
    assert len(ran) == 25
    assert [len(ids) for ids in bench.seen.items[2:]] == [10, 10, 5]
    with pytest.raises(ValueError, match="all of it"):
        await run_inline(bench.app, Item("raise"), raises=True)
    with pytest.raises(ConfigError, match="tasks of types Item and Slow"):
        await run_inline(bench.app, [Item(), Slow()])
    with pytest.raises(ConfigError, match="expected an instance"):
        await run_inline(bench.app, [])


async def test_given_and_typed() -> None:
    app = notifyq.App()

    @app.lifespan
    async def pool() -> AsyncIterator[Pool]:
        yield Pool()

    @app.handler(batch=5)
    async def score(tasks: list[Score], pool: Pool, ctxs: list[Context]) -> list[tuple[int, str] | Retry] | None:
        return [(task.n + ctx.id, type(pool).__name__) for task, ctx in zip(tasks, ctxs, strict=True)]

    ran = await run_inline(app, [Score(10), Score(20)])
    assert [one.result for one in ran] == [(11, "Pool"), (22, "Pool")]


async def _async(value: Any) -> Any:
    return value
