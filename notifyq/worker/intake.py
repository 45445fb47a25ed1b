"""Intake: one claim. How many tasks to ask for and where to begin to read, the statement, and which may run.

A claim is never cancelled half-way: no worker would run the tasks that it took.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import anyio

from ..database.connection import SQL, Connection
from .admission import Admission
from .capacity import Capacity, Free
from .cursors import Cursors, FromCursor
from .job import Job, Threads, claim
from .left_out import unless_refused
from .outcome import HandedBack
from .runners import Runners
from .settle import Settler
from .state import State

BLIND_SECONDS = 60.0  # after a claim that timed out, during which claims take no payloads with them
RECHECK_SECONDS = 0.02  # after parking a task, until it looks whether the one that it waits for ended meanwhile


class Taken(NamedTuple):
    """What a claim took, and what it asked for."""

    jobs: list[Job]
    free: dict[str, int]
    limit: int
    threads: Threads | None
    from_head: bool


class Intake:
    """Claims for a claimer. It notes in the State which queues have more tasks, and when to claim from the head."""

    def __init__(
        self, capacity: Capacity, admission: Admission, runners: Runners, settler: Settler, state: State,
        wake: asyncio.Event,
    ) -> None:  # fmt: skip
        self._capacity = capacity
        self._admission = admission
        self._left_out = admission.left_out
        self._runners = runners
        self._settler = settler
        self._state = state
        self._wake = wake
        self._cursors = Cursors()
        self._blind_until = 0.0  # until then, claim without payloads
        self._most: int | None = None  # tasks at once, after claims that timed out

    async def claim(self, conn: Connection, worker: int, free: Free, *, from_head: bool = False) -> tuple[int, bool]:
        """Claim, and feed the runners. Returns how many tasks came, and whether these were as many as it asked for."""
        clock = asyncio.get_running_loop().time
        if not free.by_queue:  # all are paused
            self._note_claim([], True, 0.0, clock())
            return 0, False
        ready: list[Job] = []
        locked: list[Job] = []
        taken = Taken([], free.by_queue, free.total, None, True)
        with anyio.CancelScope(shield=True):
            taken = await self._take_all(conn, worker, free, from_head)
            ready, locked = await self._admission.admit(conn, worker, taken.jobs)
            if self._admission.recheck:
                asyncio.get_running_loop().call_later(RECHECK_SECONDS, self._release_waiters)
        self.feed(ready, locked)
        now = clock()
        unfit = self._capacity.claimed(taken.jobs, taken.free, taken.limit, taken.threads, now)
        self._note_queues(taken, now)
        if unfit and taken.from_head:
            await self._leave_unfit(conn, unfit, took_some=bool(taken.jobs))
        return len(taken.jobs), len(taken.jobs) >= taken.limit

    async def claim_crashed(self, conn: Connection, worker: int, keys: list[str], crashes: int, most: int) -> list[Job]:
        """Up to `most` tasks whose workers have vanished `crashes` times. Returns those that run now."""
        ready: list[Job] = []
        locked: list[Job] = []
        with anyio.CancelScope(shield=True):
            jobs = await self._left_out.claim_crashed(conn, worker, keys, self._admission.types, crashes, most)
            ready, locked = await self._admission.admit(conn, worker, jobs)
        self.feed(ready, locked)
        return ready

    def feed(self, ready: Sequence[Job], locked: Sequence[Job]) -> None:
        self._runners.add_jobs(ready)
        for job in locked:
            self._settler.put(HandedBack(job))

    async def _take_all(self, conn: Connection, worker: int, free: Free, from_head: bool) -> Taken:
        clock = asyncio.get_running_loop().time
        began = clock()
        from_cursor = None if from_head else self._cursors.from_cursor(began, self._state.backlog)
        by_queue, limit = free.by_queue, free.total
        if self._most is not None:
            limit = min(limit, self._most)
        if self._left_out and (fitting := self._capacity.fitting()):
            limit = min(limit, fitting)
        threads = self._capacity.threads(limit)
        blind = began < self._blind_until
        try:
            jobs = await self._take(
                conn, worker, Free(by_queue, limit), from_cursor=from_cursor, threads=threads, blind=blind
            )
        except TimeoutError:
            # The next session asks for less. reclaim_unanswered.sql finds what this claim took, if anything.
            self._blind_until = clock() + BLIND_SECONDS
            self._most = max(1, limit // 2)
            raise
        if self._most is not None:
            self._most = self._most * 2 if self._most < self._capacity.concurrency else None
        now = clock()
        self._note_claim(jobs, from_cursor is None, now - began, now)
        if self._state.unhandled and len(jobs) < limit:
            await self._take_unhandled(conn, worker, Free(by_queue, limit), jobs, blind)
        return Taken(jobs, by_queue, limit, threads, from_cursor is None)

    async def _take_unhandled(self, conn: Connection, worker: int, free: Free, jobs: list[Job], blind: bool) -> None:
        """Add to `jobs` tasks that other workers have no handler for, up to the capacity that is left."""
        state = self._state
        for types, count in self._capacity.by_types(self._admission.types, jobs, free.total - len(jobs)):
            # How much capacity is left in each queue, counted on the safe side.
            left = {queue: most - len(jobs) for queue, most in free.by_queue.items() if most > len(jobs)}
            if (most := min(count, free.total - len(jobs), sum(left.values()))) <= 0:
                break
            state.unhandled = False  # before the claim: another worker may ring meanwhile
            more = await self._take(conn, worker, Free(left, most), unhandled=types, blind=blind)
            state.unhandled |= len(more) >= most
            jobs += more
        state.unhandled_plain = not self._capacity.fitting(jobs)

    async def _take(
        self,
        conn: Connection,
        worker: int,
        free: Free,
        *,
        from_cursor: FromCursor | None = None,
        unhandled: list[str] | None = None,
        threads: Threads | None = None,
        blind: bool,
    ) -> list[Job]:
        """Claim, but leave out the tasks that PostgreSQL refuses to have claimed."""
        where = (conn, worker, free.by_queue, free.total)
        if not self._left_out:
            answer = await unless_refused(
                claim(*where, from_cursor=from_cursor, unhandled=unhandled, threads=threads, blind=blind)
            )
            if answer is not None and ((jobs := self._left_out.drop_undone(answer)) or not self._left_out):
                self._state.claim_wanted |= bool(self._left_out)  # more may be behind those that were left out just now
                return jobs
        without = threads.types if threads else []
        return await self._left_out.claim(*where, unhandled=unhandled, without=without, blind=blind)

    # What is noted of a claim.

    def _note_claim(self, jobs: list[Job], from_head: bool, seconds: float, now: float) -> None:
        self._cursors.claimed(jobs, not from_head, seconds, now)
        self._state.head_scan_at = self._cursors.head_scan_at

    def _note_queues(self, taken: Taken, now: float) -> None:
        """Whether each queue may have more tasks than came."""
        counts = Counter([job.queue for job in taken.jobs])
        for queue, most in taken.free.items():
            if seconds := self._capacity.left_alone(queue, now):
                self._state.left.add(queue)
                asyncio.get_running_loop().call_later(seconds, self._wake.set)
            elif self._capacity.is_bounded(queue) and counts[queue] >= most:
                self._state.left.add(queue)
            else:
                self._state.left.discard(queue)

    async def _leave_unfit(self, conn: Connection, queues: list[str], *, took_some: bool) -> None:
        """A claim may have left tasks in these queues for want of a thread. Leave alone those of the queues in which
        such a task is the next. `took_some`: that claim took others."""
        types: dict[str, str] = {row[0]: row[1] for row in await conn.fetch(SQL["list_next_types"], queues)}
        now = asyncio.get_running_loop().time()
        for queue in queues:
            if queue in types and not self._capacity.fits(types[queue]):
                self._capacity.leave_alone(queue, now)
                asyncio.get_running_loop().call_later(self._capacity.left_alone(queue, now), self._wake.set)
                self._state.left.add(queue)
                continue
            self._capacity.go_on(queue)
            # If that claim took nothing, the task has just come, or another session has locked it: the due check tells.
            if queue in types and (took_some or self._capacity.fitting()):
                self._state.left.add(queue)

    def _release_waiters(self) -> None:
        self._state.release_wanted = True
        self._wake.set()
