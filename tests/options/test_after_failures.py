"""What becomes of a task that waits for a task which fails, is cancelled or is retried."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from ..helpers.predecessors import LEFT, Bench, Step, Sum, where
from ..helpers.rows import ended, errors, state
from ..helpers.running import working
from ..helpers.waiting import eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


@pytest.mark.parametrize(("how", "fate"), [("fail", "is dead"), ("cancel", "was cancelled")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_one_that_is_not_done_cancels_all_that_wait(
    bench: Bench, db: Any, dsn: str, how: str, fate: str, when: str
) -> None:
    """It cancels the tasks that wait for it, and those that wait for them, but not those with on_dead "run"."""
    app = bench.app
    bad = await app.enqueue(Step("bad", how))
    good = await app.enqueue(Step("good", "wait"))
    if when == "before":
        async with working(app, dsn, shutdown_timeout=0.1):
            await ended(db, bad.id, "dead" if how == "fail" else "cancelled")
    one = await app.enqueue(Step("one"), after=[good, bad])
    two = await app.enqueue(Step("two"), after=[one])
    three = await app.enqueue(Step("three"), after=[two, good])
    anyway = await app.enqueue(Sum(), after=[bad, three], on_dead="run")
    async with working(app, dsn):
        for ref in (one, two, three):
            await ended(db, ref.id, "cancelled")
        await ended(db, anyway.id, "done")
        assert await state(db, good.id) == "running", "no statement waited for its end"
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
        ids.append((await bench.app.enqueue(Step("", "wait"), after=ids[-1:])).id)
    async with working(bench.app, dsn), working(bench.app, dsn):
        await eventually(lambda: where(db, *ids), ["running"] + ["after"] * 99)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ids[0])
        await eventually(lambda: where(db, *ids), ["cancelled"] * 100)
    assert not await db.fetchval(LEFT)


async def test_one_of_a_type_that_is_too_long_fails(bench: Bench, db: Any, dsn: str) -> None:
    """The tasks that wait for it are told at most as much of the type as a type may have."""
    bad = await db.fetchval("INSERT INTO notifyq.task (type) SELECT repeat('x', 1000000) RETURNING id")
    one = await bench.app.enqueue(Step("one"), after=[bad])
    anyway = await bench.app.enqueue(Sum(), after=[bad], on_dead="run")
    async with working(bench.app, dsn):
        await ended(db, one.id, "cancelled")
        await ended(db, anyway.id, "done")
    [error] = await errors(db, one.id)
    assert error["error"] == f"task {bad} ({'x' * 200}), which it was to run after, is dead"
    why = "its type is longer than 200 characters"
    assert bench.seen.items == [[f"task {bad} ({'x' * 200}) is dead: {why}"]]


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
