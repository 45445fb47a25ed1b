"""Plain handlers run in threads, of which there are fewer than slots. A worker holds what it has threads for."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

import notifyq
from notifyq.config import WorkerConfig, default_threads
from notifyq.worker.capacity import ASKED_LEAST, LOOK_LEAST, Capacity
from notifyq.worker.job import Job
from notifyq.worker.outcome import HandedBack, Outcome
from notifyq.worker.settle import Settler
from notifyq.worker.slots import Slots

from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow


class Plain(notifyq.Task):
    pass


class Compute(notifyq.Task):
    pass


class Async(notifyq.Task):
    n: int = 0


class Bench:
    """An app whose plain handlers end when they are told to."""

    def __init__(self) -> None:
        self.app = notifyq.App()
        self.over = threading.Event()
        self.seen = Seen()
        self.begun: list[int] = []

        @self.app.handler
        def plain(task: Plain, ctx: notifyq.Context) -> None:
            self.begun.append(ctx.id)
            self.over.wait()

        @self.app.handler
        def compute(task: Compute, ctx: notifyq.Context) -> None:
            self.begun.append(ctx.id)
            while not self.over.is_set():
                sum(range(1000))

        @self.app.handler
        async def quick(task: Async) -> None:
            self.seen.add(task.n)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.over.set()


HELD = "SELECT array_agg(n ORDER BY n) FROM (SELECT count(*)::integer n FROM notifyq.task GROUP BY worker) w"
RUNNING = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"
LEFT = "SELECT count(*) FROM notifyq.task"


def begun(bench: Bench, count: int) -> Callable[[], Any]:
    async def those() -> bool:
        return len(bench.begun) == count

    return those


async def enqueue(db: Any, type: str, count: int = 1, queue: str = "default", n: int = 0) -> None:
    await db.execute(
        "INSERT INTO notifyq.task (type, queue, payload)"
        " SELECT $1, $2, jsonb_build_object('n', $3::integer) FROM generate_series(1, $4::integer)",
        *(type, queue, n, count),
    )


async def test_two_workers_share_what_each_has_threads_for(bench: Bench, db: Any, dsn: str) -> None:
    """Neither holds more than it can run, whatever a claim took. Tasks that are left have used no attempt."""
    async with working(bench.app, dsn, threads=3), working(bench.app, dsn, threads=3):
        await enqueue(db, "Plain", 20)
        await eventually(begun(bench, 6))
        await eventually(lambda: db.fetchval(HELD), [3, 3, 14])
        assert await db.fetchval("SELECT sum(attempts) FROM notifyq.task") == 6
        bench.over.set()
        await eventually(lambda: db.fetchval(LEFT), 0)
    assert len(bench.begun) == 20, "each has run once"


async def test_async_handlers_go_on(bench: Bench, db: Any, dsn: str) -> None:
    """They do while all threads are taken: in another queue, and in the same one if no plain handler's task waits
    before them."""
    async with working(bench.app, dsn, threads=2, queues=["default", "other"]):
        await enqueue(db, "Plain", 2)
        await eventually(begun(bench, 2))
        for n in range(5):
            await enqueue(db, "Async", 1, n=n)
            await bench.seen.reach(n + 1)
        await enqueue(db, "Async", 50, n=5)
        await bench.seen.reach(55)
        await enqueue(db, "Plain", 3)
        await enqueue(db, "Async", 10, "other", n=6)
        assert (await bench.seen.reach(65))[55:] == [6] * 10
        await enqueue(db, "Async", 1, n=7)  # its turn comes after the three
        await enqueue(db, "Async", 1, "other", n=8)
        assert (await bench.seen.reach(66))[65:] == [8]
        bench.over.set()
        assert (await bench.seen.reach(67))[66:] == [7]
        await eventually(lambda: db.fetchval(LEFT), 0)


async def test_drain(bench: Bench, db: Any, dsn: str) -> None:
    bench.over.set()
    await enqueue(db, "Plain", 30)
    await enqueue(db, "Async", 30)
    await enqueue(db, "Plain", 30)
    await bench.app.run_worker(dsn=dsn, threads=1, drain=True)
    assert len(bench.begun) == 60
    assert len(bench.seen.items) == 30


async def test_a_batch_takes_one_thread(db: Any, dsn: str) -> None:
    app, sizes, loop = notifyq.App(), Seen(), asyncio.get_running_loop()

    @app.handler(batch=10, linger=30)
    def plain(tasks: list[Plain]) -> None:
        loop.call_soon_threadsafe(sizes.add, len(tasks))

    await enqueue(db, "Plain", 20)
    async with working(app, dsn, threads=1):
        assert await sizes.reach(2) == [10, 10]


async def test_an_async_handler_in_a_plain_wrapper_needs_no_thread(db: Any, dsn: str) -> None:
    app, seen, release = notifyq.App(), Seen(), anyio.Event()

    def traced(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    @app.handler
    @traced
    async def plain(task: Plain) -> None:
        seen.add(task)
        await release.wait()

    await enqueue(db, "Plain", 20)
    async with working(app, dsn, threads=1):
        await seen.reach(20)
        release.set()


async def test_the_loop_gets_no_time(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """There is one cause and one log line: it names the threads. Errors that only say that the loop didn't run are not
    taken for a lost database."""
    async with working(bench.app, dsn, threads=2):
        await enqueue(db, "Compute", 2)
        await eventually(begun(bench, 2))
        time.sleep(3)  # as if it waited for the lock, which these two need
        await eventually(lambda: wait_for(logged, "the event loop answers again"))
        told = logged("the event loop gets no time")
        assert {(*fields["handlers"],) for fields in told} == {
            ("tests.worker.test_threads.Bench.__init__.<locals>.compute",)
        }
        assert len(told) <= len(logged("the event loop answers again")) + 1  # a busy machine may stop it again
        assert not logged("the event loop is blocked")
        bench.over.set()
        await enqueue(db, "Async")
        await bench.seen.reach(1)
        assert not logged("lost the database")


async def test_a_handler_blocks_the_loop_beside_threads_that_wait(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """The log names the handler, and doesn't blame the threads."""

    class Block(notifyq.Task):
        pass

    @bench.app.handler
    async def block(task: Block) -> None:
        time.sleep(3)

    async with working(bench.app, dsn, threads=2):
        await enqueue(db, "Plain", 2)
        await eventually(begun(bench, 2))
        await enqueue(db, "Block")
        await eventually(lambda: wait_for(logged, "the event loop answers again"))
        [_] = [fields for fields in logged("the event loop is blocked") if "block (task" in fields["handler"]]
        assert not logged("the event loop gets no time")
        assert not logged("lost the database")
        bench.over.set()


