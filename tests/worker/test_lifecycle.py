"""A task's life and a worker's: how attempts end and what is kept of them; how a worker stops, and what it leaves."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import msgspec
import pytest

import notifyq
from notifyq.worker import heartbeat, maintenance
from notifyq.worker.backoff import backoff_seconds, ceiling_seconds
from notifyq.worker.capacity import Rate

from ..helpers import verbs
from ..helpers.databases import Sessions, outage
from ..helpers.machine import Probe, limit
from ..helpers.rows import ended, errors, handed_back, nobody_left, state
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually


class Note(notifyq.Task):
    name: str = ""


class Hold(notifyq.Task):
    """Runs until the test says so."""

    name: str = ""


class Fail(notifyq.Task):
    max_attempts = 4
    backoff = 0.02
    why: str = "no luck"


class Say(notifyq.Task):
    """Ends as it is told."""

    verdict: str
    delay: float | None = None
    returned: bool = False


class Slow(notifyq.Task):
    max_attempts = 1
    timeout = 0.1


class SlowThread(notifyq.Task):
    max_attempts = 1
    timeout = 0.25  # in which a thread has begun


class Parent(notifyq.Task):
    children: int


class Bench:
    """An app with a handler for each of these tasks, and what they have done."""

    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()
        self.held = held = Seen()
        self.cancelled = cancelled = Seen()
        self.release = release = anyio.Event()
        self.running: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

        @app.handler
        async def note(task: Note, ctx: notifyq.Context) -> str:
            seen.add(task.name)
            return f"noted {task.name}"

        @app.handler
        async def hold(task: Hold, ctx: notifyq.Context) -> None:
            self.running[ctx.queue] += 1
            self.peak[ctx.queue] = max(self.peak[ctx.queue], self.running[ctx.queue])
            held.add(ctx.id)
            try:
                await release.wait()
            except BaseException:
                cancelled.add(ctx.id)
                raise
            finally:
                self.running[ctx.queue] -= 1

        @app.handler
        async def fail(task: Fail) -> None:
            seen.add(time.monotonic())
            raise ValueError(task.why)

        @app.handler
        async def say(task: Say, ctx: notifyq.Context) -> Any:
            seen.add(ctx.id)
            verdict = {
                "retry": notifyq.Retry(task.delay, "not yet"),
                "cancel": notifyq.Cancel("not wanted"),
                "dead": notifyq.Dead("hopeless"),
            }[task.verdict]
            if task.returned:
                return verdict
            raise verdict

        @app.handler
        async def slow(task: Slow) -> None:
            await anyio.sleep(60)

        @app.handler
        def slow_thread(task: SlowThread) -> None:
            seen.add("in a thread")
            threading.Event().wait(0.5)

        @app.handler
        async def parent(task: Parent) -> None:
            seen.add("parent")
            await anyio.sleep(0.2)  # nothing is runnable meanwhile, and yet it isn't over
            await app.enqueue_many([Note(str(n)) for n in range(task.children)])


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    """Connected, so that tests and handlers can enqueue."""
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


# A worker stops.


async def test_stop_lets_handlers_end_and_writes_their_outcomes(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn, shutdown_timeout=30) as worker:
        ids = await bench.app.enqueue_many([Hold() for _ in range(5)])
        await bench.held.reach(5)
        worker.stop.set()
        late = await bench.app.enqueue(Note("after the stop"))
        await anyio.sleep(0.1)
        assert not worker.done.is_set(), "it waits for its handlers"
        bench.release.set()
        await worker.stopped()
    assert [await state(db, id) for id in ids] == ["done"] * 5
    assert not bench.cancelled.items
    assert await state(db, late.id) == "ready", "it claimed nothing more"
    assert await nobody_left(db)


async def test_what_waits_its_turn_in_the_worker_is_handed_back_at_once(
    bench: Bench, db: Any, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed ahead of the slots and not begun, at the stop: ready for others while a handler still runs here."""
    # As on an idle machine, which runs so many short tasks a second.
    monkeypatch.setattr(Rate, "ahead", lambda rate, now, finished: 50)
    async with working(bench.app, dsn, concurrency=1, shutdown_timeout=3600) as worker:
        await bench.app.enqueue_many([*(Note() for _ in range(600)), *(Hold() for _ in range(100))])
        [first] = await bench.held.reach(1)
        claimed = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"
        assert await db.fetchval(claimed) > 1, "it claims ahead of one slot when tasks are short"
        worker.stop.set()
        await eventually(lambda: db.fetchval(claimed), 1)
        others = [row[0] for row in await db.fetch("SELECT id FROM notifyq.task WHERE id <> $1", first)]
        assert await handed_back(db, *others)
        assert not worker.done.is_set()
        bench.release.set()
        await worker.stopped()
    assert await state(db, first) == "done"


