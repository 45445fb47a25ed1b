"""From before the enqueue call to the first line of the handler, on an idle worker, one task every 40 ms.

The floor beside it, in turns: two bare asyncpg connections; INSERT with pg_notify on one, the other hears it, claims
one row with an UPDATE, and is there. Both in one process, so that one clock times both ends.
"""

from __future__ import annotations

import asyncio
import time

import anyio
import anyio.abc

import notifyq
from notifyq import store

from .common import Line, percentile

ROUNDS, TASKS = 5, 50


async def run(dsn: str) -> list[Line]:
    app, started = notifyq.App(), asyncio.Event()

    class Ping(notifyq.Task):
        n: int

    at = 0.0

    @app.handler
    async def ping(task: Ping) -> None:
        nonlocal at
        at = time.perf_counter()
        started.set()

    floor, ours = await Floor.create(dsn), list[float]()
    async with app.connect(dsn), anyio.create_task_group() as group:
        stop = anyio.Event()

        async def worker(*, task_status: anyio.abc.TaskStatus[notifyq.WorkerInfo]) -> None:
            await app.run_worker(stop=stop, task_status=task_status)

        await group.start(worker)
        for _ in range(ROUNDS):
            for n in range(TASKS):
                await asyncio.sleep(0.04)
                started.clear()
                before = time.perf_counter()
                await app.enqueue(Ping(n))
                await started.wait()
                ours.append((at - before) * 1000)
            for _ in range(TASKS):
                await asyncio.sleep(0.04)
                await floor.once()
        stop.set()
    await floor.close()
    p50, p99 = percentile(ours, 0.5), percentile(ours, 0.99)
    floor50, floor99 = percentile(floor.times, 0.5), percentile(floor.times, 0.99)
    return [
        Line("enqueue call to handler start, idle worker, p50", p50, "ms", "floor", p50 / floor50, "<= 1.5"),
        Line("enqueue call to handler start, idle worker, p99", p99, "ms", "floor", p99 / floor99),
        Line("floor: a bare asyncpg loop, p50", floor50, "ms"),
    ]


class Floor:
    """The least that INSERT, NOTIFY and a claim take with asyncpg."""

    def __init__(self, enqueuer: store.Connection, claimer: store.Connection) -> None:
        self._enqueuer, self._claimer = enqueuer, claimer
        self._rung = asyncio.Event()
        self.times: list[float] = []

    @classmethod
    async def create(cls, dsn: str) -> Floor:
        self = cls(await store.connect(dsn), await store.connect(dsn))
        await self._enqueuer.execute(
            """CREATE SCHEMA IF NOT EXISTS bench; DROP TABLE IF EXISTS bench.floor;
               CREATE TABLE bench.floor (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, type text, payload jsonb,
                                         created_at timestamptz DEFAULT clock_timestamp(), processing_at timestamptz);
               CREATE INDEX ON bench.floor (id) WHERE processing_at IS NULL"""
        )
        await self._claimer.add_listener("bench", lambda *_: self._rung.set())
        return self

    async def once(self) -> None:
        self._rung.clear()
        before = time.perf_counter()
        enqueued = asyncio.ensure_future(self._enqueue())
        await self._rung.wait()
        rows = await self._claimer.fetch(
            """UPDATE bench.floor SET processing_at = clock_timestamp() WHERE id = ANY(ARRAY(
                   SELECT id FROM bench.floor WHERE processing_at IS NULL ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED))
               RETURNING id, payload"""
        )
        assert len(rows) == 1
        self.times.append((time.perf_counter() - before) * 1000)
        await enqueued

    async def _enqueue(self) -> None:
        await self._enqueuer.execute(
            "WITH i AS (INSERT INTO bench.floor (type, payload) VALUES ($1, $2::jsonb)) SELECT pg_notify('bench', '')",
            "Ping",
            b'{"n": 1}',
        )

    async def close(self) -> None:
        await self._enqueuer.execute("DROP SCHEMA bench CASCADE")
        await self._enqueuer.close()
        await self._claimer.close()
