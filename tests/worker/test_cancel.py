"""Cancel: a waiting task ends at once, a running one is stopped within milliseconds, and a worker listens for cancels
only while it must."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import pytest

import notifyq
from notifyq.config import WorkerConfig
from notifyq.worker import heartbeat, loop_watch
from notifyq.worker.worker import Worker

from ..helpers import verbs
from ..helpers.databases import Sessions
from ..helpers.garbage import GARBAGE
from ..helpers.machine import Probe, limit
from ..helpers.processes import Process
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

CANCELS = 10


class Sleep(notifyq.Task):
    backoff = 0.0


class Limited(notifyq.Task):
    timeout = 0.2
    max_attempts = 1


class Block(notifyq.Task):
    max_attempts = 1


class BlockLimited(Block):
    timeout = 0.2


class Quick(notifyq.Task):
    pass


class Known(notifyq.Task):
    pass


class Bench:
    """An app whose handlers record when they begin and how they end."""

    def __init__(self) -> None:
        self.app = notifyq.App()
        self.began = Seen()
        self.ended = Seen()
        self.release = threading.Event()
        home = asyncio.get_running_loop()

        async def sleep(ctx: notifyq.Context) -> None:
            assert not ctx.cancelled
            self.began.add(ctx.id)
            try:
                await anyio.sleep(60)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()  # clean-up may wait
                    self.ended.add((ctx.id, ctx.cancelled, time.perf_counter()))

        def block(ctx: notifyq.Context) -> None:
            assert not ctx.cancelled
            home.call_soon_threadsafe(self.began.add, ctx.id)
            while not (ctx.cancelled or self.release.is_set()):
                time.sleep(0.001)
            home.call_soon_threadsafe(self.ended.add, (ctx.id, ctx.cancelled, time.perf_counter()))

        @self.app.handler
        async def sleeps(task: Sleep, ctx: notifyq.Context) -> None:
            await sleep(ctx)

        @self.app.handler
        async def limited(task: Limited, ctx: notifyq.Context) -> None:
            await sleep(ctx)

        @self.app.handler
        def blocks(task: Block, ctx: notifyq.Context) -> None:
            block(ctx)

        @self.app.handler
        def blocks_limited(task: BlockLimited, ctx: notifyq.Context) -> None:
            block(ctx)

        @self.app.handler
        async def quick(task: Quick) -> None:
            pass


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
    bench.release.set()


@pytest.fixture
def listened(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The LISTEN and UNLISTEN commands of this process: ("LISTEN", channel)."""
    seen = Seen()
    for name, word in (("add_listener", "LISTEN"), ("remove_listener", "UNLISTEN")):

        def spy(name: str = name, word: str = word) -> Any:
            real = getattr(asyncpg.Connection, name)

            async def call(self: Any, channel: str, callback: Any) -> None:
                await real(self, channel, callback)
                seen.items.append((word, channel))  # in whatever thread

            return call

        monkeypatch.setattr(asyncpg.Connection, name, spy())
    return seen


async def listening(seen: Seen, count: int = 1) -> None:
    """Wait until heartbeats' threads have begun to listen, this many times."""
    with anyio.fail_after(limit()):
        while seen.items.count(("LISTEN", heartbeat.CANCELS)) < count:  # in another thread
            await anyio.sleep(0.005)


@pytest.fixture
def slow_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No heartbeat comes in time to find what a notification announces."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 60.0)


# --- What runs


