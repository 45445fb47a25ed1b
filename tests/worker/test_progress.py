"""Progress: what a handler reports can be read in the view, and is pushed to callers that wait. A handler that reports
nothing pays nothing."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.client import results
from notifyq.codec import NOTE_LENGTH
from notifyq.database.connection import SQL
from notifyq.testing import run_inline
from notifyq.worker import maintenance
from notifyq.worker.runners import Runners
from notifyq.worker.slots import Slots

from ..helpers import verbs
from ..helpers.databases import Sessions
from ..helpers.garbage import GARBAGE
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.stages import Told
from ..helpers.waiting import Seen, eventually

STEPS = [notifyq.Progress(0.25, "a"), notifyq.Progress(0.5), notifyq.Progress(0.75, "c")]


class Walk(notifyq.Task):
    """Its handler reports a step each time the test lets it."""

    backoff = 0.0


class March(Walk):
    """Its plain handler does the same, in a thread."""


class Race(notifyq.Task):
    times: int = 1000


class Silent(notifyq.Task):
    pass


class Odd(notifyq.Task):
    pass


class Known(notifyq.Task):
    pass


class Bench:
    def __init__(self) -> None:
        self.app = notifyq.App()
        self.go = threading.Semaphore(0)
        self.notes: list[Any] = []

        @self.app.handler
        async def walk(task: Walk, ctx: notifyq.Context) -> None:
            for step in STEPS:
                await ctx.progress(step.fraction, step.note)
                await anyio.to_thread.run_sync(self.go.acquire, abandon_on_cancel=True)

        @self.app.handler
        def march(task: March, ctx: notifyq.Context) -> None:
            for step in STEPS:
                ctx.progress(step.fraction, step.note)
                self.go.acquire()

        @self.app.handler
        async def race(task: Race, ctx: notifyq.Context) -> None:
            for n in range(task.times):
                await ctx.progress(n / task.times)

        @self.app.handler
        async def silent(task: Silent) -> None:
            pass

        @self.app.handler
        async def odd(task: Odd, ctx: notifyq.Context) -> None:
            for note in self.notes:
                await ctx.progress(1, note)
            await anyio.to_thread.run_sync(self.go.acquire, abandon_on_cancel=True)


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
    bench.go.release(1000)


@pytest.fixture
def quick_reports(quick_heart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written every 0.1 s: for tests that wait for one, whenever it is written."""
    monkeypatch.setattr(maintenance.WRITE_PROGRESS, "every", 0.1)


async def told(db: Any) -> Any:
    """The progress of the first task in all_tasks."""
    row = await db.fetchrow("SELECT state, progress, note FROM notifyq.all_tasks ORDER BY id LIMIT 1")
    return tuple(row)


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize("kind", [Walk, March])
async def test_a_caller_that_waits_sees_each_step(bench: Bench, dsn: str, db: Any, kind: type[notifyq.Task]) -> None:
    """Steps of both kinds of handlers are pushed until the task ends, and are in the view meanwhile."""
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(kind())
        seen = []
        with anyio.fail_after(limit()):
            async for step in ref.progress():
                assert await told(db) == ("running", step.fraction, step.note)
                seen.append(step)
                bench.go.release()
        assert seen == STEPS
        assert [step async for step in ref.progress()] == [], "it is over"
        assert await ref.result() is None
        assert await told(db) == ("done", None, None)


