"""Payloads that a claim leaves out since they are large: each is fetched when a runner gets to its task.

So the answer to a claim is small, whatever was enqueued, and a worker holds a bounded amount of large payloads:

    one answer            ends with the payload that takes it to STATEMENT_BYTES. The sizes are asked for first, and
                          the timeout of the answer grows with them
    all running attempts  once they hold HELD_BYTES, the next ones wait, in the order in which runners asked, until a
                          handler ends

The worker keeps the leases meanwhile, like those of other tasks that run. A statement that times out, or for which
PostgreSQL can't read a payload, is tried again for half as many tasks, down to one. That one task ends dead, with the
reason, if PostgreSQL can't read its payload, or if TRIES statements time out, each with twice the time of the one
before. A connection that fails is replaced, however often: no task is to blame.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TypeAlias

from ..codec import PAYLOAD_LIMIT
from ..database.connection import SQL, STATEMENT_BYTES, Connection, connect_worker, seconds_for
from ..database.errors import TRANSIENT, UNREADABLE
from .job import Job
from .pipe import Recovery

HELD_BYTES = 256 * 1024 * 1024
MOST = 100  # tasks in one statement
TRIES = 3
IDLE_SECONDS = 60.0  # how long the connection is kept for the next large payload

Answer: TypeAlias = bytes | str | None  # the payload; a str: why there is none; None: the lease is lost


class LargePayloads:
    """The large payloads of one worker. `read` them, and `release` each when its attempt has ended."""

    def __init__(self, dsn: str | None, recovery: Recovery) -> None:
        self._dsn = dsn
        self._recovery = recovery
        self._asked: dict[Job, asyncio.Future[Answer]] = {}  # in the order in which runners asked
        self.held: dict[Job, int] = {}  # bytes of the payloads of running attempts
        self._tries: dict[Job, int] = {}  # of statements that timed out for this one payload
        self._most = MOST  # tasks in the next statement
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._conn: Connection | None = None

    async def read(self, job: Job) -> Answer:
        """The payload of a job that was claimed without it. Raises nothing but a cancellation."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[job] = future
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="notifyq large payloads")
        try:
            return await future
        finally:
            self.cancel_request(job)

    def cancel_request(self, job: Job) -> bool:
        """Don't fetch this payload any more. False if no runner waits for it."""
        self._tries.pop(job, None)
        return self._asked.pop(job, None) is not None

    def release(self, job: Job) -> None:
        """The attempt has ended: its payload is held no more."""
        if self.held.pop(job, None) is not None:
            self._wake.set()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.terminate()
            self._conn = None

    async def _run(self) -> None:
        """Fetch until no runner has asked for a while."""
        try:
            while True:
                self._wake.clear()
                capacity = HELD_BYTES - sum(self.held.values())
                if not self._asked:
                    try:
                        async with asyncio.timeout(IDLE_SECONDS):
                            await self._wake.wait()
                    except TimeoutError:
                        if not self._asked:  # a runner may have asked in this moment
                            return
                elif capacity <= 0:
                    await self._wake.wait()
                else:
                    await self._fetch_some(min(capacity, STATEMENT_BYTES))
        except Exception as error:  # a bug: it fails the runners, and so the worker, visibly
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(error)
        finally:
            self._disconnect()

    async def _fetch_some(self, most: int) -> None:
        """Fetch the payloads that runners asked for first, until they are `most` bytes."""
        worker = next(iter(self._asked)).worker
        jobs = list(islice((job for job in self._asked if job.worker == worker), self._most))
        tries = self._tries.get(jobs[0], 0) if len(jobs) == 1 else 0
        sizes: dict[int, int | None] = {}
        seconds = 0.0
        try:
            if self._conn is None:
                self._conn = await connect_worker(self._dsn, "payloads")
        except TRANSIENT as error:
            await self._recovery.back_off("payloads", error)
            return
        try:
            seconds = seconds_for(0) * 2**tries
            rows = await self._conn.fetch(SQL["measure_payloads"], worker, *_keys(jobs), most, timeout=seconds)
            sizes = {row[0]: row[1] for row in rows}
            good = [job for job in jobs if (sizes.get(job.id) or PAYLOAD_LIMIT + 1) <= PAYLOAD_LIMIT]
            seconds = seconds_for(sum(sizes[job.id] or 0 for job in good)) * 2**tries
            rows = await self._conn.fetch(SQL["fetch_payloads"], worker, *_keys(good), timeout=seconds) if good else []
        except (TimeoutError, *UNREADABLE) as error:
            self._disconnect()
            self._note_failure(jobs, sizes, seconds, error)
            return
        except TRANSIENT as error:
            self._disconnect()
            await self._recovery.back_off("payloads", error)
            return
        self._recovery.note_success("payloads")
        self._most = min(MOST, self._most * 2)
        payloads: dict[int, bytes] = {row[0]: row[1] for row in rows}
        for job in jobs:
            if job.id not in sizes:
                continue  # it didn't fit into this answer
            size = sizes[job.id]
            job.size = size or 0
            if size is not None and size > PAYLOAD_LIMIT:
                self._answer(job, f"its payload is larger than {PAYLOAD_LIMIT:,} bytes")
            else:
                self._answer(job, payloads.get(job.id))

    def _note_failure(
        self, jobs: list[Job], sizes: dict[int, int | None], seconds: float, error: BaseException
    ) -> None:
        """A statement for these jobs timed out, or PostgreSQL can't read a payload."""
        if len(jobs) > 1:
            self._most = len(jobs) // 2
            return
        [job] = jobs
        if not isinstance(error, TimeoutError):
            self._answer(job, f"PostgreSQL can't read out its payload: {error}")
            return
        tries = self._tries[job] = self._tries.get(job, 0) + 1
        if tries < TRIES:
            return
        size = f"{sizes.get(job.id) or 0:,} bytes" if sizes else "not known, as it could not be measured"
        self._answer(
            job,
            f"its payload could not be fetched in {TRIES} tries, the last of which was given {seconds:.0f} s; its size "
            f"is {size} (the limit is {PAYLOAD_LIMIT:,}); is the way to the database that slow?",
        )

    def _answer(self, job: Job, answer: Answer) -> None:
        future = self._asked.pop(job, None)
        if future is not None and not future.done():
            if isinstance(answer, bytes):
                self.held[job] = len(answer)
            future.set_result(answer)


def _keys(jobs: list[Job]) -> tuple[list[int], list[int]]:
    return [job.id for job in jobs], [job.attempt for job in jobs]