@pytest.mark.parametrize("kind", [Sleep, Block])
async def test_a_running_handler(
    bench: Bench, dsn: str, db: Any, listened: Seen, slow_heart: None, kind: type[notifyq.Task], probe: Probe
) -> None:
    """It is stopped within milliseconds, and its clean-up runs. A caller that waits for the task is told."""
    took, first = [], time.monotonic()
    async with working(bench.app, dsn, threads=CANCELS):
        refs = [await bench.app.enqueue(kind()) for _ in range(CANCELS)]
        await bench.began.reach(CANCELS)
        await listening(listened)
        for n, ref in enumerate(refs):
            begin = time.perf_counter()
            assert await ref.cancel()
            id, flag, at = (await bench.ended.reach(n + 1))[n]
            assert (id, flag) == (ref.id, True)
            took.append(at - begin)
            with pytest.raises(notifyq.TaskCancelled, match=r"was cancelled$"):
                await ref.result(timeout=limit())
    took.sort()
    print(f"cancel to the end of the handler: median {took[CANCELS // 2] * 1e3:.1f} ms, worst {took[-1] * 1e3:.1f}")
    assert took[CANCELS // 2] < 0.5 + probe.late(first)
    assert {state for state, _ in (await verbs.states(db)).values()} == {"cancelled"}


async def test_wherever_it_runs(spawn: Callable[..., Process], dsn: str, db: Any) -> None:
    """Two workers are processes of their own; the one that runs the task stops it."""
    spawned = [spawn("concurrency=1"), spawn("concurrency=1")]
    for process in spawned:
        await process.line("started")
    ids = await verbs.insert(db, 2, type="Sleep")
    ran = {(await process.line("ran"))["id"]: process for process in spawned}
    assert sorted(ran) == ids
    for id, process in ran.items():
        assert await verbs.cancel(db, id)
        assert (await process.line("cancelled"))["id"] == id
    await eventually(lambda: verbs.states(db), dict.fromkeys(ids, ("cancelled", 1)))


async def test_soon_after_its_start_it_is_the_heartbeat(bench: Bench, dsn: str, probe: Probe) -> None:
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(Sleep())
        await bench.began.reach(1)
        with probe.within(4):
            assert await ref.cancel()
            await bench.ended.reach(1)


@pytest.mark.usefixtures("quick_heart")
async def test_it_may_be_retried_at_once(bench: Bench, dsn: str, db: Any, listened: Seen) -> None:
    """The old handler winds up while the new one begins, both of attempt 1."""
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(Sleep())
        await bench.began.reach(1)
        await listening(listened)
        assert await verbs.cancel(db, ref.id)
        assert await verbs.retry(db, ref.id)
        await bench.began.reach(2)
        assert len(bench.ended.items) == 1
        assert await ref.cancel()
        await bench.ended.reach(2)


# --- What waits


@pytest.mark.parametrize("delay", [None, 3600])
async def test_what_waits(bench: Bench, db: Any, delay: float | None) -> None:
    """A ready or scheduled task, without any worker. No notification is sent, since no worker runs it."""
    heard: list[Any] = []
    await db.add_listener(heartbeat.CANCELS, lambda *args: heard.append(args[3]))
    ref = await bench.app.enqueue(Sleep(), delay=delay)
    assert await bench.app.cancel(ref.id) is True
    assert await bench.app.cancel(ref.id) is False
    assert await bench.app.cancel(12345) is False
    (job,) = await verbs.held(db)
    assert await verbs.cancel(db, job.id)
    await eventually(lambda: asyncio.sleep(0, heard), [str(job.id)])


# --- The flag


@pytest.mark.parametrize("kind", [Limited, BlockLimited])
async def test_the_flag_at_a_timeout(bench: Bench, dsn: str, kind: type[notifyq.Task]) -> None:
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(kind(), max_attempts=1)
        with pytest.raises(notifyq.TaskDead, match=r"timed out after 0\.2 s"):
            await ref.result(timeout=limit())
        assert (await bench.ended.reach(1))[0][:2] == (ref.id, True)


@pytest.mark.parametrize("kind", [Sleep, Block])
async def test_the_flag_at_a_shutdown(bench: Bench, dsn: str, kind: type[notifyq.Task]) -> None:
    async with working(bench.app, dsn, shutdown_timeout=0.1) as worker:
        ref = await bench.app.enqueue(kind())
        await bench.began.reach(1)
        await worker.stopped()
        assert (await bench.ended.reach(1))[0][:2] == (ref.id, True)


@pytest.mark.usefixtures("quick_heart")
@pytest.mark.parametrize("kind", [Sleep, Block])
async def test_the_flag_when_the_lease_is_lost(bench: Bench, dsn: str, db: Any, kind: type[notifyq.Task]) -> None:
    """Another worker runs the task again while the first handler still runs."""
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(kind())
        await bench.began.reach(1)
        await db.execute("UPDATE notifyq.task SET worker = NULL, run_at = now() + interval '1 h', promoted = false")
        assert (await bench.ended.reach(1))[0][:2] == (ref.id, True)


async def test_news_of_an_attempt_that_is_over_cancels_no_other(dsn: str, db: Any) -> None:
    """A heartbeat asks about a job. Before the answer comes, the job has ended, and the task is claimed again: as the
    next attempt, or as the same one if it was cancelled and retried."""
    app, began = notifyq.App(), Seen()

    @app.handler
    async def known(task: Known) -> None:
        began.add("began")
        await anyio.sleep_forever()

    worker = Worker(app.registry, WorkerConfig(queues={"default": None}), dsn)
    [job] = await verbs.held(db)
    async with anyio.create_task_group() as group:
        group.start_soon(worker._runners.run)
        await worker._runners.ready.wait()
        worker._runners.add_jobs([job])
        await began.reach(1)
        worker.on_leases_lost([copy.copy(job)], set())
        assert worker._runners.leases == [job]
        worker.on_leases_lost([job], set())
        assert worker._runners.leases == []
        group.cancel_scope.cancel()


async def test_a_run_whose_lease_was_lost_settles_nothing(dsn: str, db: Any) -> None:
    """The task was handed back, and this worker has claimed the same attempt again, so its lease looks the same. The
    first run ignores its cancellation and returns: its result is dropped, and the second run counts."""
    app, began, runs = notifyq.App(), Seen(), itertools.count(1)

    @app.handler
    async def sleeps(task: Sleep, ctx: notifyq.Context) -> int:
        run = next(runs)
        began.add(ctx.attempt)
        if run == 1:
            try:
                await anyio.sleep_forever()
            except BaseException:
                pass
        return run

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Sleep())
        await began.reach(1)
        await db.execute("UPDATE notifyq.task SET worker = NULL, attempts = 0, run_at = run_at")
        assert await ref.result(timeout=limit()) == 2
    assert began.items == [1, 1]


