"""Tasks that PostgreSQL doesn't let a worker take, beside others that it does: somebody has added a CHECK or a trigger
to notifyq.task.

A claim takes many rows with one statement, and so does the promotion of due tasks. One row that is refused fails it,
and comes first again the next time. So after a refusal the worker asks what the statement would have taken, and takes
halves of that, down to one row. One that is refused alone is left out for a pause, which doubles each time; then it is
tried again, as what was in its way may be gone. While any is left out, all is taken in this way. Before, that costs
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import asyncpg

from . import log, schema
from .codec import describe
from .store import SQL, Connection, Job, claim_these, is_refusal

logger = log.logger("notifyq.claim")

MOST = 10_000  # left out at once; what is refused beyond them keeps those behind it waiting
PAUSE_LEAST, PAUSE_MOST = 1.0, 300.0  # seconds
GONE_SECONDS = 60.0  # for which one wasn't there to be tried

REFUSED = (
    "PostgreSQL doesn't let these tasks be taken: they stay as they are, and are tried again; is there a constraint or "
    "a trigger on notifyq.task?"
)

_Row = TypeVar("_Row")


class _Pause:
    __slots__ = ("due", "seconds")

    def __init__(self) -> None:
        self.seconds = PAUSE_LEAST
        self.due = time.monotonic() + self.seconds

    def again(self) -> None:
        self.seconds = min(PAUSE_MOST, self.seconds * 2)
        self.due = time.monotonic() + self.seconds


class LeftOut:
    """A claimer's."""

    def __init__(self) -> None:
        self._pauses: dict[int, _Pause] = {}
        self._refusals = 0

    def __bool__(self) -> bool:
        return bool(self._pauses)

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        return f"PostgreSQL doesn't let {len(self._pauses)} tasks be taken" if self._pauses else ""

    @property
    def ids(self) -> list[int]:
        """Those whose pauses aren't over."""
        now = time.monotonic()
        return [id for id, pause in self._pauses.items() if pause.due > now]

    async def claim(
        self,
        conn: Connection,
        worker: int,
        rooms: Mapping[str, int],
        limit: int,
        *,
        aside: Sequence[str] | None = None,
        without: Sequence[str] = (),
        blind: bool = False,
    ) -> list[Job]:
        """As store.claim, from the front. Tasks of the types `without` are left, with the room that they would take."""
        args = list(rooms), list(rooms.values()), limit
        return await self._claim_these(
            conn, worker, limit, lambda ids: conn.fetch(SQL["claimable"], *args, ids, aside, without), blind=blind
        )

    async def claim_suspects(
        self, conn: Connection, worker: int, keys: list[str], types: Sequence[str], crashes: int, limit: int
    ) -> list[Job]:
        """As store.claim_suspects."""
        args = keys, types, crashes, limit
        return await self._claim_these(conn, worker, limit, lambda ids: conn.fetch(SQL["suspected"], *args, ids))

    async def promote(self, conn: Connection, queues: Sequence[str], most: int) -> int:
        """Make up to `most` due tasks of each queue ready. Returns how many."""
        rows = await conn.fetch(SQL["promotable"], queues, most, self.ids)

        async def promote_these(ids: list[int]) -> list[Any]:
            return await conn.fetch(SQL["promote_these"], ids)

        return len(await self._each([row[0] for row in rows], promote_these))

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
            return await claim_these(conn, worker, ids, limit, blind=blind)

        refusals = self._refusals
        jobs = await self._each([row[0] for row in await look(self.ids)], these)
        while not jobs and refusals < self._refusals:  # else those behind a crowd of refused ones would wait
            refusals = self._refusals
            jobs = await self._each([row[0] for row in await look(list(self._pauses))], these)
        jobs.sort(key=lambda job: (-job.priority, job.id))
        return jobs

    async def _each(self, ids: list[int], take: Callable[[list[int]], Awaitable[list[_Row]]]) -> list[_Row]:
        """Take all of these that can be taken."""
        taken: list[_Row] = []
        refused: dict[str, list[int]] = {}  # for the first time, by reason
        known = bool(self._pauses)
        now = time.monotonic()
        parts = [ids] if ids else []
        while parts and len(self._pauses) < MOST:
            part = parts.pop()
            try:
                taken += await take(part)
            except asyncpg.PostgresError as error:
                if not is_refusal(error) or schema.gone(error):
                    raise
                if len(part) > 1:
                    half = len(part) // 2
                    parts += [part[half:], part[:half]]
                    continue
                self._refusals += 1
                if (pause := self._pauses.get(part[0])) is not None:
                    pause.again()
                else:
                    self._pauses[part[0]] = _Pause()
                    refused.setdefault(describe(error).splitlines()[0], []).append(part[0])
            else:
                if known and [id for id in part if self._pauses.pop(id, None)]:
                    for pause in self._pauses.values():
                        pause.due = min(pause.due, now)  # what is in the way of these may be gone too
        # What was due for so long, and wasn't there to be tried, has gone.
        for id in [id for id, pause in self._pauses.items() if pause.due < now - GONE_SECONDS]:
            del self._pauses[id]
        for why, which in refused.items():
            logger.error(REFUSED, extra={"fields": {"ids": which[:20], "tasks": len(which), "error": why}})
        if known and not self._pauses:
            logger.info("no task is refused any more")
        return taken