async def wait_for(logged: Any, text: str) -> bool:
    return bool(logged(text))


def test_what_is_set() -> None:
    assert 5 <= default_threads() <= 32
    assert WorkerConfig(queues={"q": None}).most_threads == min(100, default_threads())
    assert WorkerConfig(queues={"q": None}, concurrency=2).most_threads == min(2, default_threads())
    assert WorkerConfig(queues={"q": None}, threads=50).most_threads == 50
    for wrong in (0, 10_001, 1.5):
        with pytest.raises(notifyq.ConfigError, match="threads"):
            WorkerConfig(queues={"q": None}, threads=wrong)  # type: ignore[arg-type]


SETTLED: Any = SimpleNamespace(pending=0, full=False)  # all outcomes are written


def jobs(types: str) -> list[Job]:
    """All tasks that a worker asks for."""
    made = []
    for number, letter in enumerate(types):
        job = Job.__new__(Job)
        job.id, job.queue, job.type = number, "q", {"p": "Plain", "a": "Async"}[letter]
        made.append(job)
    return made


def test_how_much_is_asked_for(bench: Bench) -> None:
    """The number grows while claims come full of async tasks. A queue whose next task needs a thread is left alone."""
    config = WorkerConfig(queues={"q": None, "r": None}, threads=2)
    slots = Slots(bench.app.registry)
    capacity = Capacity(config, slots, SETTLED)
    asked = []
    for _ in range(6):
        free, total, _ = capacity.now(1.0, set())
        asked.append(free["q"])
        threads = capacity.threads(total)
        assert (threads is None) is (total <= 2), "an ordinary claim takes no more than there are threads"
        assert capacity.claimed(jobs("a" * free["q"]), free, total, threads, 1.0) == []
    assert asked == [2, 4, 8, 16, 32, 64]
    free, total, _ = capacity.now(1.0, set())
    threads = capacity.threads(total)
    assert threads == (["Plain", "Compute"], [1, 1], [0, 0], 2)
    slots.plain_held["Plain"] = 2
    assert capacity.claimed(jobs("apap" + "a" * 20), free, total, threads, 1.0) == ["q", "r"], "each may have some left"
    assert capacity.fits("Async")
    assert not capacity.fits("Plain")
    capacity.leave_alone("q", 1.0)
    free = capacity.now(1.0, set()).by_queue
    assert free == {"r": ASKED_LEAST}, "the next of q waits for a thread"
    free = capacity.now(1.0 + LOOK_LEAST, set()).by_queue
    assert free["q"] == ASKED_LEAST, "another worker may have taken that one"
    capacity.leave_alone("q", 1.0 + LOOK_LEAST)
    free = capacity.now(1.0 + 2.5 * LOOK_LEAST, set()).by_queue
    assert list(free) == ["r"], "it is left alone for twice as long"
    capacity.go_on("q")
    capacity.leave_alone("q", 2.0)
    free = capacity.now(2.0 + LOOK_LEAST, set()).by_queue
    assert "q" in free, "not for longer, if async tasks came in between"
    capacity.leave_alone("q", 2.0 + LOOK_LEAST)
    slots.plain_held["Plain"] = 1
    free, total, _ = capacity.now(2.0 + 2.5 * LOOK_LEAST, set())
    assert (free, total) == ({"q": 1, "r": 1}, 1)
    assert capacity.threads(total) is None