def test_outside_of_a_worker_it_is_false() -> None:
    ctx = notifyq.Context(id=1, queue="q", attempt=1, max_attempts=1, priority=0, created_at=datetime.now(UTC))
    assert ctx.cancelled is False


# --- Listening


@pytest.mark.slow
async def test_it_listens_only_while_something_runs_for_long(bench: Bench, dsn: str, listened: Seen) -> None:
    async with working(bench.app, dsn):
        for _ in range(3):  # idle, and with many short tasks, for longer than it takes to begin
            for _ in range(100):
                await bench.app.enqueue(Quick())
            await anyio.sleep(loop_watch.LONG_SECONDS)
        assert ("LISTEN", heartbeat.CANCELS) not in listened.items
        for n in range(2):
            ref = await bench.app.enqueue(Sleep())
            await listening(listened, n + 1)
            assert listened.items.count(("UNLISTEN", heartbeat.CANCELS)) == n
            await ref.cancel()
            await bench.ended.reach(n + 1)
            with anyio.fail_after(limit()):
                while listened.items.count(("UNLISTEN", heartbeat.CANCELS)) <= n:
                    await anyio.sleep(0.01)
    assert len([item for item in listened.items if item[1] == heartbeat.CANCELS]) == 4


async def test_forged_cancels(
    bench: Bench, dsn: str, connect: Sessions, db: Any, listened: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any role can NOTIFY. A handler goes on, the worker sends no heartbeat for each forgery, and a real cancel still
    works."""
    ticks: list[float] = []
    real = heartbeat.Heartbeat._send

    async def tick(self: Any, conn: Any) -> bool:
        ticks.append(time.perf_counter())
        return await real(self, conn)

    monkeypatch.setattr(heartbeat.Heartbeat, "_send", tick)
    stranger = await connect()
    async with working(bench.app, dsn):
        ref = await bench.app.enqueue(Sleep())
        await bench.began.reach(1)
        await listening(listened)
        del ticks[:]
        begin = time.perf_counter()
        for n in range(200):
            for payload in (*GARBAGE, str(ref.id), str(ref.id + n)):
                await stranger.execute("SELECT pg_notify($1, $2)", heartbeat.CANCELS, payload)
        took = time.perf_counter() - begin
        assert len(ticks) <= 2 + 2 * took / heartbeat.IGNORE_SECONDS, f"{len(ticks)} in {took:.1f} s"
        assert not bench.ended.items
        assert await ref.cancel()
        await bench.ended.reach(1)
