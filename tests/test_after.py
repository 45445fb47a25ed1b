"""Tasks that wait for the ends of others: chains, fan-in, what becomes of one whose dependency fails, races, kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest

import notifyq
from notifyq import Context, TaskCancelled, TaskDead
from notifyq.errors import ConfigError
from notifyq.store import SQL
from notifyq.testing import drain, run_inline

from .conftest import Process, Seen, eventually, working
from .steps import Session, Steps, steps
from .test_faults import insert, started
from .test_lifecycle import ended, errors, state
from .verbs import claim, finish, held, later, register, rescue, silent

LEFT = "SELECT count(*) FROM notifyq.dependency"


class Step(notifyq.Task):
    max_attempts = 1
    name: str = ""
    how: str = ""


class Sum(notifyq.Task):
    max_attempts = 2
    backoff = 0.01
    fail: bool = False


class Threaded(notifyq.Task):
    pass


class Bench:
    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()  # names or ids of steps that began
        self.release = release = anyio.Event()  # those that wait

        @app.handler
        async def step(task: Step, ctx: Context) -> Any:
            seen.add(task.name or ctx.id)
            match task.how:
                case "wait":
                    await release.wait()
                case "fail":
                    raise ValueError("no luck")
                case "cancel":
                    raise notifyq.Cancel("not wanted")
            return task.name or None

        @app.handler
        async def sum(task: Sum, ctx: Context) -> Any:
            results = await ctx.results()
            seen.add([str(one) if isinstance(one, Exception) else one for one in results])
            if task.fail and ctx.attempt == 1:
                raise ValueError("once more")
            return len(results)

        @app.handler
        def threaded(task: Threaded, ctx: Context) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            return anyio.from_thread.run(ctx.results)


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


async def where(db: Any, *ids: int) -> list[Any]:
    """The states of these, and what they wait for."""
    query = "SELECT id, state, waits_for FROM notifyq.all_tasks WHERE id = ANY ($1::bigint[])"
    found = {row["id"]: row["waits_for"] or row["state"] for row in await db.fetch(query, ids)}
    return [found.get(id) for id in ids]


# --- In order


async def test_it_waits_for_all_and_gets_their_results(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        a = await bench.app.enqueue(Step("a"))
        b = await bench.app.enqueue(Step("b", "wait"))
        last = await bench.app.enqueue(Sum(), after=[b, a.id])
        await eventually(lambda: where(db, a.id, b.id, last.id), ["done", "running", "after"])
        bench.release.set()
        row = await ended(db, last.id, "done")
    assert bench.seen.items[2] == ["b", "a"], "in the order of `after`"
    assert row["attempts"] == 1, "waiting isn't an attempt"
    assert row["after"] == [b.id, a.id]
    assert row["result"] == b"2"
    assert not await db.fetchval(LEFT)


async def test_a_chain_of_a_hundred_with_two_workers(bench: Bench, db: Any, dsn: str) -> None:
    ids: list[int] = []
    async with working(bench.app, dsn), working(bench.app, dsn):
        for n in range(100):
            ids.append((await bench.app.enqueue(Step(), after=ids[-1:], priority=n)).id)  # noqa: PERF401 - each names the last
        await ended(db, ids[-1], "done")
    assert bench.seen.items == ids
    assert set(await where(db, *ids)) == {"done"}
    assert not await db.fetchval(LEFT)


async def test_a_chain_that_is_enqueued_at_once(bench: Bench, db: Any, dsn: str) -> None:
    """All of it is claimed together, the last first, and all but one are parked."""
    ids: list[int] = []
    async with db.transaction():
        for n in range(100):
            ids.append((await bench.app.enqueue(Step(), after=ids[-1:], priority=n, conn=db)).id)  # noqa: PERF401
    async with working(bench.app, dsn), working(bench.app, dsn):
        await ended(db, ids[-1], "done")
    assert bench.seen.items == ids
    assert not await db.fetchval(LEFT)


async def test_a_thousand_wide(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn), working(bench.app, dsn):
        ids, last = await bench.app.enqueue_many([Step(str(n)) for n in range(1000)], then=Sum())
        row = await ended(db, last.id, "done")
    assert row["result"] == b"1000"
    assert bench.seen.items[-1] == [str(n) for n in range(1000)], "the last, and in order"
    assert len(bench.seen.items) == 1001
    assert ids == list(range(1, 1001))
    assert not await db.fetchval(LEFT)


async def test_a_thousand_wait_for_one(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn), working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        ids = await bench.app.enqueue_many([Step(str(n)) for n in range(1000)], after=[first])
        await eventually(lambda: where(db, *ids), ["after"] * 1000)
        assert bench.seen.items == ["first"]
        bench.release.set()
        await eventually(lambda: where(db, *ids), ["done"] * 1000)
    assert not await db.fetchval(LEFT)


async def test_groups_of_groups(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        _, one = await bench.app.enqueue_many([Step("a"), Step("b")], then=Sum(), priority=3)
        _, two = await bench.app.enqueue_many([Step("c")], then=Sum(), after=[one])
        empty, three = await bench.app.enqueue_many([], then=Sum())
        assert empty == []
        last = await bench.app.enqueue(Sum(), after=[one, two, three])
        await ended(db, last.id, "done")
    assert bench.seen.items[-1] == [2, 1, 0]
    assert bench.seen.items.index(["c"]) > bench.seen.items.index("c") > bench.seen.items.index(["a", "b"])
    assert await db.fetchval("SELECT priority FROM notifyq.all_tasks WHERE id = $1", one.id) == 3


async def test_a_delay_comes_first(bench: Bench, db: Any, dsn: str) -> None:
    first = await bench.app.enqueue(Step("first"))
    delayed = await bench.app.enqueue(Step("delayed"), after=[first], delay=3600)
    async with working(bench.app, dsn):
        await ended(db, first.id, "done")
        assert await where(db, delayed.id) == ["scheduled"]
        await db.execute("SELECT notifyq.retry($1)", delayed.id)
        await ended(db, delayed.id, "done")


async def test_what_is_over_or_unknown_is_not_waited_for(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        a = await bench.app.enqueue(Step("a"))
        pruned = await bench.app.enqueue(Step("pruned"))
        await ended(db, a.id, "done")
        await ended(db, pruned.id, "done")
        await db.execute("DELETE FROM notifyq.finished WHERE id = $1", pruned.id)
        last = await bench.app.enqueue(Sum(fail=True), after=[a, pruned])
        row = await ended(db, last.id, "done")
    assert row["attempts"] == 2
    assert bench.seen.items[2:] == [["a", None]] * 2, "and the second run is given them too"


async def test_history_0(bench: Bench, db: Any, dsn: str) -> None:
    """What nobody keeps is kept for who waits for it, until it is pruned."""
    async with working(bench.app, dsn, history=0):
        alone = await bench.app.enqueue(Step("alone"))
        _, last = await bench.app.enqueue_many([Step("a", "wait"), Step("b", "wait")], then=Sum())
        await eventually(lambda: where(db, last.id), ["after"])
        doomed = await bench.app.enqueue(Step("c", "cancel"))
        after = await bench.app.enqueue(Step("never"), after=[doomed])
        bench.release.set()
        await bench.seen.reach(5)
        await eventually(lambda: where(db, alone.id, last.id), [None, None])
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    assert ["a", "b"] in bench.seen.items
    # Cancelled before it was judged, it may be unknown by then; else it is known as cancelled.
    assert (await where(db, after.id) == ["cancelled"]) == ("never" not in bench.seen.items)


async def test_drained(bench: Bench, db: Any) -> None:
    ids = [(await bench.app.enqueue(Step("first"))).id]
    for n in range(20):
        ids += [(await bench.app.enqueue(Step(str(n)), after=ids[-2:])).id]
    _, last = await bench.app.enqueue_many([Step("x", "fail"), Step("y")], then=Sum(), on_dead="run")
    drained = await drain(bench.app)
    assert (drained.done, drained.dead) == (23, 1)
    assert await state(db, last.id) == "done"
    assert not await db.fetchval(LEFT)


async def test_in_a_thread(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        _, last = await bench.app.enqueue_many([Step("a"), Step("b")], then=Threaded())
        assert (await ended(db, last.id, "done"))["result"] == b'["a", "b"]'


async def test_with_limits_and_order(bench: Bench, db: Any, dsn: str) -> None:
    """What waits for an end holds no slot of its limit, and keeps nobody of its order from running."""
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        waits = await bench.app.enqueue(Step("waits"), after=[first], limit_key="k", limit=1, order_key="o")
        await eventually(lambda: where(db, waits.id), ["after"])
        other = await bench.app.enqueue(Step("other"), limit_key="k", limit=1, order_key="o")
        await ended(db, other.id, "done")
        bench.release.set()
        await ended(db, waits.id, "done")
    assert bench.seen.items == ["first", "other", "waits"]


# --- One of them fails


@pytest.mark.parametrize(("how", "fate"), [("fail", "is dead"), ("cancel", "was cancelled")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_one_that_is_not_done_cancels_all_that_wait(
    bench: Bench, db: Any, dsn: str, how: str, fate: str, when: str
) -> None:
    """Those that wait for it, and those that wait for them; not those that run all the same."""
    app = bench.app
    bad = await app.enqueue(Step("bad", how))
    good = await app.enqueue(Step("good", "wait"))
    if when == "before":
        async with working(app, dsn):
            await ended(db, bad.id, "dead" if how == "fail" else "cancelled")
    one = await app.enqueue(Step("one"), after=[good, bad])
    two = await app.enqueue(Step("two"), after=[one])
    three = await app.enqueue(Step("three"), after=[two, good])
    anyway = await app.enqueue(Sum(), after=[bad, three], on_dead="run")
    async with working(app, dsn):
        for ref in (one, two, three):
            await ended(db, ref.id, "cancelled")
        await ended(db, anyway.id, "done")
        assert await state(db, good.id) == "running", "nobody waited for that to end"
        bench.release.set()
    [error] = await errors(db, one.id)
    assert error["error"] == f"task {bad.id} (Step), which it was to run after, {fate}"
    assert error["attempt"] == 0
    [error] = await errors(db, three.id)
    assert error["error"] == f"task {two.id} (Step), which it was to run after, was cancelled"
    last = [item for item in bench.seen.items if isinstance(item, list)]
    why = "ValueError: no luck" if how == "fail" else "not wanted"
    assert last == [
        [
            f"task {bad.id} (Step) {fate}: {why}",
            f"task {three.id} (Step) was cancelled: task {two.id} (Step), which it was to run after, was cancelled",
        ]
    ]
    assert not {"one", "two", "three"} & {item for item in bench.seen.items if isinstance(item, str)}
    assert not await db.fetchval(LEFT)


async def test_a_chain_of_a_hundred_is_cancelled(bench: Bench, db: Any, dsn: str) -> None:
    ids: list[int] = []
    for _ in range(100):
        ids.append((await bench.app.enqueue(Step("", "wait"), after=ids[-1:])).id)  # noqa: PERF401 - each names the last
    async with working(bench.app, dsn), working(bench.app, dsn):
        await eventually(lambda: where(db, *ids), ["running"] + ["after"] * 99)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ids[0])
        await eventually(lambda: where(db, *ids), ["cancelled"] * 100)
    assert not await db.fetchval(LEFT)


async def test_what_is_retried_waits_once_more_and_runs_whatever_became_of_the_others(
    bench: Bench, db: Any, dsn: str
) -> None:
    async with working(bench.app, dsn):
        bad, worse = await bench.app.enqueue(Step("bad", "fail")), await bench.app.enqueue(Step("worse", "fail"))
        last = await bench.app.enqueue(Sum(), after=[bad, worse])
        await ended(db, last.id, "cancelled")
        await ended(db, worse.id, "dead")
        await db.execute(
            'UPDATE notifyq.finished SET payload = \'{"name": "cured", "how": "wait"}\' WHERE id = $1', bad.id
        )
        assert await db.fetchval("SELECT notifyq.retry($1)", bad.id)
        await eventually(lambda: state(db, bad.id), "running")
        assert await state(db, last.id) == "cancelled", "that changes nothing by itself"
        assert await db.fetchval("SELECT notifyq.retry($1)", last.id)
        await eventually(lambda: where(db, last.id), ["after"])
        bench.release.set()
        await ended(db, last.id, "done")
    assert bench.seen.items[-1] == ["cured", f"task {worse.id} (Step) is dead: ValueError: no luck"]


async def test_a_retry_of_what_was_waited_for_changes_nothing(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        bad = await bench.app.enqueue(Step("bad", "fail"))
        last = await bench.app.enqueue(Sum(fail=True), after=[bad], on_dead="run")
        await bench.seen.reach(2)
        assert await db.fetchval("SELECT notifyq.retry($1)", bad.id)
        row = await ended(db, last.id, "done")
        assert row["attempts"] == 2


async def test_cancelled_while_it_waits(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        one = await bench.app.enqueue(Step("one"), after=[first])
        two = await bench.app.enqueue(Step("two"), after=[one])
        await eventually(lambda: where(db, one.id, two.id), ["after", "after"])
        assert await db.fetchval("SELECT notifyq.cancel($1)", one.id)
        await ended(db, two.id, "cancelled")
        assert await db.fetchval("SELECT notifyq.retry($1)", one.id)
        await eventually(lambda: where(db, one.id), ["after"])
        bench.release.set()
        await ended(db, one.id, "done")
    assert not await db.fetchval(LEFT)
