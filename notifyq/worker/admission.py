"""Admission: which of the claimed tasks may run now. The others are parked, as schema.sql tells.

PostgreSQL is asked only about tasks with a limit_key, an order_key, `after` or `expires`, and about those of a queue
that has a limit for all workers together. It cancels those that have expired. That is one round trip between a task's
claim and its start. The settings of the queues come with each due check (check_due.sql): before the worker sleeps, at
least every 0.25 s while it claims, and when the bell says that they have changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..database.connection import SQL, Connection
from .job import Job
from .left_out import LeftOut

_parse = msgspec.json.Decoder(dict[str, tuple[bool, bool]]).decode


class Admission:
    """Decides which of the tasks that one worker claims may run. It gets the queues' settings from each due check, and
    is asked after each claim."""

    def __init__(self, types: list[str], left_out: LeftOut) -> None:
        self.types = types
        self.left_out = left_out  # tasks that PostgreSQL refuses to have claimed
        self._types = frozenset(types)
        self._settings: str | None = None
        self.recheck = False  # tasks were just parked to wait for others, which may have ended meanwhile
        self.paused: frozenset[str] = frozenset()
        self.limited: frozenset[str] = frozenset()

    async def note_settings(self, conn: Connection, worker: int, settings: str | None) -> None:
        """Take over what check_due.sql says of the queues. If one has become limited, its tasks that run here count."""
        if settings == self._settings:
            return
        queues: Mapping[str, tuple[bool, bool]] = _parse(settings) if settings is not None else {}
        limited = frozenset(name for name, (_, is_limited) in queues.items() if is_limited)
        if new := limited - self.limited:
            await conn.execute(SQL["admit_running"], worker, sorted(new))
        self.limited = limited
        self.paused = frozenset(name for name, (is_paused, _) in queues.items() if is_paused)
        self._settings = settings

    async def admit(self, conn: Connection, worker: int, jobs: list[Job]) -> tuple[list[Job], list[Job]]:
        """Returns the tasks that may run, in their order, and those to be handed back: another session has just locked
        them, or PostgreSQL refuses to park them.

        Tasks that this worker has no handler for are among the first without being asked about: they take no slot, and
        are released.
        """
        self.recheck = False
        asked = [job for job in jobs if (job.needs_admission or job.queue in self.limited) and job.type in self._types]
        if not asked:
            return jobs, []
        rows = await self.left_out.admit(conn, worker, asked)
        waits: dict[int, str | None] = {row[0]: row[1] for row in rows}
        self.recheck = "after" in waits.values()
        locked = [job for job in asked if job.id not in waits]
        kept = {job.id for job in asked if waits.get(job.id, "") is not None}
        return [job for job in jobs if job.id not in kept], locked
