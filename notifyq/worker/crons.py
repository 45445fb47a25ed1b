"""What a worker does for the crons of its app: it writes them into notifyq.cron, and enqueues the tasks of due slots.

schema.sql ("Cron") says which worker looks when, and why each slot has one task. The database's clock counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import asyncpg
from cronsim import CronSimError

from .. import log
from ..cron import Cron, next_slot
from ..database.connection import SQL

if TYPE_CHECKING:
    from ..database.connection import Connection

logger = log.logger("notifyq.cron")

AHEAD_SECONDS = 3.0  # twice as long as the keeper's heartbeats are apart
MISSED_SECONDS = 60.0  # a slot that nobody saw to for so long was missed; before that it is only late
IMPLAUSIBLE_SECONDS = 60.0  # beyond the slot that the schedule gives from now
AT_ONCE = 100  # slots of one schedule, each time


class Schedule:
    """A worker's crons, in its keeper's hands."""

    def __init__(self, crons: Mapping[str, Cron]) -> None:
        self._crons = crons
        self._written = False
        self._plausible: dict[str, datetime] = {}  # next slots that were compared with their schedules,
        self._judged_at: datetime | None = None  # and when, by the database's clock
        self._contested: set[str] = set()  # names that another app has too
        self._poisoned: set[tuple[str, str, str]] = set()

    async def begin(self, conn: Connection, worker: int) -> None:
        """Of a worker that has just registered. What its app says of its crons is written once: when it starts."""
        if not self._crons:
            return
        if not self._written:
            await self.compare(conn, worker, "replaces that of another app")
            await conn.execute(SQL["register_crons"], *self._columns())
            self._written = True
        await conn.execute(SQL["set_served_crons"], worker, list(self._crons))

    def _columns(self) -> list[list[object]]:
        return [list(column) for column in zip(*self._crons.values(), strict=True)]

    async def compare(self, conn: Connection, worker: int, what: str = "was overwritten by another app") -> None:
        """Say which crons another app has under the same names: the last one that started has its way, and the other's
        would stop without a word."""
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

    async def look(self, conn: Connection) -> None:
        """Enqueue what is about to be due. Raises the first error of PostgreSQL's once all crons had their turn."""
        if not self._crons:
            return
        refused: asyncpg.PostgresError | None = None
        for name, expression, tz, missed, next_at, now, since in await conn.fetch(
            SQL["list_due_crons"], list(self._crons), AHEAD_SECONDS,
            list(self._plausible), list(self._plausible.values()), self._judged_at,
        ):  # fmt: skip
            try:
                if next_at is not None and next_at > now + timedelta(seconds=AHEAD_SECONDS):
                    await self._judge(conn, name, expression, tz, next_at, now, since)
                    continue
                await self._see_to(conn, name, expression, tz, missed, next_at, now, since)
            except asyncpg.PostgresError as error:  # of this cron's task, say; another's may be put
                if conn.is_closed():
                    raise
                refused = refused or error
            except (CronSimError, ValueError, OverflowError) as error:
                if (poison := (name, expression, tz)) not in self._poisoned:
                    self._poisoned.add(poison)
                    logger.error(
                        "a cron that can't be reckoned; nothing is enqueued for it until its row is mended",
                        extra={
                            "fields": {
                                "cron": name,
                                "expression": expression,
                                "tz": tz,
                                "error": str(error) or type(error).__name__,
                            }
                        },
                    )
        if refused is not None:
            raise refused

    async def _judge(
        self, conn: Connection, name: str, expression: str, tz: str, next_at: datetime, now: datetime, since: datetime
    ) -> None:
        """Compute a slot anew that the schedule can't have given at this time: the server's clock was ahead when it was
        computed. Until that time comes, the cron would enqueue nothing."""
        expected = next_slot(expression, tz, now + timedelta(seconds=AHEAD_SECONDS))
        if next_at > expected + timedelta(seconds=IMPLAUSIBLE_SECONDS):
            expected = next_slot(expression, tz, since)
            if not await conn.fetchval(SQL["enqueue_cron_slot"], name, next_at, expected, False):
                return
            logger.warning(
                "the next slot of cron %s was %s, far beyond its schedule, as after a wrong clock; it is %s now",
                name, next_at, expected, extra={"fields": {"cron": name}},
            )  # fmt: skip
            next_at = expected
        self._plausible[name] = next_at
        self._judged_at = now

    async def _see_to(
        self,
        conn: Connection,
        name: str,
        expression: str,
        tz: str,
        missed: str,
        slot: datetime | None,
        now: datetime,
        since: datetime,
    ) -> None:
        for _ in range(AT_ONCE):
            if slot is None:
                put, following = False, next_slot(expression, tz, since)
            elif slot < now - timedelta(seconds=MISSED_SECONDS):  # one run for all, or none
                put, following = missed == "once", next_slot(expression, tz, now)
            else:
                put, following = True, next_slot(expression, tz, slot)
            if not await conn.fetchval(SQL["enqueue_cron_slot"], name, slot, following, put):
                return  # somebody else did, or it was paused
            slot = following
            if slot > now + timedelta(seconds=AHEAD_SECONDS):
                return
