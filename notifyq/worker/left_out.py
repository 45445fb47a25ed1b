"""Tasks that PostgreSQL refuses to let a worker take, while it lets it take others: a CHECK or a trigger was added to
notifyq.task.

A claim takes many rows with one statement, and so does the promotion of due tasks. One row that is refused fails the
statement, and comes first again the next time. So after a refusal the worker asks which rows the statement would have
taken, and takes halves of them, down to one row. A row that is refused alone is left out for a pause, which doubles
each time. Then it is tried again, since the cause may be gone. The same goes for a row that the statement returns
without the worker's lease. While any task is left out, all tasks are taken in this way. While none is, this costs
nothing.

Two more statements write rows of tasks. `admit` parks claimed tasks that may not run yet. After a refusal it too is
given halves, and a task that is refused alone is handed back and left out. `release_waiters` makes parked tasks ready.
After a refusal it is given one row of notifyq.slot_released at a time, and a row that is refused is put last: the tasks
that wait at its keys, or for its task's end, go on waiting, and all others are released.

Tasks are taken back in the same way from a worker that is dead, that stops, or that lost the answer to its claim.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import asyncpg

from .. import log
from ..codec import first_line
from ..database.connection import SQL, Connection
from ..database.errors import is_refusal
from ..pause import Pause
from .job import Job, claim_by_id, put_in_order, set_deadlines

logger = log.logger("notifyq.claim")

MOST = 10_000  # tasks that are left out at the same time; if more are refused, the tasks behind them wait
PAUSE_LEAST, PAUSE_MOST = 1.0, 300.0  # seconds
RELEASED_AT_ONCE = 1000  # rows of notifyq.slot_released in one statement
GONE_SECONDS = 60.0  # a task that has been due for so long, and wasn't found, is forgotten

REFUSED = (
    "PostgreSQL doesn't let these tasks be taken: they stay as they are, and are tried again; is there a constraint or "
    "a trigger on notifyq.task?"
)
UNDONE = (
    "a trigger undid it, though it raises nothing: a BEFORE trigger on notifyq.task must return NEW on UPDATE, and "
    "leave notifyq's columns as they are"
)
NOT_PARKED = (
    "PostgreSQL doesn't let these tasks be parked, or others at their keys be released: they are ready again, and are "
    "tried again; is there a constraint or a trigger on notifyq.task?"
)
NOT_RELEASED = (
    "PostgreSQL doesn't let tasks be released that wait here: they stay parked, and are tried again; is there a "
    "constraint or a trigger on notifyq.task?"
)
NOT_TAKEN_BACK = (
    "PostgreSQL doesn't let these tasks be taken back from a worker that is gone: they stay `running`, and are tried "
    "again; is there a constraint or a trigger on notifyq.task?"
)
NOT_HANDED_BACK = (
    "PostgreSQL doesn't let this worker hand these tasks back: they stay `running` when it has stopped, and other "
    "workers try to take them back; is there a constraint or a trigger on notifyq.task?"
)
NOT_RECLAIMED = (
    "PostgreSQL doesn't let this worker hand back tasks whose claim went unanswered: they stay `running`, and are "
    "tried again when its connection is lost, or when it stops; is there a constraint or a trigger on notifyq.task?"
)
REFUSALS = 20  # after so many refusals, one call of release_waiters ends
REFUSALS_BACK = 100  # the same where tasks are taken back from a worker, as the next heartbeat is due soon
HELD = "SELECT t.id FROM notifyq.task t WHERE t.worker = $1 ORDER BY t.id"

_Item = TypeVar("_Item")


class LeftOut:
    """The tasks that a claimer leaves out, or a heartbeat's thread."""

    def __init__(self) -> None:
        self._pauses: dict[int, Pause] = {}
        self._not_parked: dict[int, Pause] = {}  # tasks that can be claimed, but not parked
        self._undone: set[int] = set()  # tasks of the last claim that a trigger has undone
        self._not_released: set[str] = set()  # rows of slot_released whose waiters can't be released, in words
        self._refusals = 0  # so far

    def __bool__(self) -> bool:
        return bool(self._pauses or self._not_parked)

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        if self:
            return f"PostgreSQL doesn't let {len(self._pauses) + len(self._not_parked)} tasks be taken"
        return (
            f"PostgreSQL doesn't let tasks be released at {len(self._not_released)} keys" if self._not_released else ""
        )

    @property
    def ids(self) -> list[int]:
        """The tasks whose pauses aren't over."""
        now = time.monotonic()
        pauses = (*self._pauses.items(), *self._not_parked.items())
        return [id for id, pause in pauses if pause.due > now]

    def drop_undone(self, jobs: list[Job]) -> list[Job]:
        """The jobs that were really claimed. A trigger has undone the others' claim: leave them out from now on."""
        if None not in [job.needs_admission for job in jobs]:
            return jobs
        self._leave_out({job.id for job in jobs if job.needs_admission is None})
        return [job for job in jobs if job.needs_admission is not None]

    def _leave_out(self, undone: set[int]) -> None:
        """Pause these tasks: a statement wrote them, and a trigger has undone that."""
        self._undone = undone
        self._refusals += len(undone)
        if first := [id for id in sorted(undone) if _pause(self._pauses, id)]:
            _log_refused(REFUSED, {UNDONE: first})

    async def claim(
        self,
        conn: Connection,
        worker: int,
        free: Mapping[str, int],
        limit: int,
        *,
        unhandled: Sequence[str] | None = None,
        without: Sequence[str] = (),
        blind: bool = False,
    ) -> list[Job]:
        """As job.claim, from the head. Tasks of the types `without` stay, and take none of the capacity."""
        args = list(free), list(free.values()), limit
        return await self._claim_these(
            conn,
            worker,
            limit,
            lambda ids: conn.fetch(SQL["list_claimable"], *args, ids, unhandled, without),
            blind=blind,
        )

    async def claim_crashed(
        self, conn: Connection, worker: int, keys: list[str], types: Sequence[str], crashes: int, limit: int
    ) -> list[Job]:
        """Claim up to `limit` tasks whose workers have vanished `crashes` times. Their `keys` say in which queues."""

        async def crashed(without: list[int]) -> list[asyncpg.Record]:
            rows = await conn.fetch(SQL["list_crashed"], keys, types, without, limit)
            return [row for row in rows if row["crashes"] == crashes]

        return await self._claim_these(conn, worker, limit, crashed)

    async def promote(self, conn: Connection, queues: Sequence[str], most: int) -> int:
        """Make up to `most` due tasks of each queue ready. Returns how many."""
        rows = await conn.fetch(SQL["list_due"], queues, most, self.ids)

        async def promote_these(ids: list[int]) -> list[Any]:
            rows = await conn.fetch(SQL["promote_by_id"], ids)
            if undone := {row[0] for row in rows if not row[1]}:
                self._leave_out(undone)
            return [row for row in rows if row[0] not in undone]

        return len(await self._each([row[0] for row in rows], promote_these))

    async def admit(self, conn: Connection, worker: int, jobs: Sequence[Job]) -> list[asyncpg.Record]:
        """The rows that admit.sql returns for claimed tasks. It returns none for a task that is refused. Sets the
        deadlines of the jobs that have one."""
        rows: list[asyncpg.Record] = []
        refused: dict[str, list[int]] = {}

        async def these(part: Sequence[Job]) -> None:
            ids, attempts = [job.id for job in part], [job.attempt for job in part]
            answer = await conn.fetch(SQL["admit"], worker, ids, attempts)
            set_deadlines(part, answer)
            rows.extend(answer)
            if self._not_parked and [id for id in ids if self._not_parked.pop(id, None)] and not self:
                logger.info("no task is refused any more")

        def alone(job: Job, why: str) -> None:
            if _pause(self._not_parked, job.id):
                refused.setdefault(why, []).append(job.id)

        await _in_halves(jobs, these, alone)
        _log_refused(NOT_PARKED, refused)
        return rows

    async def release_waiters(self, conn: Connection) -> int:
        """Make ready the tasks that waited for ended ones. Returns how many."""
        if not self._not_released:
            all_ready: int | None = await unless_refused(conn.fetchval(SQL["release_waiters"], RELEASED_AT_ONCE))
            if all_ready is not None:
                return all_ready
        ready = 0
        refused: dict[str, str] = {}
        rows = await conn.fetchval(
            "SELECT count(*) FROM (SELECT FROM notifyq.slot_released LIMIT $1) AS f", RELEASED_AT_ONCE
        )
        left = max(1, rows)  # at least one call: a task may have been parked while the one that it waits for ended
        while left and len(refused) < REFUSALS:
            left -= 1
            try:
                ready += await conn.fetchval(SQL["release_waiters"], 1)
            except asyncpg.PostgresError as error:
                if not is_refusal(error):
                    raise
                later = await conn.fetch(SQL["postpone_release"])
                if len(later) > 1:
                    left += len(later)
                elif later or not rows:
                    where = dict(later[0]).items() if later else ()
                    said = " ".join(f"{name}={value}" for name, value in where if value is not None)
                    refused[said] = first_line(error)
        for said in refused.keys() - self._not_released:
            logger.error(NOT_RELEASED, extra={"fields": {"where": said, "error": refused[said]}})
        if self._not_released and not refused:
            logger.info("waiting tasks are released again")
        self._not_released = set(refused)
        return ready

    async def take_back(
        self, conn: Connection, worker: int, take: Callable[[list[int] | None], Awaitable[int]], message: str
    ) -> int:
        """Take back from `worker` all tasks that it holds and that can be taken. Returns how many.

        `take` is given ids, or None for all tasks, and returns how many it took."""
        if not self and (taken := await unless_refused(take(None))) is not None:
            return taken
        left = set(self.ids)
        ids = [row[0] for row in await conn.fetch(HELD, worker) if row[0] not in left]
        if not ids:
            return await take([])  # the statement does more than to take tasks

        async def these(ids: list[int]) -> list[None]:
            return [None] * await take(ids)

        return len(await self._each(ids, these, message))

    async def reclaim_unowned(self, conn: Connection) -> None:
        """Take the tasks of workers that aren't registered any more."""

        async def these(ids: list[int]) -> list[None]:
            return [None] * await conn.fetchval(SQL["reclaim_unowned"], ids)

        ids = [row[0] for row in await conn.fetch(SQL["list_unowned"], self.ids)]
        if taken := await self._each(ids, these, NOT_TAKEN_BACK):
            logger.warning("took back tasks of workers that are gone", extra={"fields": {"tasks": len(taken)}})

    async def _claim_these(
        self,
        conn: Connection,
        worker: int,
        limit: int,
        look: Callable[[list[int]], Awaitable[Sequence[asyncpg.Record]]],
        *,
        blind: bool = False,
    ) -> list[Job]:
        async def these(ids: list[int]) -> list[Job]:
            return self.drop_undone(await claim_by_id(conn, worker, ids, limit, blind=blind))

        refusals = self._refusals
        jobs = await self._each([row[0] for row in await look(self.ids)], these)
        while not jobs and refusals < self._refusals:  # else the tasks behind many refused ones would wait
            refusals = self._refusals
            jobs = await self._each([row[0] for row in await look([*self._pauses, *self._not_parked])], these)
        put_in_order(jobs)
        return jobs

    async def _each(
        self, ids: list[int], take: Callable[[list[int]], Awaitable[list[_Item]]], back: str = ""
    ) -> list[_Item]:
        """Take all of these that can be taken.

        back  take them back from a worker, and log this message for those that are refused
        """
        taken: list[_Item] = []
        refused: dict[str, list[int]] = {}  # those that are refused for the first time, by reason
        known = bool(self._pauses)
        now = time.monotonic()
        until = self._refusals + (REFUSALS_BACK if back else MOST)

        async def these(part: Sequence[int]) -> None:
            self._undone = set()
            rows = await take([*part])
            taken.extend(rows)
            # While another worker rescues a worker's tasks, none is taken: that says nothing about these.
            tried = [id for id in part if id not in self._undone] if not back or len(rows) >= len(part) else []
            if known and [id for id in tried if self._pauses.pop(id, None)]:
                for pause in self._pauses.values():
                    pause.due = min(pause.due, now)  # the cause may be gone for these too

        def alone(id: int, why: str) -> None:
            self._refusals += 1
            if _pause(self._pauses, id):
                refused.setdefault(why, []).append(id)

        await _in_halves(ids, these, alone, lambda: len(self._pauses) < MOST and self._refusals < until)
        # A task that was due for so long, and wasn't there to be tried, is gone.
        for pauses in (self._pauses, self._not_parked):
            for id in [id for id, pause in pauses.items() if pause.due < now - GONE_SECONDS]:
                del pauses[id]
        _log_refused(back or REFUSED, refused)
        if known and not self._pauses:
            logger.info("no task is refused any more")
        return taken


