"""How a worker stops: what it waits for, what it hands back, and what it writes before it leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database.connection import Connection, connect_worker
from notifyq.worker import claim
from notifyq.worker.capacity import Rate

from ..helpers.databases import Sessions, outage
from ..helpers.lifecycle import Bench, Hold, Note, Parent, Say
from ..helpers.machine import Probe, limit
from ..helpers.rows import ended, handed_back, nobody_left, state
from ..helpers.running import working
from ..helpers.waiting import eventually


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
    """Tasks that were claimed ahead of the slots haven't begun at the stop. They are ready for other workers while a
    handler still runs here."""
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
    """It does so at once, and also in the middle of a drain that has an hour."""
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
    """The handler has ended, and a session has locked the task's row while the worker is cancelled: the task is done,
    and doesn't run again."""
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
    """The worker is stopped or cancelled while handlers run. It may take the deadline, 2 s to cancel, 3 to write, and 4
    for its last statements."""
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
    """Tasks that handlers enqueue are run too; the drain doesn't wait for those that are due later."""
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


async def test_a_drain_runs_tasks_that_come_or_are_due_while_a_handler_runs(bench: Bench, db: Any, dsn: str) -> None:
    """The handler may wait for them. The drain isn't told of either, and it has looked in vain for a while."""
    rests = """SELECT state = 'idle' AND clock_timestamp() - state_change > '0.2 s' FROM pg_stat_activity
               WHERE application_name LIKE 'notifyq claims %' AND datname = current_database()"""
    await bench.app.enqueue(Hold())
    await bench.app.enqueue(Note("due"), delay=0.5)
    async with working(bench.app, dsn, drain=True) as worker:
        await bench.held.reach(1)
        assert await bench.seen.reach(1) == ["due"]
        await eventually(lambda: db.fetchval(rests))
        await bench.app.enqueue(Note("child"))
        assert await bench.seen.reach(2) == ["due", "child"]
        assert not worker.done.is_set()
        bench.release.set()
        with anyio.fail_after(limit()):
            await worker.done.wait()
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0


async def test_a_connection_that_fails_to_close_leaves_no_other_open(
    bench: Bench, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Connection] = []
    close = asyncpg.Connection.close

    async def note(*args: Any, **options: Any) -> Connection:
        opened.append(await connect_worker(*args, **options))
        return opened[-1]

    async def fail(conn: Any, **options: Any) -> None:
        await close(conn, **options)
        if conn in opened:
            raise asyncpg.InterfaceError("cut")

    monkeypatch.setattr(claim, "connect_worker", note)
    monkeypatch.setattr(asyncpg.Connection, "close", fail)
    async with working(bench.app, dsn) as worker:
        await worker.stopped()
        assert [conn.is_closed() for conn in opened] == [True, True]


async def test_a_drain_has_no_connection_at_the_bell(bench: Bench, db: Any, dsn: str) -> None:
    await bench.app.enqueue(Hold())
    async with working(bench.app, dsn, drain=True):
        await bench.held.reach(1)
        names = await db.fetch("SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
        kinds = {row[0].split()[1] for row in names if row[0].startswith("notifyq ")}
        assert {"claims", "heartbeat"} <= kinds
        assert "bell" not in kinds
        bench.release.set()