@pytest.mark.parametrize("shares", [[1], [1, 1], [4], [4, 1], [3, 5], [2, 3, 1]])
def test_what_fits_whatever_the_types_are(shares: list[int]) -> None:
    """The worker asks for as many tasks as need no more threads than are free, whatever types come. One task more could
    need more."""
    app = notifyq.App()
    for number, share in enumerate(shares):
        type = msgspec.defstruct(f"T{number}", [], bases=(notifyq.Task,))

        def plain(task: Any) -> None: ...

        def batch(tasks: Any) -> None: ...

        plain.__annotations__["task"], batch.__annotations__["tasks"] = type, list[type]  # type: ignore[valid-type]
        app.handler(plain) if share == 1 else app.handler(batch=share)(batch)
    slots = Slots(app.registry)
    assert list(slots.plain.values()) == shares
    capacity = Capacity(WorkerConfig(queues={"q": None}, threads=3), slots, SETTLED)
    for held in itertools.product(*(range(share + 2) for share in shares)):
        slots.plain_held.update(dict(zip(slots.plain, held, strict=True)))
        fitting = capacity.fitting()
        if slots.threads_needed <= 3:
            assert most_threads(slots, fitting) <= 3
            assert most_threads(slots, fitting + 1) > 3
        slots.plain_held.clear()


