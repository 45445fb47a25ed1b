"""Plain handlers run in threads, of which there are fewer than slots. A worker holds what it has threads for."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.config import WorkerConfig, default_threads
from notifyq.room import LOOK_LEAST, Room
from notifyq.run import Runners
from notifyq.store import Job

from .conftest import Seen, eventually, working

pytestmark = pytest.mark.anyio


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
    """Neither holds more than it can run, whatever a claim took; what is left has used no attempt."""
    async with working(bench.app, dsn, threads=3), working(bench.app, dsn, threads=3):
        await enqueue(db, "Plain", 20)
        await eventually(begun(bench, 6))
        await eventually(lambda: db.fetchval(HELD), [3, 3, 14])
        # Now and then a worker looks whether the next one is another's by now, and hands it back.
        await eventually(lambda: db.fetchval("SELECT sum(attempts)::integer FROM notifyq.task"), 6)
        bench.over.set()
        await eventually(lambda: db.fetchval(LEFT), 0)
    assert len(bench.begun) == 20, "each has run once"


async def test_async_handlers_go_on(bench: Bench, db: Any, dsn: str) -> None:
    """While all threads are taken: in another queue, and in the same one if no plain handler's task waits before."""
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
    """One cause, one line: it names the threads, and what fails only as the loop didn't run isn't a lost database."""
    async with working(bench.app, dsn, threads=2):
        await enqueue(db, "Compute", 2)
        await eventually(begun(bench, 2))
        time.sleep(3)  # as if it waited for the lock, which these two need
        await eventually(lambda: wait_for(logged, "the event loop answers again"))
        told = logged("the event loop gets no time")
        assert {(*fields["handlers"],) for fields in told} == {("tests.test_threads.Bench.__init__.<locals>.compute",)}
        assert len(told) <= len(logged("the event loop answers again")) + 1  # a busy machine may stop it again
        assert not logged("the event loop is blocked")
        bench.over.set()
        await enqueue(db, "Async")
        await bench.seen.reach(1)
        assert not logged("lost the database")


async def test_a_handler_blocks_the_loop_beside_threads_that_wait(bench: Bench, db: Any, dsn: str, logged: Any) -> None:
    """It is named, and the threads aren't blamed."""

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


def jobs(types: str) -> list[Job]:
    """All that is asked of them."""
    made = []
    for number, letter in enumerate(types):
        job = Job.__new__(Job)
        job.id, job.queue, job.type = number, "q", {"p": "Plain", "a": "Async"}[letter]
        made.append(job)
    return made


def test_little_goes_back(bench: Bench) -> None:
    """How much is claimed beyond the threads grows while only async tasks come, and then ends with one surplus."""
    config = WorkerConfig(queues={"q": None, "r": None}, threads=2)
    runners = Runners(bench.app.registry, 100, 2, lambda _: None, lambda: None)
    room = Room(config, runners)
    asked = []
    for _ in range(7):
        rooms, _ = room.now(1.0, set(), 0)
        asked.append(rooms["q"])
        stay, surplus = room.divide(jobs("a" * rooms["q"]), rooms, 1.0)
        assert len(stay) == rooms["q"]
        assert not surplus
    assert asked == [2, 2, 4, 8, 16, 32, 64]
    rooms, _ = room.now(1.0, set(), 0)
    stay, surplus = room.divide(jobs("apapap" + "a" * 20), rooms, 1.0)
    assert (len(stay), [job.id for job in surplus]) == (25, [5])
    runners.plain_held["Plain"] = 2
    rooms, _ = room.now(1.0, set(), 0)
    assert list(rooms) == ["r"], "the next of q waits for a thread"
    assert rooms["r"] == 1
    rooms, _ = room.now(1.0 + LOOK_LEAST, set(), 0)
    assert rooms["q"] == 1, "another worker may have taken that one"
    _, surplus = room.divide(jobs("p"), rooms, 1.0 + LOOK_LEAST)
    assert len(surplus) == 1
    rooms, _ = room.now(1.0 + 2.5 * LOOK_LEAST, set(), 0)
    assert list(rooms) == ["r"], "it is left alone for twice as long"
    runners.plain_held["Plain"] = 1
    rooms, _ = room.now(1.0 + 2.5 * LOOK_LEAST, set(), 0)
    assert rooms == {"q": 1, "r": 1}


def test_a_thread_that_becomes_free_while_a_claim_is_under_way(bench: Bench) -> None:
    config = WorkerConfig(queues={"q": None}, threads=2)
    runners = Runners(bench.app.registry, 100, 2, lambda _: None, lambda: None)
    room = Room(config, runners)
    runners.plain_held["Plain"] = 1
    rooms, _ = room.now(1.0, set(), 0)
    runners.plain_held["Plain"] = 0
    stay, surplus = room.divide(jobs("ppp"), rooms, 1.0)
    assert ([job.id for job in stay], [job.id for job in surplus]) == ([0, 1], [2])
