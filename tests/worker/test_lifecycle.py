"""A task's life: how attempts end, what is kept of them, and in which order tasks start."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import notifyq
from notifyq.worker.backoff import backoff_seconds, ceiling_seconds

from ..helpers.lifecycle import Bench, Fail, Hold, Note, Say, Slow, SlowThread
from ..helpers.rows import ended, errors, state
from ..helpers.running import working
from ..helpers.waiting import eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    """Connected, so that tests and handlers can enqueue."""
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


# A task ends.


async def test_result_and_times_are_kept(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn) as worker:
        row = await ended(db, (await bench.app.enqueue(Note("x"))).id, "done")
    assert msgspec.json.decode(row["result"]) == "noted x"
    assert row["created_at"] <= row["processing_at"] <= row["processed_at"]
    assert row["worker"] == worker.info.name
    assert row["attempts"] == 1
    assert row["error"] is None


async def test_a_failing_task_is_tried_again_until_it_is_dead(bench: Bench, db: Any, dsn: str) -> None:
    """It has as many attempts as its row says, or else its class. Each attempt's error is kept, with the traceback's
    tail."""
    async with working(bench.app, dsn):
        four = (await bench.app.enqueue(Fail())).id
        two = (await bench.app.enqueue(Fail("worse"), max_attempts=2)).id
        assert (await ended(db, four, "dead"))["attempts"] == 4
        row = await ended(db, two, "dead")
    assert row["attempts"] == 2
    assert row["error"] == "ValueError: worse"
    assert msgspec.json.decode(row["payload"]) == {"why": "worse"}
    kept = await errors(db, four)
    assert [error["attempt"] for error in kept] == [1, 2, 3, 4]
    assert all("lifecycle.py" in error["traceback"] and error["at"] for error in kept)


@pytest.mark.parametrize("most", [0, -5])
async def test_below_one_is_one_attempt(bench: Bench, db: Any, dsn: str, most: int) -> None:
    """An INSERT asks for fewer than one attempt: the task runs once, sees that it has one, and its first failure is its
    last."""

    class Once(notifyq.Task):
        pass

    @bench.app.handler
    async def once(task: Once, ctx: notifyq.Context) -> None:
        bench.seen.add(ctx.max_attempts)
        raise ValueError("no luck")

    insert = "INSERT INTO notifyq.task (type, max_attempts) VALUES ($1, $2) RETURNING id"
    async with working(bench.app, dsn):
        bad, good = [await db.fetchval(insert, type, most) for type in ("Once", "Note")]
        row = await ended(db, bad, "dead")
        await ended(db, good, "done")
    assert (row["attempts"], row["max_attempts"], row["error"]) == (1, most, "ValueError: no luck")
    assert len(await errors(db, bad)) == 1
    assert sorted(bench.seen.items, key=str) == ["", 1]


async def test_a_type_that_no_worker_can_have(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """A type that is longer than a type may be is dead, and kept whole. One that a worker may know one day stays
    unhandled."""
    insert = "INSERT INTO notifyq.task (type) VALUES (repeat($1, $2)) RETURNING id"
    long = {length: await db.fetchval(insert, "\U0001f600", length) for length in (201, 1_000_000)}
    unknown, good = await db.fetchval(insert, "\U0001f600", 200), await db.fetchval(insert, "Note", 1)
    async with working(bench.app, dsn) as worker:
        for id in long.values():
            row = await ended(db, id, "dead")
            assert (row["attempts"], row["worker"]) == (1, worker.info.name)
            assert row["error"] == "its type is longer than 200 characters"
        await ended(db, good, "done")
        is_unhandled = "SELECT withheld AND worker IS NULL AND attempts = 0 FROM notifyq.task WHERE id = $1"
        await eventually(lambda: db.fetchval(is_unhandled, unknown))
    for length, id in long.items():
        assert await db.fetchval("SELECT length(type) FROM notifyq.all_tasks WHERE id = $1", id) == length
    told = logged("task dead")
    assert sorted(fields["id"] for fields in told) == sorted(long.values())
    assert {fields["type"] for fields in told} == {"\U0001f600" * 40 + "..."}
    assert bench.seen.items == [""]


def test_backoff_is_exponential_with_full_jitter() -> None:
    assert [ceiling_seconds(n, 2.0) for n in (1, 2, 3, 4, 5)] == [2, 4, 8, 16, 32]
    assert ceiling_seconds(32767, 2.0) == ceiling_seconds(12, 2.0) == 3600
    drawn = [backoff_seconds(3, 2.0) for _ in range(2000)]
    assert 0 <= min(drawn) < 0.5
    assert 7.5 < max(drawn) <= 8
    assert 3.6 < sum(drawn) / len(drawn) < 4.4
    assert backoff_seconds(5, 0.0) == 0


@pytest.mark.parametrize("returned", [True, False], ids=["returned", "raised"])
async def test_verdicts(bench: Bench, db: Any, dsn: str, returned: bool) -> None:
    """Retry, Cancel and Dead mean the same, returned or raised."""
    enqueue = bench.app.enqueue
    async with working(bench.app, dsn):
        cancelled = await enqueue(Say("cancel", returned=returned))
        dead = await enqueue(Say("dead", returned=returned))
        later = await enqueue(Say("retry", 3600, returned))
        now = await enqueue(Say("retry", 0, returned), max_attempts=3)
        assert (await ended(db, cancelled.id, "cancelled"))["error"] == "not wanted"
        row = await ended(db, dead.id, "dead")
        assert (row["error"], row["attempts"]) == ("hopeless", 1), "no further attempt, although it has ten"
        row = await ended(db, later.id, "scheduled")
        assert row["attempts"] == 1
        assert timedelta(minutes=59) < row["run_at"] - datetime.now(UTC) < timedelta(minutes=61)
        row = await ended(db, now.id, "dead")
        assert row["attempts"] == 3
        assert [error["error"] for error in await errors(db, now.id)] == ["not yet"] * 3
    assert bench.seen.items.count(now.id) == 3


async def test_timeouts(bench: Bench, db: Any, dsn: str) -> None:
    """An async handler is cancelled, and a plain one's thread abandoned. Either way the attempt has failed."""
    async with working(bench.app, dsn):
        refs = [(await bench.app.enqueue(task), task.timeout) for task in (Slow(), SlowThread())]
        for ref, timeout in refs:
            assert (await ended(db, ref.id, "dead"))["error"] == f"timed out after {timeout} s"
        await bench.app.enqueue(Note("next"))
        assert (await bench.seen.reach(2))[-1] == "next"


