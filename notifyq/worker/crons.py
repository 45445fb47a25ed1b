"""The crons of a worker's app: write them into notifyq.cron, and enqueue the tasks of their due slots.

schema.sql ("Cron") says which worker looks when, and why each slot has one task. The database's clock counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg
from cronsim import CronSimError

from .. import log
from ..cron import Cron, next_slot
from ..database.connection import SQL, Connection

logger = log.logger("notifyq.cron")

AHEAD_SECONDS = 3.0  # how long before its time a slot is enqueued: twice the interval of heartbeats
MISSED_SECONDS = 60.0  # a slot that isn't enqueued so long after its time was missed; before that it is only late
IMPLAUSIBLE_SECONDS = 60.0  # a next slot so much later than the one that the schedule gives now is implausible
SLOTS_AT_ONCE = 100  # of one cron, each time


class Due(NamedTuple):
    """A row of list_due_crons.sql, which explains `since`."""

    name: str
    expression: str
    tz: str
    missed: str
    next_at: datetime | None
    now: datetime
    since: datetime

    @property
    def horizon(self) -> datetime:
        """Slots up to this time are enqueued now."""
        return self.now + timedelta(seconds=AHEAD_SECONDS)

    def slot_after(self, time: datetime) -> datetime:
        return next_slot(self.expression, self.tz, time)


class Crons:
    """The crons of one worker. Used in the heartbeat's thread only."""

    def __init__(self, crons: Mapping[str, Cron]) -> None:
        self._crons = crons
        self._written = False
        self._plausible: dict[str, datetime] = {}  # by name: the next slots that were found plausible,
        self._compared_at: datetime | None = None  # and when, by the database's clock
        self._contested: set[str] = set()  # names that another app has too
        self._unusable: set[tuple[str, str, str]] = set()  # name, expression, tz: no next slot can be computed

    async def register(self, conn: Connection, worker: int) -> None:
        """Say that `worker`, which has just registered, serves them. Write them first, if the app has just started."""
        if not self._crons:
            return
        if not self._written:
            await self.log_conflicts(conn, worker, "replaces that of another app")
            await conn.execute(SQL["register_crons"], *self._columns())
            self._written = True
        await conn.execute(SQL["set_served_crons"], worker, list(self._crons))

    def _columns(self) -> list[list[object]]:
        return [list(column) for column in zip(*self._crons.values(), strict=True)]

    async def log_conflicts(self, conn: Connection, worker: int, what: str = "was overwritten by another app") -> None:
        """Log which crons another app has under the same names: the app that started last replaces the other's crons,
        which would stop without a word."""
        if not self._crons:
            return
        rows = await conn.fetch(SQL["list_cron_conflicts"], *self._columns(), worker)
        for name, expression, tz, type, queue, other in rows:
            if name not in self._contested:
                logger.warning(
                    "cron %s of this app %s, which has %r (%s) for %s in queue %s and runs in worker %s. An older "
                    "version of this app ends soon; another service needs another name: @app.cron(..., name=...)",
                    name, what, expression, tz, type, queue, other, extra={"fields": {"cron": name}},
                )  # fmt: skip
        self._contested = {row[0] for row in rows}

    async def enqueue_due(self, conn: Connection) -> None:
        """Enqueue the slots that are about to be due. Raises PostgreSQL's first error after all crons were tried."""
        if not self._crons:
            return
        refused: asyncpg.PostgresError | None = None
        rows = await conn.fetch(
            SQL["list_due_crons"], list(self._crons), AHEAD_SECONDS, list(self._plausible),
            list(self._plausible.values()), self._compared_at,
        )  # fmt: skip
        for row in rows:
            cron = Due(*row)
            try:
                if cron.next_at is not None and cron.next_at > cron.horizon:
                    await self._check_next(conn, cron, cron.next_at)
                else:
                    await self._enqueue_slots(conn, cron)
            except asyncpg.PostgresError as error:  # perhaps it refuses this cron's task only
                if conn.is_closed():
                    raise
                refused = refused or error
            except (CronSimError, ValueError, OverflowError) as error:
                self._log_unusable(cron, error)
        if refused is not None:
            raise refused

    def _log_unusable(self, cron: Due, error: Exception) -> None:
        known = cron.name, cron.expression, cron.tz
        if known not in self._unusable:
            self._unusable.add(known)
            fields = {"cron": cron.name, "expression": cron.expression, "tz": cron.tz}
            logger.error(
                "a cron whose next slot can't be computed; nothing is enqueued for it until its row is mended",
                extra={"fields": {**fields, "error": str(error) or type(error).__name__}},
            )

    async def _check_next(self, conn: Connection, cron: Due, next_at: datetime) -> None:
        """Compute the next slot anew if the schedule can't give it at this time: the server's clock was ahead when it
        was computed. Otherwise the cron would enqueue nothing until that time comes."""
        if next_at > cron.slot_after(cron.horizon) + timedelta(seconds=IMPLAUSIBLE_SECONDS):
            slot = cron.slot_after(cron.since)
            if not await conn.fetchval(SQL["enqueue_cron_slot"], cron.name, next_at, slot, False):
                return
            logger.warning(
                "the next slot of cron %s was %s, far beyond its schedule, as after a wrong clock; it is %s now",
                cron.name, next_at, slot, extra={"fields": {"cron": cron.name}},
            )  # fmt: skip
            next_at = slot
        self._plausible[cron.name] = next_at
        self._compared_at = cron.now

    async def _enqueue_slots(self, conn: Connection, cron: Due) -> None:
        slot = cron.next_at
        for _ in range(SLOTS_AT_ONCE):
            if slot is None:
                put, following = False, cron.slot_after(cron.since)
            elif slot < cron.now - timedelta(seconds=MISSED_SECONDS):  # one task for all missed slots, or none
                put, following = cron.missed == "once", cron.slot_after(cron.now)
            else:
                put, following = True, cron.slot_after(slot)
            if not await conn.fetchval(SQL["enqueue_cron_slot"], cron.name, slot, following, put):
                return  # another worker did, or the cron was paused
            slot = following
            if slot > cron.horizon:
                return