async def test_at_the_deadline_tasks_are_handed_back_without_burning_an_attempt(
    bench: Bench, db: Any, dsn: str
) -> None:
    async with working(bench.app, dsn, shutdown_timeout=0.2) as worker:
        ids = await bench.app.enqueue_many([Hold() for _ in range(3)])
        await bench.held.reach(3)
        await worker.stopped()
    assert sorted(bench.cancelled.items) == sorted(ids), "each handler was cancelled"
    assert await handed_back(db, *ids)
    assert await nobody_left(db)
    bench.release.set()
    async with working(bench.app, dsn):
        assert (await ended(db, ids[0], "done"))["attempts"] == 1


async def test_an_attempt_that_fails_because_it_is_stopped_does_not_count(db: Any, dsn: str) -> None:
    """A handler turns its cancellation into an error of its own, as database drivers do."""
    app, begun = notifyq.App(), anyio.Event()

    @app.handler
    async def hold(task: Hold) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        except BaseException:
            raise ConnectionError("cut off") from None

    async with app.connect(dsn), working(app, dsn) as worker:
        id = (await app.enqueue(Hold(), max_attempts=1)).id
        await begun.wait()
        worker.force.set()
        await worker.stopped()
    assert await handed_back(db, id)


async def test_force_hands_back_now(bench: Bench, db: Any, dsn: str) -> None:
    """At once, and also in the middle of a drain that has an hour."""
    for first in ("stop", "force"):
        async with working(bench.app, dsn, shutdown_timeout=3600) as worker:
            id = (await bench.app.enqueue(Hold())).id
            await eventually(lambda: state(db, id), "running")  # noqa: B023 - awaited here
            await bench.held.reach(len(bench.cancelled.items) + 1)
            getattr(worker, first).set()
            await anyio.sleep(0.05)
            worker.force.set()
            with anyio.fail_after(limit()):
                await worker.done.wait()
        assert await handed_back(db, id)
        assert await db.fetchval("SELECT notifyq.cancel($1)", id)


async def test_cancelling_run_worker_hands_everything_back(bench: Bench, db: Any, dsn: str) -> None:
    async with anyio.create_task_group() as group:
        await group.start(
            lambda *, task_status: bench.app.run_worker(dsn=dsn, poll_interval=0, task_status=task_status)
        )
        ids = await bench.app.enqueue_many([Hold() for _ in range(3)])
        await bench.held.reach(3)
        group.cancel_scope.cancel()
    assert await handed_back(db, *ids)
    assert await nobody_left(db)


async def test_an_outcome_on_its_way_survives_the_cancellation(
    bench: Bench, db: Any, dsn: str, connect: Sessions
) -> None:
    """It ran to its end, and its row is locked by somebody while the worker is cancelled: done, and not run again."""
    async with anyio.create_task_group() as group:
        await group.start(
            lambda *, task_status: bench.app.run_worker(dsn=dsn, poll_interval=0, task_status=task_status)
        )
        id = (await bench.app.enqueue(Hold())).id
        await bench.held.reach(1)
        other = await connect()
        transaction = other.transaction()
        await transaction.start()
        await other.fetchval("SELECT id FROM notifyq.task FOR UPDATE")
        bench.release.set()
        waits = """SELECT pid FROM pg_stat_activity WHERE application_name = 'notifyq settle'
                   AND wait_event_type = 'Lock' AND datname = current_database()"""
        await eventually(lambda: db.fetchval(f"SELECT EXISTS ({waits})"))
        pid = await db.fetchval(waits)
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await eventually(lambda: db.fetchval(f"SELECT EXISTS ({waits} AND pid <> $1)", pid))  # it tries again
            await db.execute("SELECT pg_terminate_backend($1)", pid)  # the first doesn't know that it was cut off
            await transaction.commit()
    assert await state(db, id) == "done"