@pytest.mark.usefixtures("quick_reports")
async def test_it_is_pushed(bench: Bench, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several callers get it, without the slow look."""
    monkeypatch.setattr(results, "LOOK_SECONDS", 3600.0)
    seen = Seen()

    async def watch() -> None:
        async for step in ref.progress():
            seen.add(step)

    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(Walk())
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(watch)
            for n, step in enumerate(STEPS, 1):
                await seen.reach(3 * n)
                assert seen.items[-3:] == [step] * 3
                bench.go.release()


async def test_a_caller_that_stops_watching_leaves_nothing(bench: Bench, dsn: str) -> None:
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(Walk())
        steps = ref.progress()
        async for step in steps:
            assert step == STEPS[0]
            break
        await steps.aclose()  # type: ignore[attr-defined]
        assert not bench.app.results._waiting
        assert not bench.app.results._watched
        bench.go.release(9)


async def test_only_the_latest_is_written_and_not_often(
    bench: Bench, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of writes doesn't grow with the number of reports. For handlers that report nothing, nothing is
    written."""
    written: list[dict[Any, Any]] = []
    real = maintenance.WRITE_PROGRESS.run

    async def report(conn: Any, upkeep: maintenance.Upkeep) -> bool | None:
        written.append(dict(upkeep.runners.slots.reports))
        return await real(conn, upkeep)

    monkeypatch.setattr(maintenance.WRITE_PROGRESS, "run", report)
    async with working(bench.app, dsn):
        await bench.app.enqueue_many([Silent()] * 500)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), 500)
        assert written == []
        begin = anyio.current_time()
        refs = [await bench.app.enqueue(Race(times=20_000)) for _ in range(5)]
        for ref in refs:
            await ref.result(timeout=limit())
        took = anyio.current_time() - begin
        assert len(written) <= 1 + took / maintenance.WRITE_PROGRESS.every
        assert all(len(reports) <= 5 for reports in written)
    print(f"100,000 calls in {took:.2f} s, {len(written)} writes")


SETTLES = {"retry": verbs.later, "hand back": verbs.hand_back}


@pytest.mark.parametrize("how", [*SETTLES, "release", "rescue"])
async def test_what_ends_an_attempt_ends_its_progress(db: Any, how: str) -> None:
    (job,) = await verbs.held(db)
    await db.fetch(SQL["write_progress"], job.worker, [job.id], [job.attempt], [0.5], ["half"])
    assert await told(db) == ("running", 0.5, "half")
    if how in SETTLES:
        await SETTLES[how](db, [job])
    elif how == "release":
        await verbs.hand_back_all(db, job.worker)
    else:
        await verbs.silent(db, job.worker)
        await verbs.rescue(db, job.worker)
    assert (await told(db))[1:] == (None, None)


async def test_what_has_ended_before_it_was_written_is_not(db: Any) -> None:
    """A handler reports its progress and ends: the heartbeat has nothing left to write."""
    app, settled = notifyq.App(), Seen()

    @app.handler
    async def known(task: Known, ctx: notifyq.Context) -> None:
        await ctx.progress(0.5)
        assert len(runners.slots.reports) == 1

    runners = Runners(app.registry, 1, 1, Told(settled.add))
    async with anyio.create_task_group() as group:
        group.start_soon(runners.run)
        await runners.ready.wait()
        runners.add_jobs(await verbs.held(db))
        [end] = await settled.reach(1)
        assert (end.state, runners.slots.reports) == ("done", {})
        group.cancel_scope.cancel()


async def test_it_is_fenced(db: Any) -> None:
    """Nothing is written for an attempt whose lease the worker has lost, nor for another worker's."""
    mine, lost = await verbs.held(db, 2)
    (other,) = await verbs.held(db)
    jobs = [mine, lost, other]
    attempts = [mine.attempt, lost.attempt + 1, other.attempt]
    rows = await db.fetch(SQL["write_progress"], mine.worker, [job.id for job in jobs], attempts, [0.5] * 3, [None] * 3)
    assert [row["id"] for row in rows] == [mine.id]
    assert [row[0] for row in await db.fetch("SELECT id FROM notifyq.task WHERE progress IS NOT NULL")] == [mine.id]


async def test_a_locked_row_keeps_no_heartbeat(
    bench: Bench, dsn: str, db: Any, connect: Sessions, quick_heart: None
) -> None:
    """The report is written when the row is unlocked again."""
    async with working(bench.app, dsn) as worker:
        ref = await bench.app.enqueue(Walk())
        await eventually(lambda: told(db), ("running", 0.25, "a"))
        someone = await connect()
        await someone.execute("BEGIN")
        await someone.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", ref.id)
        bench.go.release()
        before = await db.fetchval("SELECT seen_at FROM notifyq.worker WHERE id = $1", worker.info.id)
        for _ in range(2):
            later = "SELECT seen_at > $2 FROM notifyq.worker WHERE id = $1"
            await eventually(lambda: db.fetchval(later, worker.info.id, before))  # noqa: B023
            before = await db.fetchval("SELECT seen_at FROM notifyq.worker WHERE id = $1", worker.info.id)
        assert await told(db) == ("running", 0.25, "a")
        await someone.execute("COMMIT")
        await eventually(lambda: told(db), ("running", 0.5, None))
        bench.go.release(9)