async def unless_refused(statement: Awaitable[_Item]) -> _Item | None:
    """The statement's answer; None if PostgreSQL refuses it because of its rows."""
    try:
        return await statement
    except asyncpg.PostgresError as error:
        if not is_refusal(error):
            raise
        return None


async def _in_halves(
    items: Sequence[_Item],
    take: Callable[[Sequence[_Item]], Awaitable[None]],
    alone: Callable[[_Item, str], None],
    more: Callable[[], bool] = lambda: True,
) -> None:
    """`take` all of them, and halves of those that PostgreSQL refuses, as long as there may be `more`. Call `alone` for
    each item that is refused by itself, with the reason."""
    parts = [items] if items else []
    while parts and more():
        part = parts.pop()
        try:
            await take(part)
        except asyncpg.PostgresError as error:
            if not is_refusal(error):
                raise
            if len(part) > 1:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
            else:
                alone(part[0], first_line(error))


def _pause(pauses: dict[int, Pause], id: int) -> bool:
    """Leave a task out, for longer than the last time. Returns whether this is the first time."""
    is_first = id not in pauses
    pauses.setdefault(id, Pause(PAUSE_LEAST, PAUSE_MOST)).lengthen()
    return is_first


def _log_refused(message: str, refused: Mapping[str, Sequence[int]]) -> None:
    """One line for each reason, not for each task."""
    for why, ids in refused.items():
        logger.error(message, extra={"fields": {"ids": ids[:20], "tasks": len(ids), "error": why}})