async def test_a_handler_that_will_not_be_cancelled_cannot_keep_the_worker(db: Any, dsn: str, logged: Any) -> None:
    """It swallows every cancellation: at the deadline its task is handed back, and the worker is gone in time."""
    app, begun, over = notifyq.App(), anyio.Event(), anyio.Event()

    @app.handler
    async def stubborn(task: Hold) -> None:
        begun.set()
        while not over.is_set():
            try:
                await over.wait()
            except BaseException:
                pass  # the mistake that this is about

    try:
        async with app.connect(dsn), working(app, dsn, shutdown_timeout=0.1) as worker:
            id = (await app.enqueue(Hold())).id
            await begun.wait()
            worker.stop.set()
            with anyio.move_on_after(limit(10)):
                await worker.done.wait()
            in_time = worker.done.is_set()
            over.set()
    finally:
        over.set()
    assert in_time
    assert await handed_back(db, id)
    assert logged("didn't end when cancelled")


async def test_it_ends_in_time_without_a_database(bench: Bench, dsn: str, probe: Probe) -> None:
    """Stopped or cancelled while handlers run: the deadline, 2 s to cancel, 3 to write, 4 for a good-bye at most."""
    ended: dict[str, anyio.Event] = {"stop": anyio.Event(), "cancel": anyio.Event()}
    stop, cancel = anyio.Event(), anyio.CancelScope()

    async def run(how: str, *, task_status: Any) -> None:
        with cancel if how == "cancel" else anyio.CancelScope():
            await bench.app.run_worker(
                [how], dsn=dsn, poll_interval=0, shutdown_timeout=0.3, stop=stop, task_status=task_status
            )
        ended[how].set()

    async with anyio.create_task_group() as group:
        for how in ended:
            await group.start(run, how)
            await bench.app.enqueue(Hold(), queue=how)
        await bench.held.reach(2)
        async with outage(dsn):
            stop.set()
            cancel.cancel()
            with probe.within(10.3):
                await ended["stop"].wait()
                await ended["cancel"].wait()


async def test_drain_returns_when_nothing_is_runnable(bench: Bench, db: Any, dsn: str) -> None:
    """What handlers enqueue is run too; what is due later is not waited for."""
    parent = await bench.app.enqueue(Parent(50))
    again = await bench.app.enqueue(Say("retry", 3600))
    later = await bench.app.enqueue(Note("tomorrow"), delay=86400)
    with anyio.fail_after(limit()):
        await bench.app.run_worker(dsn=dsn, drain=True, poll_interval=0)
    assert await state(db, parent.id) == "done"
    assert bench.seen.items.count("parent") == 1
    assert len(bench.seen.items) == 52
    assert [await state(db, ref.id) for ref in (again, later)] == ["scheduled", "scheduled"]
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 2
    assert await nobody_left(db)
    with anyio.fail_after(limit()):
        await bench.app.run_worker(dsn=dsn, drain=True, poll_interval=0)  # nothing at all to do


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
    """As often as its class says, or its row if it does; each attempt's error is kept, with the traceback's tail."""
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
    assert all("test_lifecycle.py" in error["traceback"] and error["at"] for error in kept)


@pytest.mark.parametrize("most", [0, -5])
async def test_below_one_is_one_attempt(bench: Bench, db: Any, dsn: str, most: int) -> None:
    """Of an INSERT: it runs once, is told so, and its first failure is its last."""

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