NOTES = {
    "long": ("x" * 1_000_000, "x" * NOTE_LENGTH),
    "NUL": ("a\0b", "a\\x00b"),
    "surrogate": ("a\ud800b", "a\\ud800b"),
    "quotes": ("'; DROP TABLE notifyq.task; --", "'; DROP TABLE notifyq.task; --"),
    "empty": ("", ""),
}


@pytest.mark.parametrize("name", NOTES)
async def test_odd_notes(bench: Bench, dsn: str, db: Any, name: str) -> None:
    note, kept = NOTES[name]
    bench.notes = [note]
    async with working(bench.app, dsn):
        await bench.app.enqueue(Odd())
        await eventually(lambda: told(db), ("running", 1.0, kept))
        bench.go.release()


CONTEXT = notifyq.Context(id=1, queue="q", attempt=1, max_attempts=1, priority=0, created_at=datetime.now(UTC))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 40, float("nan"), float("inf"), "0.5", None, True])
def test_what_is_no_fraction(fraction: Any) -> None:
    with pytest.raises(notifyq.ConfigError, match=r"^ctx.progress\(.*\): expected a fraction, from 0 to 1$"):
        CONTEXT.progress(fraction)


@pytest.mark.parametrize("note", [5, b"x", ["x"]])
def test_what_is_no_note(note: Any) -> None:
    with pytest.raises(notifyq.ConfigError, match="expected a str as the note"):
        CONTEXT.progress(0.5, note)


async def test_outside_of_a_worker_it_does_nothing(bench: Bench) -> None:
    await CONTEXT.progress(0.5)
    assert (await run_inline(bench.app, Race(times=5))).state == "done"


async def test_awaiting_it_lets_a_cancellation_in() -> None:
    """A loop that does nothing but report can be cancelled."""
    with anyio.move_on_after(0.05) as scope:
        while True:
            await CONTEXT.progress(0.5)
    assert scope.cancelled_caught


@pytest.mark.usefixtures("quick_reports")
async def test_forged_notifications(bench: Bench, dsn: str, connect: Sessions) -> None:
    """Notifications carry ids and no progress, so a forged one tells no caller anything false."""
    stranger, seen = await connect(), Seen()

    async def watch() -> None:
        async for step in ref.progress():
            seen.add(step)

    async with working(bench.app, dsn), anyio.create_task_group() as group:
        ref = await bench.app.enqueue(Walk())
        group.start_soon(watch)
        await seen.reach(1)
        for payload in (*GARBAGE, str(ref.id), f"{ref.id} 0.99"):
            await stranger.execute("SELECT pg_notify($1, $2)", results.PROGRESS, payload)
        bench.go.release()
        await seen.reach(2)
        bench.go.release(9)
    assert seen.items[:2] == STEPS[:2]


async def test_an_older_schema_is_told(bench: Bench, db: Any) -> None:
    """A schema without the column that a wait for a result needs."""
    await db.execute("ALTER TABLE notifyq.task RENAME awaited TO awaited_no_more")
    with pytest.raises(notifyq.SchemaError, match="notifyq migrate"):
        await bench.app.ref(1).result(timeout=limit())


def test_jobs_that_end_while_reports_are_taken() -> None:
    """The loop drops the report of a job that ends, while the heartbeat's thread takes them one by one."""

    class Dropping(dict[Any, Any]):
        def popitem(self) -> tuple[Any, Any]:
            item = super().popitem()
            self.clear()  # what the other thread does at this moment
            return item

    slots = Slots(notifyq.App().registry)
    slots.reports = Dropping({1: STEPS[0], 2: STEPS[1]})
    assert list(slots.take_reports().values()) == [STEPS[1]]
