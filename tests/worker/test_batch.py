"""Batch handlers: which tasks are gathered, when a batch begins, and how each task of it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import notifyq
from notifyq import Context
from notifyq.testing import drain

from ..helpers.batches import Bench, Item, Slow, Threaded, claimed, items
from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.rows import ended, errors, insert, state, states
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench


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
    """All slots are with tasks that are gathered, of two types: both batches begin, though neither is full. A slot in
    which something else runs will be free again, so the batch waits for that."""
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
    """Never more than `concurrency` run at once, and all of them run, in full batches."""
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
    """In a drain nothing more comes, so the rest doesn't linger."""
    ids = await bench.app.enqueue_many([*items(13), Threaded(), Threaded()])
    with anyio.fail_after(limit()):
        assert (await drain(bench.app)).done == 15
    assert ids[:10] in bench.seen.items
    assert ids[10:13] in bench.seen.items


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
    """Each task fails by itself: those with an attempt left try again, the others are dead."""
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
