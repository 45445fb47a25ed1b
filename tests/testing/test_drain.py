"""drain and advance: tasks run in the test, and the clock moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

import notifyq
from notifyq.database import connection
from notifyq.errors import ConfigError
from notifyq.testing import (
    Drained,
    advance,
    drain,
    enqueued,
)

from ..helpers.kit import NOW, Act, Chain, Unhandled, app, contexts
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen


@pytest.fixture
async def connected(dsn: str) -> AsyncIterator[notifyq.App]:
    async with app.connect(dsn):
        yield app


async def test_drain_runs_what_handlers_enqueue(connected: notifyq.App) -> None:
    """It serves all queues. Nothing is left, and nothing is counted twice."""
    await app.enqueue(Chain(left=3))
    assert await drain(app) == Drained(done=4)
    assert await enqueued(app, Chain) == []
    assert await drain(app) == Drained()


async def test_drain_leaves_what_is_not_for_it(connected: notifyq.App) -> None:
    """Tasks of other queues, of unknown types, or for later."""
    await app.enqueue(Act(), queue="other")
    await app.enqueue(Unhandled())
    await app.enqueue(Act(), delay=3600)
    await app.enqueue(Act())
    assert await drain(app, queues=["default"]) == Drained(done=1)
    assert [len(await enqueued(app, Act, queue=queue)) for queue in ("default", "other")] == [1, 1]
    assert await drain(app) == Drained(done=1)
    assert len(await enqueued(app, Unhandled)) == 1


async def test_drain_with_scheduled(connected: notifyq.App) -> None:
    """It goes from one time to the next: retries to their end, and what scheduled tasks schedule."""
    await app.enqueue(Act(how="raise"))
    await app.enqueue(Act(how="once"), delay=86400 * 400)
    await app.enqueue(Chain(left=2, delay=3600.0), delay=60)
    assert await drain(app) == Drained(retry=1)
    contexts.clear()
    assert await drain(app, with_scheduled=True) == Drained(done=4, dead=1)
    assert [ctx.attempt for ctx in contexts] == [2, 3, 1, 2]


async def test_drain_connects_for_handlers(dsn: str) -> None:
    async with app.connect(dsn):
        await app.enqueue(Chain(left=1))
    assert await drain(app, dsn) == Drained(done=2)


async def test_drain_goes_by_no_cron(dsn: str) -> None:
    """There is a slot each second, and each one that was enqueued ahead would be one more to run."""
    own, seen = notifyq.App(), Seen()

    @own.cron("* * * * * *")
    @own.handler
    async def act(task: Act) -> None:
        seen.add(task)

    async with own.connect(dsn):
        await own.enqueue(Act())
        assert await drain(own, with_scheduled=True) == Drained(done=1)
        async with working(own, dsn):
            await seen.reach(2)


async def test_drain_that_has_no_end(connected: notifyq.App) -> None:
    await app.enqueue(Chain(left=1_000_000, delay=3600.0))
    with pytest.raises(AssertionError, match=r"after [\d.]+ s there are still tasks to run; .*done=[1-9]"):
        await drain(app, with_scheduled=True, timeout=1.0)


async def test_advance_makes_due_what_would_be(connected: notifyq.App) -> None:
    for delay in (60, 120, 7200):
        await app.enqueue(Act(), delay=delay)
    assert await advance(app, 59) == 0
    assert await drain(app) == Drained()
    assert await advance(app, 2) == 1
    assert await advance(app, 0) == 0
    assert await drain(app) == Drained(done=1)
    assert await advance(app, 7200) == 2
    assert await drain(app) == Drained(done=2)


async def test_advance_keeps_the_time_between(connected: notifyq.App, dsn: str) -> None:
    """All of a row's times move alike, also those of finished tasks."""
    await app.enqueue(Act(how="dead"))
    await app.enqueue(Act(how="raise"))
    await drain(app)
    await app.enqueue(Act(), run_at=NOW, queue="later")
    db = await connection.connect(dsn)
    times = "SELECT id, created_at, run_at, processing_at, processed_at, state FROM notifyq.all_tasks ORDER BY id"
    before = await db.fetch(times)
    await advance(dsn, 1000)
    after = await db.fetch(times)
    await db.close()
    assert len(after) == 3
    for old, new in zip(before, after, strict=True):
        assert new["state"] == old["state"]
        for name in ("created_at", "run_at", "processing_at", "processed_at"):
            assert new[name] == (None if old[name] is None else old[name] - timedelta(seconds=1000)), name
    assert len(await enqueued(app, Act, queue="later", delay=(NOW - before[2]["created_at"]).total_seconds())) == 1


async def test_advance_wakes_a_worker(connected: notifyq.App, dsn: str) -> None:
    """The bell wakes it: the fallback poll is off."""
    seen, own = Seen(), notifyq.App()

    @own.handler
    async def act(task: Act) -> None:
        seen.add(task)

    async with working(own, dsn):
        await app.enqueue(Act(), delay=3600)
        assert await advance(app, 3601) == 1
        await seen.reach(1)


async def _advance(app: notifyq.App) -> None:
    await advance(app, 40.5)
    await advance(app, 30)
    await drain(app)


async def _drain_with_scheduled(app: notifyq.App) -> None:
    await drain(app, with_scheduled=True)


MOVES = pytest.mark.parametrize("let_pass", [_advance, _drain_with_scheduled])


@MOVES
async def test_a_ref_finds_its_task_after_the_clock_moved(connected: notifyq.App, let_pass: Any) -> None:
    ref = await app.enqueue(Act(), delay=60)
    await let_pass(app)
    assert await ref.result(timeout=limit()) == {"number": 7, "at": "2030-01-01T00:00:00Z"}
    assert [step async for step in ref.progress()] == []
    assert await ref.cancel() is False


@MOVES
async def test_a_ref_cancels_its_task_after_the_clock_moved(connected: notifyq.App, let_pass: Any) -> None:
    """It also equals the Ref that enqueue makes of the same task later."""
    ref = await app.enqueue(Unhandled(), unique="k")
    await app.enqueue(Act(), delay=60)
    await let_pass(app)
    again = await app.enqueue(Unhandled(), unique="k")
    assert again.existed
    assert again == ref
    assert again != app.ref(ref.id, NOW.replace(year=9000))
    assert await ref.cancel() is True


async def test_a_ref_sees_that_its_task_expired(connected: notifyq.App) -> None:
    ref = await app.enqueue(Act(), expires=30)
    await advance(app, 31)
    await drain(app)
    with pytest.raises(notifyq.TaskCancelled):
        await ref.result(timeout=limit())


async def test_a_ref_is_of_no_other_task_after_the_clock_moved(connected: notifyq.App, dsn: str) -> None:
    """A task that got the same id was created later, and moves can't hide that."""
    await advance(app, 3600)
    lost = await app.enqueue(Act())
    db = await connection.connect(dsn)
    await db.execute("TRUNCATE notifyq.task RESTART IDENTITY CASCADE")
    await db.close()
    other = await app.enqueue(Act())
    assert lost.id == other.id
    with pytest.raises(notifyq.NotifyqError, match="isn't the one that this Ref is of"):
        await lost.cancel()


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "60"])
async def test_advance_goes_one_way(seconds: Any) -> None:
    with pytest.raises(ConfigError, match="expected seconds, 0 or more"):
        await advance(app, seconds)