async def test_a_type_that_nobody_can_have(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """Longer than a type may be, it is dead, and kept whole. One that somebody may know one day is set aside."""
    insert = "INSERT INTO notifyq.task (type) VALUES (repeat($1, $2)) RETURNING id"
    long = {length: await db.fetchval(insert, "\U0001f600", length) for length in (201, 1_000_000)}
    unknown, good = await db.fetchval(insert, "\U0001f600", 200), await db.fetchval(insert, "Note", 1)
    async with working(bench.app, dsn) as worker:
        for id in long.values():
            row = await ended(db, id, "dead")
            assert (row["attempts"], row["worker"]) == (1, worker.info.name)
            assert row["error"] == "its type is longer than 200 characters"
        await ended(db, good, "done")
        aside = "SELECT withheld AND worker IS NULL AND attempts = 0 FROM notifyq.task WHERE id = $1"
        await eventually(lambda: db.fetchval(aside, unknown))
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
    """An async handler is cancelled, a plain one's thread left alone; either way the attempt has failed."""
    async with working(bench.app, dsn):
        refs = [(await bench.app.enqueue(task), task.timeout) for task in (Slow(), SlowThread())]
        for ref, timeout in refs:
            assert (await ended(db, ref.id, "dead"))["error"] == f"timed out after {timeout} s"
        await bench.app.enqueue(Note("next"))
        assert (await bench.seen.reach(2))[-1] == "next"


async def test_threads_that_were_left_alone_are_not_in_the_way(bench: Bench, db: Any, dsn: str) -> None:
    """As many as there are slots are stuck past their timeout; the next plain handler runs all the same."""
    async with working(bench.app, dsn, concurrency=2):
        stuck = await bench.app.enqueue_many([SlowThread() for _ in range(6)])
        for id in stuck:
            await ended(db, id, "dead")
        assert len(bench.seen.items) == 6, "each of them has begun"


async def test_threads_that_were_left_alone_are_told(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """Nothing can end them, so the log and `stats` say when they are as many as there are slots; once, and the end."""
    app, over = notifyq.App(), threading.Event()

    @app.handler
    def slow_thread(task: SlowThread) -> None:
        over.wait(60)

    try:
        async with working(app, dsn, concurrency=2):
            for id in await bench.app.enqueue_many([SlowThread() for _ in range(3)]):
                await ended(db, id, "dead")
            status = "SELECT status FROM notifyq.worker"
            await eventually(lambda: db.fetchval(status), "3 threads left alone")
            over.set()
            await eventually(lambda: db.fetchval(status), "ok")
    finally:
        over.set()
    [told] = logged("left alone and still run")
    assert told["handler"].endswith("slow_thread")
    assert len(logged("that were left alone have ended")) == 1


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
    """As long as it doesn't know its tasks to be short: a task that waits here could run in another worker."""
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


# What a worker sees to now and then. All of it is due at once here.


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for chore in (*maintenance.PRUNING, maintenance.RECLAIM_UNOWNED, maintenance.RECHECK_WAITING):
        monkeypatch.setattr(chore, "every", 0.0)
    for name in ("ASK_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(heartbeat, name, 0.02)


@pytest.mark.usefixtures("at_once")
async def test_a_worker_forgets_what_ended_long_ago(bench: Bench, db: Any, dsn: str) -> None:
    await verbs.finish(db, await verbs.held(db, 2))
    old, new = [row[0] for row in await db.fetch("SELECT id FROM notifyq.finished ORDER BY id")]
    await db.execute("UPDATE notifyq.finished SET processed_at = now() - interval '1 h' WHERE id = $1", old)
    async with working(bench.app, dsn, history=60):
        await eventually(lambda: db.fetchval("SELECT array_agg(id) FROM notifyq.finished"), [new])


@pytest.mark.usefixtures("at_once")
async def test_a_worker_finds_tasks_of_workers_that_are_gone(bench: Bench, db: Any, dsn: str) -> None:
    """Such as one that was rescued while its claim was under way: no heartbeat tells of it."""
    await db.execute("INSERT INTO notifyq.task (type, payload, worker) VALUES ('Note', '{\"name\": \"a\"}', 4711)")
    async with working(bench.app, dsn):
        assert await bench.seen.reach(1) == ["a"]


@pytest.mark.usefixtures("at_once")
async def test_a_worker_looks_again_at_keys_where_tasks_wait(bench: Bench, db: Any, dsn: str) -> None:
    """A task waits for a slot, and nothing has told that the slot is free."""
    options = '{"limit_key": "k", "limit_running": 1}'
    jobs = await verbs.held(db, 2, type="Note", options=options)
    assert [why for _, why in await verbs.admit(db, jobs)] == [None, "limit"]
    await verbs.finish(db, jobs[:1])
    await db.execute("DELETE FROM notifyq.slot_released")
    async with working(bench.app, dsn):
        await eventually(lambda: state(db, jobs[1].id), "done")


# A person steps in.


async def test_cancelling_a_running_task_cancels_its_handler(bench: Bench, db: Any, dsn: str) -> None:
    """At the next heartbeat, which is every 1.5 s; its slot is free then. A dead one can be retried meanwhile."""
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


# Enqueue.


async def test_in_the_callers_transaction(bench: Bench, db: Any, dsn: str, connect: Sessions) -> None:
    """Rolled back, it never existed; committed, it runs, and not before."""
    conn = await connect()
    async with working(bench.app, dsn):
        for outcome in ("rollback", "commit"):
            transaction = conn.transaction()
            await transaction.start()
            await bench.app.enqueue(Note(outcome), conn=conn)
            await bench.app.enqueue_many([Note(outcome)] * 2, conn=conn)
            await bench.app.enqueue(Note(f"beside {outcome}"))
            await bench.seen.reach(1 if outcome == "rollback" else 2)
            await getattr(transaction, outcome)()
        await bench.seen.reach(5)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), 5)
    assert bench.seen.items == ["beside rollback", "beside commit", "commit", "commit", "commit"]
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 5


async def test_a_hundred_thousand_in_one_call(bench: Bench, db: Any) -> None:
    """All or none, and the ids come in the order of the tasks."""
    ids = await bench.app.enqueue_many((Note(str(n)) for n in range(100_000)), queue="bulk", priority=3)
    assert len(set(ids)) == 100_000
    for n in (0, 1, 54_321, 99_999):
        row = await db.fetchrow("SELECT payload ->> 'name', queue, priority FROM notifyq.task WHERE id = $1", ids[n])
        assert tuple(row) == (str(n), "bulk", 3)
    assert await bench.app.enqueue_many([]) == []


class Typed(notifyq.Task):
    n: int
    tags: list[str] = msgspec.field(default_factory=list)


typed: Any = Typed  # which takes anything, as a caller without a type checker may


class Other(notifyq.Task, tag="Note"):
    pass


class Large(notifyq.Task):
    text: str = msgspec.field(default_factory=lambda: "x" * 17_000_000)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (typed(n="x"), {}, r"Typed .*Expected `int`, got `str` - at `\$.n`"),
    (typed(n=1, tags=["a", 5]), {}, r"at `\$.tags\[1\]`"),
    (typed(n=object()), {}, "Typed can't be written as JSON"),
    (Note("a\x00b"), {}, "Note: PostgreSQL can't store this payload"),
    (Note("\ud800"), {}, "Note can't be written as JSON"),
    (Large(), {}, "17,000,0.. bytes, the limit is 16,777,216"),
    (Other(), {}, "type 'Note' is Note in this app, and not Other"),
    ({"n": 1}, {}, "expected an instance of a subclass of notifyq.Task"),
    (Note(), {"queue": ""}, "expected 1 to 200 characters"),
    (Note(), {"queue": "q" * 201}, "expected 1 to 200 characters"),
    (Note(), {"queue": "a\x00"}, "none of them NUL"),
    (Note(), {"delay": -1}, "delay is -1"),
    (Note(), {"delay": float("nan")}, "delay is nan"),
    (Note(), {"delay": "5"}, "delay is '5'"),
    (Note(), {"run_at": datetime(2030, 1, 1)}, "with a timezone"),  # noqa: DTZ001 - the mistake
    (Note(), {"run_at": datetime.now(UTC), "delay": 1}, "both given"),
    (Note(), {"priority": 40_000}, "priority is 40000"),
    (Note(), {"priority": 1.5}, "priority is 1.5"),
    (Note(), {"max_attempts": 0}, "max_attempts is 0"),
]


async def test_what_cannot_be_is_refused_before_it_is_sent(bench: Bench, db: Any) -> None:
    """And names the task or the option; in enqueue_many one refuses them all."""
    for task, options, message in REFUSED:
        with pytest.raises(notifyq.ConfigError, match=message):
            await bench.app.enqueue(task, **options)
        with pytest.raises(notifyq.ConfigError, match=message):
            await bench.app.enqueue_many([Note(), task], **options)
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0


async def test_enqueue_says_what_is_missing(empty_dsn: str) -> None:
    """A connection; a schema."""
    bench = Bench()
    with pytest.raises(notifyq.ConfigError, match="not connected"):
        await bench.app.enqueue(Note())
    async with bench.app.connect(empty_dsn):
        with pytest.raises(notifyq.SchemaError, match="notifyq migrate"):
            await bench.app.enqueue(Note())
