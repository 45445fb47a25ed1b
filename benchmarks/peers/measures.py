"""The questions: drain, bulk, enqueue, latency, bloat. Each asks one queue, once, on a fresh database."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from itertools import pairwise

import asyncpg

from .driven import Peer, PeerError, Worker

CLIENTS = 16
ENQUEUE_SECONDS = 5.0
LATENCY_TASKS, LATENCY_GAP = 100, 0.05
FIRST_SECONDS = 60.0  # until the first completion must be seen: some poll each 30 s
DRAIN_SECONDS = {"tuned": 15.0, "defaults": 5.0}  # from then on; what isn't done after it doesn't count
POLL_SECONDS, LAST_POLL_SECONDS = 0.05, 0.01  # between counts of what is left; while a tenth or less is left

Sample = tuple[float, int]  # a time, and how many were durably done


async def drain(peer: Peer, mode: str, *, tasks: int = 0, held: bool = False) -> dict[str, float | list[float]]:
    """Load tasks, start a worker, count durable completions until none is left: {"rate", "bulk", "tenths"}.

    From the first completion that was seen, with however many it came, so how long a process takes to start doesn't
    count. `held`: a REPEATABLE READ snapshot from before the worker starts to the end.
    """
    tasks = tasks or peer.about.tasks[mode]
    async with peer.database(mode) as dsn, AsyncExitStack() as stack:
        bulk = (await peer.call("bulk", dsn, mode, tasks))["rate"]
        conn = await connect(stack, dsn)
        await conn.execute("VACUUM ANALYZE")
        await conn.execute("CHECKPOINT")
        if held:
            snapshot = await connect(stack, dsn)
            await snapshot.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            await snapshot.fetchval(peer.about.left)
        worker = await stack.enter_async_context(peer.working(dsn, mode))
        samples = await watch(peer, conn, worker, tasks, DRAIN_SECONDS[mode])
        if failed := await conn.fetchval(peer.about.failed):
            raise PeerError(f"{failed} of {tasks} tasks failed")
        (begin, some), (end, all_) = samples[0], samples[-1]
        return {"rate": (all_ - some) / (end - begin), "bulk": bulk, "tenths": tenths(samples)}


async def watch(peer: Peer, conn: asyncpg.Connection, worker: Worker, tasks: int, seconds: float) -> list[Sample]:
    """From the first completion seen to the last, or for `seconds`."""
    samples: list[Sample] = []
    began = time.monotonic()
    while True:
        worker.check()
        left: int = await conn.fetchval(peer.about.left)
        now = time.monotonic()
        if samples or left < tasks:
            samples.append((now, tasks - left))
            if (not left or now > samples[0][0] + seconds) and len(samples) > 1:
                return samples
        elif now > began + FIRST_SECONDS:
            raise PeerError(f"nothing was done in {FIRST_SECONDS:g} s")
        await asyncio.sleep(POLL_SECONDS if left > tasks / 10 else LAST_POLL_SECONDS)


def tenths(samples: list[Sample]) -> list[float]:
    """The rate in each tenth of what was done, by straight lines between the samples."""
    first, last = samples[0][1], samples[-1][1]
    marks = [first + (last - first) * i / 10 for i in range(11)]
    times = []
    for mark in marks:
        for (t0, done0), (t1, done1) in pairwise(samples):
            if done0 <= mark <= done1 and done1 > done0:
                times.append(t0 + (t1 - t0) * (mark - done0) / (done1 - done0))
                break
    return [(last - first) / 10 / (t1 - t0) for t0, t1 in pairwise(times)]


async def enqueue(peer: Peer, consuming: bool) -> float:
    """Enqueues a second by 16 coroutines of one process, each awaiting its call, with a worker or without one."""
    async with peer.database("tuned") as dsn, AsyncExitStack() as stack:
        if consuming:
            worker = await stack.enter_async_context(peer.working(dsn, "tuned"))
            await peer.call("bulk", dsn, "tuned", 1)
            conn = await connect(stack, dsn)
            async with asyncio.timeout(FIRST_SECONDS):
                while await conn.fetchval(peer.about.left):  # until it works
                    worker.check()
                    await asyncio.sleep(0.1)
        rate: float = (await peer.call("enqueue", dsn, "tuned", ENQUEUE_SECONDS, CLIENTS))["rate"]
        return rate


async def latency(peer: Peer) -> list[float]:
    """Milliseconds from before the enqueue call to the handler's start; the worker is idle, and in the same process."""
    async with peer.database("tuned") as dsn:
        answer = await peer.call("latency", dsn, "tuned", LATENCY_TASKS, LATENCY_GAP)
        if (count := len(answer["seconds"])) != LATENCY_TASKS:
            raise PeerError(f"{count} of {LATENCY_TASKS} handlers had started 10 s after the last enqueue")
        return [1000 * seconds for seconds in answer["seconds"]]


async def connect(stack: AsyncExitStack, dsn: str) -> asyncpg.Connection:
    conn = await asyncpg.connect(dsn)
    stack.push_async_callback(conn.close)
    await conn.execute("SET max_parallel_workers_per_gather = 0")  # counting shall not take the other core
    return conn
