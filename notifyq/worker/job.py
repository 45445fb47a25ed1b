"""A claimed task, and the statements that claim."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import NamedTuple

import asyncpg

from ..database.connection import SQL, Connection
from ..database.errors import UNREADABLE
from .cursors import FromCursor

# The answer to a claim has at most about CLAIM_BYTES of payloads. A larger payload than INLINE_MOST is left out, and a
# runner fetches it later. The more tasks a claim asks for, the lower this bound: INLINE_LEAST for 2,048 tasks or more.
CLAIM_BYTES = 4 * 1024 * 1024
INLINE_LEAST, INLINE_MOST = 2 * 1024, 16 * 1024


class Deadline(NamedTuple):
    """By when an attempt must begin, or else the task is cancelled: it has `expires`."""

    expires_at: datetime  # by the server's clock
    until: float  # the same time, of time.monotonic()

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self.until


class Job:
    """A claimed row: one attempt of one task. (id, worker, attempt) is its lease."""

    __slots__ = (
        "attempt",
        "created_at",
        "deadline",
        "excused",
        "id",
        "max_attempts",
        "needs_admission",
        "payload",
        "priority",
        "queue",
        "size",
        "type",
        "worker",
    )

    def __init__(self, worker: int, row: asyncpg.Record) -> None:
        self.worker = worker
        id, attempt, type, queue, priority, max_attempts, created_at, payload, needs_admission, excused = row
        self.id: int = id
        self.attempt: int = attempt
        self.type: str = type
        self.queue: str = queue
        self.priority: int = priority
        self.max_attempts: int | None = max_attempts
        self.created_at: datetime = created_at
        # Whether it needs admission before it runs. None: a trigger has undone the claim (see claim.sql).
        self.needs_admission: bool | None = needs_admission
        self.excused: int = excused or 0  # attempts that don't count, as another task may have killed their worker
        self.payload: bytes | None = payload  # None: large, its runner fetches it (large_payloads.py)
        self.size = 0  # bytes of the payload, if it was large
        self.deadline: Deadline | None = None  # set by its admission


class Threads(NamedTuple):
    """What a claim counts of plain handlers' tasks, as claim_fitting.sql wants it: parallel lists, by type."""

    types: list[str]
    shares: list[int]  # how many tasks of the type share a thread
    held: list[int]  # how many of them are held
    spare: int  # how many threads are free

    def opened(self, jobs: Iterable[Job]) -> int:
        """How many free threads `jobs` take."""
        counts = Counter(job.type for job in jobs)
        each = zip(self.types, self.shares, self.held, strict=True)
        return sum(-(-(held + counts[type]) // share) + -held // share for type, share, held in each)


async def claim(
    conn: Connection,
    worker: int,
    free: Mapping[str, int],
    limit: int,
    *,
    from_cursor: FromCursor | None = None,
    unhandled: Sequence[str] | None = None,
    threads: Threads | None = None,
    blind: bool = False,
) -> list[Job]:
    """Up to `limit` ready tasks, at most `free` of each queue, in the order to run them.

    from_cursor  only tasks from there on
    unhandled    only tasks of these types that other workers released, as they have no handler for them
    threads      no task of a plain handler that these threads have no place for
    blind        claim without any payload
    """
    inline = 0 if blind else _inline(limit)
    try:
        jobs = await _claim(conn, worker, free, limit, from_cursor, unhandled, threads, inline)
    except UNREADABLE:
        # A payload can be stored that can't be sent: 1400 times 1e131071 has 16 kB in the row, and 180 MB as text.
        jobs = await _claim(conn, worker, free, limit, from_cursor, unhandled, threads, 0)
    put_in_order(jobs)
    return jobs


def _inline(limit: int) -> int:
    """The most bytes that a payload may have to come with the answer to a claim of up to `limit` tasks."""
    return max(INLINE_LEAST, min(INLINE_MOST, CLAIM_BYTES // max(limit, 1)))


async def claim_by_id(conn: Connection, worker: int, ids: list[int], limit: int, *, blind: bool = False) -> list[Job]:
    """Claim those of the tasks that can still be claimed, in no order. `limit` bounds their payloads, as in `claim`."""
    try:
        rows = await conn.fetch(SQL["claim_by_id"], worker, ids, 0 if blind else _inline(limit))
    except UNREADABLE:
        rows = await conn.fetch(SQL["claim_by_id"], worker, ids, 0)
    return [Job(worker, row) for row in rows]


async def _claim(
    conn: Connection,
    worker: int,
    free: Mapping[str, int],
    limit: int,
    from_cursor: FromCursor | None,
    unhandled: Sequence[str] | None,
    threads: Threads | None,
    inline: int,
) -> list[Job]:
    args = (worker, list(free), list(free.values()), limit)
    if unhandled is not None:
        rows = await conn.fetch(SQL["claim_unhandled"], *args, unhandled, inline)
    elif threads is not None and from_cursor is not None:
        rows = await conn.fetch(SQL["claim_from_cursor_fitting"], *args, *from_cursor, inline, *threads)
    elif threads is not None:
        rows = await conn.fetch(SQL["claim_fitting"], *args, inline, *threads)
    elif from_cursor is not None:
        rows = await conn.fetch(SQL["claim_from_cursor"], *args, *from_cursor, inline)
    else:
        rows = await conn.fetch(SQL["claim"], *args, inline)
    return [Job(worker, row) for row in rows]


def put_in_order(jobs: list[Job]) -> None:
    """Sort by priority, and within a priority by id: the order to run them in, which UPDATE ... RETURNING doesn't
    keep."""
    jobs.sort(key=attrgetter("id"))
    jobs.sort(key=attrgetter("priority"), reverse=True)  # a stable sort: the order by id stays


def set_deadlines(jobs: Iterable[Job], answer: Iterable[asyncpg.Record]) -> None:
    """Note by when these jobs must begin, as admit.sql has just answered."""
    now = time.monotonic()
    left = {row["id"]: Deadline(row["expires_at"], now + row["seconds_left"]) for row in answer if row["expires_at"]}
    for job in jobs if left else ():
        job.deadline = left.get(job.id)
