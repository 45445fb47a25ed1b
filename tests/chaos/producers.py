"""Enqueuers: through the App, in transactions of their own, by COPY, INSERT ... SELECT and psql; cancels and retries.

Each writes down what it tried before it tries, and what it knows afterwards: committed only when the commit has
returned, rolled back only when none was sent; everything else is unknown, and both are right.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import Any

import notifyq
from notifyq.database import connection, errors

from . import app as tempers
from .history import Batch

TIDE_SECONDS = 5.0
KEYS = 4
RATE = "20/2s"
LOST = (*errors.TRANSIENT, notifyq.NotifyqError, OSError)


class Producer:
    """One enqueuer: a way, a connection of its own, and random numbers of its own."""

    def __init__(self, way: str, seed: str, dsn: str, psql: str | None, numbers: Callable[[], int]) -> None:
        self.way = way
        self.random = random.Random(seed)
        self.batches: list[Batch] = []
        self._dsn = dsn
        self._program = psql
        self._numbers = numbers
        self._conn: Any = None
        self._app = notifyq.App()
        self._last: list[int] = []

    async def run(self, stop: asyncio.Event) -> None:
        if self.way == "psql" and self._program is None:
            return
        act = getattr(self, f"_{self.way}")
        while not stop.is_set():
            try:
                if self._conn is None and self.way not in ("pool", "keyed", "psql"):
                    self._conn = await connection.connect(self._dsn, role=f"chaos {self.way}")
                await act()
            except LOST:
                if self._conn is not None:
                    self._conn.terminate()
                    self._conn = None
                await asyncio.sleep(0.1)
            try:
                await asyncio.wait_for(stop.wait(), self.random.random() ** 3 * self._longest())
            except TimeoutError:
                pass
        if self._conn is not None:
            self._conn.terminate()

    def _longest(self) -> float:
        """Seconds between two of its actions. All producers have their quiet times together: then workers sleep, and a
        task for which no worker was woken isn't found by the next one's bell."""
        return 2.0 if self.way == "burst" or time.time() // TIDE_SECONDS % 2 else 20.0

    # Ways.

    async def _pool(self) -> None:
        """App.enqueue and enqueue_many, through its pool."""
        async with self._app.connect(self._dsn):
            for _ in range(10):
                batch = self._batch(self.random.choice([1, 1, 1, 20]))
                tasks = [self._task(n) for n in batch.numbers]
                if len(tasks) == 1:
                    await self._app.enqueue(tasks[0], **self._options())
                else:
                    await self._app.enqueue_many(tasks, **self._options())
                self._ends(batch, "committed")
                await self._pause(0.5)

    async def _transaction(self) -> None:
        """App.enqueue with conn=, in a transaction that dawdles, and may be rolled back."""
        await self._conn.execute("BEGIN")
        batch = self._batch(self.random.choice([1, 2, 3]))
        try:
            for n in batch.numbers:
                await self._app.enqueue(self._task(n), conn=self._conn, **self._options())
                await self._pause(0.3)
        except BaseException:
            self._ends(batch, "rolled back")
            raise
        if self.random.random() < 0.2:
            await self._conn.execute("ROLLBACK")
            self._ends(batch, "rolled back")
        else:
            await self._conn.execute("COMMIT")
            self._ends(batch, "committed")

    async def _insert(self) -> None:
        """A plain INSERT; or notifyq.enqueue."""
        batch = self._batch(1)
        task = self._task(batch.numbers[0])
        statement = self.random.choice(
            [
                "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2) RETURNING id",
                "SELECT notifyq.enqueue($1, $2, priority => 5)",
                "SELECT notifyq.enqueue($1, $2, queue => 'narrow')",
            ]
        )
        await self._conn.fetchval(statement, type(task).__name__, payload_of(task))
        self._ends(batch, "committed")

    async def _burst(self) -> None:
        """Tasks one by one, as fast as they go, so that the workers stay awake. Meanwhile a transaction is told that no
        worker sleeps, and commits when they are about to."""
        other = await connection.connect(self._dsn, role="chaos burst")
        try:
            for _ in range(60):
                self._ends(await self._one(self._conn), "committed")
            await other.execute("BEGIN")
            late = await self._one(other)
            for _ in range(60):
                self._ends(await self._one(self._conn), "committed")
            await self._pause(1.0)
            await other.execute("COMMIT")
            self._ends(late, "committed")
        finally:
            other.terminate()

    async def _one(self, conn: Any) -> Batch:
        batch = self._batch(1)
        insert = "INSERT INTO notifyq.task (type, payload) VALUES ('Quick', jsonb_build_object('n', $1::bigint))"
        # A session that wants the lock of the whole table waits for the other transaction, and this one waits for it.
        await conn.execute(insert, batch.numbers[0], timeout=3)
        return batch

    async def _copy(self) -> None:
        batch = self._batch(self.random.choice([1, 1, 5, 60]))
        tasks = [self._task(n) for n in batch.numbers]
        records = [(type(task).__name__, payload_of(task), self._queue()) for task in tasks]
        columns = ["type", "payload", "queue"]
        await self._conn.copy_records_to_table("task", schema_name="notifyq", records=records, columns=columns)
        self._ends(batch, "committed")

    async def _select(self) -> None:
        """INSERT ... SELECT, of tasks that are due in a moment, or in a while."""
        batch = self._batch(self.random.choice([1, 1, 5, 20]))
        await self._conn.execute(
            """INSERT INTO notifyq.task (type, payload, queue, run_at, priority)
               SELECT 'Quick', jsonb_build_object('n', n), $2, clock_timestamp() + $3::float8 * interval '1 s', n % 3
               FROM unnest($1::bigint[]) AS n""",
            batch.numbers, self._queue(), self.random.choice([0.0, 0.05, 0.5, 3.0]),
        )  # fmt: skip
        self._ends(batch, "committed")

    async def _keyed(self) -> None:
        """Tasks with limits, and such that go in order; some keys have both, one has a rate."""
        async with self._app.connect(self._dsn):
            for _ in range(10):
                options = self._options()
                key = self.random.randrange(4)
                if key == 3:
                    options |= {"limit_key": "rate", "rate": RATE}
                elif key != 1:
                    options |= {"limit_key": f"limit {key}", "limit": 1 + key}
                if key in (1, 2):
                    options["order_key"] = f"order {key}"
                batch = self._batch(self.random.choice([1, 3, 10]))
                await self._app.enqueue_many([self._task(n) for n in batch.numbers], **options)
                self._ends(batch, "committed")
                await self._pause(2.0)

    async def _unique(self) -> None:
        """Tasks with keys that are few, alone and in bulk, some in transactions that dawdle or are rolled back."""
        for _ in range(10):
            keys = self.random.sample(range(KEYS), self.random.choice([1, 1, 1, 2, KEYS]))
            await self._only(keys, self.random.choice(["", "", "COMMIT", "ROLLBACK"]))
            await self._pause(0.3)

    async def _only(self, keys: list[int], end: str) -> None:
        began = time.time()
        seconds = self.random.choice([0.0, 0.1])
        tasks = [tempers.Only(n=self._numbers(), key=key, seconds=seconds) for key in keys]
        options = self._options() | {
            "on_conflict": self.random.choice(["keep", "replace", "move"]),
            "unique_states": ("scheduled", "ready", "running"),
        }
        if end:
            await self._conn.execute("BEGIN")
        if len(tasks) == 1:
            ref = await self._app.enqueue(tasks[0], conn=self._conn, **options)
            ids = notifyq.Ids([ref.id], [ref.id] if ref.existed else [])
        else:
            ids = await self._app.enqueue_many(tasks, conn=self._conn, **options)
        new = [task.n for task, id in zip(tasks, ids, strict=True) if id not in ids.existed]
        batch = Batch(by=self.way, numbers=new, began=began, existed=list(ids.existed))
        self.batches.append(batch)
        try:
            if end:
                answered = time.time()
                await self._pause(0.5)
                batch.open = answered, time.time()
                await self._conn.execute(end)
            batch.outcome = "rolled back" if end == "ROLLBACK" else "committed"
        finally:
            batch.at = time.time()

    async def each_key(self) -> None:
        """When all has ended, no key prevents an enqueue."""
        self._conn = await connection.connect(self._dsn, role="chaos last")
        await self._only(list(range(KEYS)), "ROLLBACK")
        self._conn.terminate()

    async def _after(self) -> None:
        """Each waits for one to three tasks: new ones, or some of the last, which may wait themselves, or have
        ended."""
        for _ in range(10):
            options = self._options()
            options["on_dead"] = self.random.choice(["cancel", "run"])
            if len(self._last) < 3 or self.random.random() < 0.5:
                batch = self._batch(self.random.choice([2, 3, 4]))
                tasks = [self._task(n) for n in batch.numbers[1:]]
                then = tempers.Quick(n=batch.numbers[0])
                ids, ref = await self._app.enqueue_many(tasks, then=then, conn=self._conn, **options)
                self._last += ids
            else:
                batch = self._batch(1)
                options["after"] = self.random.sample(self._last, self.random.choice([1, 2, 3]))
                ref = await self._app.enqueue(tempers.Quick(n=batch.numbers[0]), conn=self._conn, **options)
            self._ends(batch, "committed")
            self._last = [*self._last, ref.id][-9:]
            await self._pause(0.5)

    async def _psql(self) -> None:
        assert self._program is not None
        batch = self._batch(1)
        statement = f"""INSERT INTO notifyq.task (type, payload) VALUES ('Quick', '{{"n": {batch.numbers[0]}}}')"""
        process = await asyncio.create_subprocess_exec(
            self._program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", statement, self._dsn,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        if await process.wait() == 0:
            self._ends(batch, "committed")

    async def _meddle(self) -> None:
        """A person at psql cancels and retries, whatever state the task is in."""
        ids = await self._conn.fetch(
            """SELECT id FROM notifyq.all_tasks WHERE id > (SELECT last_value - 100 FROM notifyq.task_id_seq)
               ORDER BY random() LIMIT 2"""
        )
        for row in ids:
            what = self.random.choice(["cancel", "retry"])
            await self._conn.fetchval(f"SELECT notifyq.{what}($1)", row[0])
        await self._pause(1.0)

    # What is enqueued.

    def _batch(self, count: int) -> Batch:
        batch = Batch(by=self.way, numbers=[self._numbers() for _ in range(count)], at=time.time())
        self.batches.append(batch)
        return batch

    def _ends(self, batch: Batch, outcome: str) -> None:
        batch.outcome, batch.at = outcome, time.time()

    def _queue(self) -> str:
        return self.random.choice(["default", "default", "default", "mail", "mail", "narrow"])

    def _options(self) -> dict[str, Any]:
        rnd = self.random
        options: dict[str, Any] = {"queue": self._queue(), "priority": rnd.choice([0, 0, 0, 7])}
        if rnd.random() < 0.15:
            options["delay"] = rnd.choice([0.01, 0.3, 2.0])
        return options

    def _task(self, n: int) -> tempers.Numbered:
        rnd = self.random
        match rnd.randrange(24):
            case 0 | 1 | 2:
                return tempers.Slow(n=n, seconds=rnd.choice([0.01, 0.1, 0.5]))
            case 3:
                return tempers.Slow(n=n, seconds=rnd.choice([1.0, 2.0, 5.0]))
            case 4 | 5:
                return tempers.Fail(n=n, times=rnd.choice([1, 2]))
            case 6:
                return tempers.Doomed(n=n)
            case 7:
                return tempers.TimedOut(n=n)
            case 8 | 9:
                return tempers.Thread(n=n, seconds=rnd.choice([0.0, 0.05, 0.5]))
            case 10:
                return tempers.Verdict(n=n, says=rnd.choice(["retry", "cancel", "dead"]))
            case _:
                return tempers.Quick(n=n)

    async def _pause(self, longest: float) -> None:
        await asyncio.sleep(self.random.random() ** 3 * longest)


def payload_of(task: tempers.Numbered) -> bytes:
    fields: dict[str, Any] = {name: getattr(task, name) for name in task.__struct_fields__}
    return json.dumps(fields).encode()


WAYS = (
    *("after", "after", "pool", "pool", "transaction", "transaction", "transaction", "insert", "insert"),
    *("keyed", "keyed", "burst", "copy", "select", "psql", "meddle", "unique", "unique", "unique"),
)