def most_threads(slots: Slots, more: int) -> int:
    """How many threads are needed at most, with that many more tasks of any types."""
    share, held = list(slots.plain.values()), slots.plain_held.values()
    splits = (split for split in itertools.product(range(more + 1), repeat=len(share)) if sum(split) == more)
    return max(sum(-(-(h + m) // s) for h, m, s in zip(held, split, share, strict=True)) for split in splits)


@pytest.fixture
def handed_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types of all tasks that any worker in this process hands back."""
    types: list[str] = []
    put = Settler.put

    def watched(self: Settler, outcome: Outcome) -> None:
        if isinstance(outcome, HandedBack):
            types.append(outcome.job.type)
        put(self, outcome)

    monkeypatch.setattr(Settler, "put", watched)
    return types


MIXED = """INSERT INTO notifyq.task (type, priority)
           SELECT CASE WHEN i % 5 = 0 THEN 'Plain' ELSE 'Async' END, i % 3 FROM generate_series(1, $1::integer) AS i"""


async def test_no_task_is_claimed_without_a_thread(bench: Bench, db: Any, dsn: str, handed_back: list[str]) -> None:
    """Three workers with six threads, after many async tasks: none claims a plain task beyond its threads."""
    async with (
        working(bench.app, dsn, threads=2),
        working(bench.app, dsn, threads=2),
        working(bench.app, dsn, threads=2),
    ):
        await enqueue(db, "Async", 1000)
        await bench.seen.reach(1000)
        await enqueue(db, "Plain", 100)
        await eventually(begun(bench, 6))
        await db.execute(MIXED, 500)
        await enqueue(db, "Async", 1, "other")
        await eventually(lambda: db.fetchval("SELECT sum(attempts) FROM notifyq.task WHERE type = 'Plain'"), 6)
        assert handed_back == []
        bench.over.set()
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE queue = 'default'"), 0)
        assert len(bench.begun) == 200, "each has run once"
    assert handed_back == []


async def test_async_tasks_behind_plain_ones_of_one_claim(
    bench: Bench, db: Any, dsn: str, handed_back: list[str]
) -> None:
    """A claim leaves the plain tasks that don't fit, and takes the async tasks among them."""
    await db.execute("INSERT INTO notifyq.task (type) SELECT 'Async' FROM generate_series(1, 30)")
    await db.execute(MIXED.replace("i % 3", "0"), 100)
    async with working(bench.app, dsn, threads=2):
        await bench.seen.reach(31)
        await eventually(begun(bench, 2))
        bench.over.set()
        await eventually(lambda: db.fetchval(LEFT), 0)
    assert (len(bench.seen.items), len(bench.begun), handed_back) == (110, 20, [])


async def test_no_unhandled_task_is_claimed_without_a_thread(
    bench: Bench, db: Any, dsn: str, handed_back: list[str]
) -> None:
    """Of tasks that other workers have left unhandled, it claims as many plain ones as there are threads, and all
    others."""
    await enqueue(db, "Async", 130)  # it asks for more and more
    await db.execute("INSERT INTO notifyq.task (type, withheld) SELECT 'Plain', true FROM generate_series(1, 30)")
    await db.execute("INSERT INTO notifyq.task (type, withheld) SELECT 'Async', true FROM generate_series(1, 30)")
    async with working(bench.app, dsn, threads=2):
        await bench.seen.reach(160)
        await eventually(begun(bench, 2))
        assert await db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NULL") == 28
        bench.over.set()
        await eventually(lambda: db.fetchval(LEFT), 0)
    assert (len(bench.begun), handed_back) == (30, [])


async def test_no_task_is_claimed_beside_a_refused_one(bench: Bench, db: Any, dsn: str, handed_back: list[str]) -> None:
    """This holds also while PostgreSQL refuses some tasks, and a claim takes another way."""
    await db.execute("ALTER TABLE notifyq.task ADD CONSTRAINT nobody CHECK (worker IS NULL OR priority <> 7)")
    await db.execute("INSERT INTO notifyq.task (type, priority) VALUES ('Async', 7)")
    await enqueue(db, "Async", 130)
    await db.execute(MIXED.replace("i % 3", "0"), 150)
    async with working(bench.app, dsn, threads=2):
        await eventually(begun(bench, 2))
        bench.over.set()
        await bench.seen.reach(250)
        await eventually(lambda: db.fetchval(LEFT), 1)
    assert (len(bench.begun), handed_back) == (30, [])


async def test_batches_and_plain_tasks_share_the_threads(db: Any, dsn: str, handed_back: list[str]) -> None:
    app, seen, loop = notifyq.App(), Seen(), asyncio.get_running_loop()

    @app.handler(batch=10)
    def plain(tasks: list[Plain]) -> None:
        loop.call_soon_threadsafe(seen.items.extend, tasks)

    @app.handler
    def compute(task: Compute) -> None:
        loop.call_soon_threadsafe(seen.add, task)

    @app.handler
    async def quick(task: Async) -> None:
        seen.add(task)

    await db.execute(
        "INSERT INTO notifyq.task (type) SELECT ('{Plain,Compute,Async}'::text[])[i % 3 + 1]"
        " FROM generate_series(1, 600) AS i"
    )
    async with working(app, dsn, threads=2), working(app, dsn, threads=1):
        await eventually(lambda: db.fetchval(LEFT), 0)
    assert (len(seen.items), handed_back) == (600, [])
