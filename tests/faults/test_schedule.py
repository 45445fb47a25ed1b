"""Random schedules: enqueuers that dawdle, roll back, burst and COPY, against workers that come and go.

Every task that was committed runs; none is settled twice; none starts late while a worker serves its queue. A seed
makes a schedule; it is printed, and NOTIFYQ_SEED runs that one alone.
"""

from __future__ import annotations

import os
import random
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.embedded import Server

from ..helpers.databases import Sessions, database
from ..helpers.machine import Probe
from ..helpers.running import working
from ..helpers.waiting import eventually
from ..worker.test_cursors import force

SEED = os.environ.get("NOTIFYQ_SEED")
LATE_SECONDS = 1.5  # and what the machine adds
QUEUES = ["a", "b", "c"]


class Numbered(notifyq.Task, tag="N"):
    n: int


class Schedule:
    """One random schedule."""

    def __init__(self, seed: int, dsn: str, connect: Sessions) -> None:
        self.random = random.Random(seed)
        self.dsn = dsn
        self.connect = connect
        self.committed: set[int] = set()
        self.ran: list[int] = []
        self.next = 0
        self.app = notifyq.App()

        @self.app.handler
        async def run(task: Numbered) -> None:
            self.ran.append(task.n)
            await anyio.sleep(random.choice([0, 0, 0, 0.001, 0.01]))

    def number(self) -> int:
        self.next += 1
        return self.next

    async def pause(self, longest: float) -> None:
        await anyio.sleep(self.random.random() ** 3 * longest)

    async def enqueuer(self) -> None:
        """A session that enqueues as clients do."""
        conn, rnd = await self.connect(), self.random
        for _ in range(rnd.randint(3, 10)):
            await self.pause(0.05)
            numbers: list[int] = []
            transaction = conn.transaction(
                isolation=rnd.choice(["read_committed", "read_committed", "repeatable_read"])
            )
            await transaction.start()
            for _ in range(rnd.choice([1, 1, 1, 2, 3])):
                numbers += await self.insert(conn)
                await self.pause(0.1)
                if rnd.random() < 0.15:
                    nested = conn.transaction()
                    await nested.start()
                    await self.insert(conn)
                    await nested.rollback()
            if rnd.random() < 0.2:
                await transaction.rollback()
            else:
                await transaction.commit()
                self.committed.update(numbers)

    async def insert(self, conn: Any) -> list[int]:
        rnd = self.random
        queue = rnd.choice(QUEUES)
        numbers = [self.number() for _ in range(rnd.choice([1, 1, 1, 1, 5, 40]))]
        match rnd.randrange(4):
            case 0:
                records = [("N", queue, b'{"n": %d}' % n) for n in numbers]
                await conn.copy_records_to_table(
                    "task", schema_name="notifyq", records=records, columns=["type", "queue", "payload"]
                )
            case 1:
                await self.app.enqueue_many([Numbered(n) for n in numbers], queue=queue, conn=conn)
            case 2:
                await conn.execute(
                    """INSERT INTO notifyq.task (type, queue, payload, run_at)
                       SELECT 'N', $2, jsonb_build_object('n', n), clock_timestamp() + $3::float8 * interval '1 s'
                       FROM unnest($1::int[]) AS n""",
                    numbers,
                    queue,
                    rnd.choice([0.0, 0.05, 0.2]),
                )
            case _:
                for n in numbers:
                    await self.app.enqueue(Numbered(n), queue=queue, conn=conn, priority=rnd.choice([0, 5]))
        return numbers

    async def worker(self, rounds: int) -> None:
        """A worker that comes, stays a while, and goes; always with the same queues, so all are one fleet or two."""
        rnd = self.random
        for _ in range(rounds):
            await self.pause(0.2)
            queues = rnd.choice([QUEUES, ["a", "b:2", "c"]])
            async with working(self.app, self.dsn, queues=queues, concurrency=rnd.choice([1, 5, 100])):
                await self.pause(0.6)

    async def run(self, db: Any) -> None:
        async with working(self.app, self.dsn, queues=QUEUES):
            async with anyio.create_task_group() as group:
                for _ in range(self.random.randint(2, 6)):
                    group.start_soon(self.enqueuer)
                for _ in range(self.random.randint(0, 3)):
                    group.start_soon(self.worker, self.random.randint(1, 3))
            # From here on nothing happens that could find what a lost wake-up left.
            await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)

    async def check(self, db: Any) -> None:
        rows = await db.fetch("SELECT id, state, (payload->>'n')::int AS n, attempts FROM notifyq.finished")
        finished = [row["n"] for row in rows]
        assert set(finished) == self.committed, "what was committed has ended, and nothing else has"
        assert len(finished) == len(set(finished)), "nothing was settled twice"
        assert {row["state"] for row in rows} <= {"done"}
        assert sorted(self.ran) == sorted(finished), "without a fault, each ran once"
        assert {row["attempts"] for row in rows} <= {1}


async def one(seed: int, dsn: str, connect: Sessions, db: Any, probe: Probe) -> None:
    schedule = Schedule(seed, dsn, connect)
    try:
        await schedule.run(db)
        await schedule.check(db)
        late = await db.fetch(
            """SELECT id, queue, extract(epoch FROM processing_at - greatest(created_at, run_at))::float8 AS late
               FROM notifyq.finished
               WHERE processing_at - greatest(created_at, run_at) > $1::float8 * interval '1 s'""",
            LATE_SECONDS + probe.late(),
        )
        assert not late, "a start was late"
    except BaseException:
        print(f"\nthis schedule again: NOTIFYQ_SEED={seed}")
        raise


def seeds(fast: int, slow: int) -> list[Any]:
    """The seeds from 0: the first `fast` for `make test`, the rest for `make test-slow`. If NOTIFYQ_SEED is set, it is
    the only one."""
    if SEED:
        return [int(SEED)]
    return [*range(fast), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(fast, fast + slow))]


@pytest.mark.parametrize("seed", seeds(fast=12, slow=12))
async def test_schedule(seed: int, dsn: str, connect: Sessions, db: Any, probe: Probe) -> None:
    """One random schedule for each seed."""
    await one(seed, dsn, connect, db, probe)


@pytest.mark.parametrize("seed", seeds(fast=4, slow=4))
async def test_schedule_with_every_fast_path(
    monkeypatch: pytest.MonkeyPatch, seed: int, dsn: str, connect: Sessions, db: Any, probe: Probe
) -> None:
    """Each claim that may begin at a cursor does."""
    force(monkeypatch, 20.0)
    await one(seed, dsn, connect, db, probe)


@pytest.mark.long
async def test_thousands_of_schedules(server: Server, template: str, probe: Probe) -> None:
    """One test rather than 3,000, which each run of the tests would collect."""
    for seed in range(1000, 4000):
        async with database(server, template) as dsn, AsyncExitStack() as stack:
            connect = Sessions(dsn, stack)
            await one(seed, dsn, connect, await connect(), probe)