async def test_threads_that_were_left_alone_are_not_in_the_way(bench: Bench, db: Any, dsn: str) -> None:
    """As many threads as there are slots are stuck past their timeout. The next plain handler runs all the same."""
    async with working(bench.app, dsn, concurrency=2):
        stuck = await bench.app.enqueue_many([SlowThread() for _ in range(6)])
        for id in stuck:
            await ended(db, id, "dead")
        assert len(bench.seen.items) == 6, "each of them has begun"


@pytest.mark.usefixtures("quick_heart")
async def test_threads_that_were_left_alone_are_told(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """No code can end them. So the log and `stats` say once when they are as many as there are slots, and when they
    have ended."""
    app, over = notifyq.App(), threading.Event()

    @app.handler
    def slow_thread(task: SlowThread) -> None:
        over.wait(60)

    try:
        async with working(app, dsn, concurrency=2):
            for id in await bench.app.enqueue_many([SlowThread() for _ in range(3)]):
                await ended(db, id, "dead")
            status = "SELECT status FROM notifyq.worker"
            await eventually(lambda: db.fetchval(status), "3 abandoned threads")
            over.set()
            await eventually(lambda: db.fetchval(status), "ok")
    finally:
        over.set()
    [told] = logged("abandoned threads still run")
    assert told["handler"].endswith("slow_thread")
    assert len(logged("the abandoned threads have ended")) == 1


async def test_priorities_and_then_age_decide_the_order(bench: Bench, db: Any, dsn: str) -> None:
    await db.execute(
        """INSERT INTO notifyq.task (type, priority, payload)
           SELECT 'Note', (n * 7 % 5)::smallint - 2,
                  jsonb_build_object('name', (n * 7 % 5 - 2) || ' ' || to_char(n, 'FM000'))
           FROM generate_series(1, 200) AS n"""
    )
    async with working(bench.app, dsn, concurrency=1):
        order = await bench.seen.reach(200)
    by_priority = [(-int(name.split()[0]), int(name.split()[1])) for name in order]
    assert by_priority == sorted(by_priority)


async def test_a_worker_claims_no_more_than_it_has_slots_for(bench: Bench, db: Any, dsn: str) -> None:
    """This holds while it doesn't know its tasks to be short: a task that waits here could run in another worker."""
    await bench.app.enqueue_many([Hold() for _ in range(10)])
    async with working(bench.app, dsn, concurrency=3):
        await bench.held.reach(3)
        assert await db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL") == 3
        bench.release.set()


async def test_queues_are_served_in_turn(bench: Bench, dsn: str) -> None:
    """A backlog in the first queue keeps no task of the second waiting until it is over."""
    for queue in ("a", "b"):
        await bench.app.enqueue_many([Note(queue) for _ in range(20)], queue=queue)
    async with working(bench.app, dsn, queues=["a", "b"], concurrency=1):
        order = await bench.seen.reach(40)
    assert set(order[:3]) == {"a", "b"}


async def test_a_queue_takes_no_more_than_its_limit(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn, queues=["two:2", "free"], concurrency=8):
        await bench.app.enqueue_many([Hold() for _ in range(20)], queue="two")
        await bench.held.reach(2)
        await bench.app.enqueue_many([Hold() for _ in range(20)], queue="free")
        await bench.held.reach(8)
        assert bench.running == {"two": 2, "free": 6}, "a full queue does not keep another waiting"
        bench.release.set()
        done = "SELECT count(*) FROM notifyq.finished WHERE state = 'done'"
        await eventually(lambda: db.fetchval(done), 40)
    assert bench.peak["two"] == 2
    assert bench.peak["free"] <= 8


# A person steps in.


@pytest.mark.usefixtures("quick_heart")
async def test_cancelling_a_running_task_cancels_its_handler(bench: Bench, db: Any, dsn: str) -> None:
    """The next heartbeat cancels it; then its slot is free. A dead task can be retried meanwhile."""
    async with working(bench.app, dsn, concurrency=1, queues=["default:1"]), working(bench.app, dsn, queues=["b"]):
        id = (await bench.app.enqueue(Hold())).id
        await bench.held.reach(1)
        assert await db.fetchval("SELECT notifyq.cancel($1)", id)
        assert not await db.fetchval("SELECT notifyq.cancel($1)", id), "there is nothing left to cancel"
        assert await state(db, id) == "cancelled"
        dead = (await bench.app.enqueue(Say("dead"), queue="b")).id
        for runs in (1, 2):
            await ended(db, dead, "dead")
            assert bench.seen.items.count(dead) == runs
            if runs == 1:
                assert await db.fetchval("SELECT notifyq.retry($1)", dead)
        row = await ended(db, dead, "dead")
        assert row["attempts"] == 1, "it started over"
        assert len(await errors(db, dead)) == 2, "and what went wrong before is still told"
        assert await bench.cancelled.reach(1, 4) == [id]
        await bench.app.enqueue(Note("next"))
        await bench.seen.reach(3, 4)
    assert await state(db, id) == "cancelled", "what became of its handler changed nothing"
    assert not await db.fetchval("SELECT notifyq.retry(0)")


async def test_history_0_keeps_only_the_dead(bench: Bench, db: Any, dsn: str) -> None:
    enqueue = bench.app.enqueue
    async with working(bench.app, dsn, history=0):
        refs = [await enqueue(task) for task in (Note(), Say("cancel"), Say("dead"))]
        await ended(db, refs[2].id, "dead")
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.all_tasks"), 1)
