"""Admit: which of the claimed tasks may run now; the others are parked where they wait for others (schema.sql tells).

Only what has a limit_key, an order_key or `after`, or is of a queue with a limit for the whole fleet, is asked about:
one round trip between its claim and its start. The settings of queues come with what the claimer asks before it sleeps
(check_due.sql), at least every 0.25 s while it claims, and when the bell says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from ..database.connection import SQL, Connection
from .job import Job
from .left_out import LeftOut

_parse = msgspec.json.Decoder(dict[str, tuple[bool, bool]]).decode


class Admission:
    """A claimer's: told of settings, asked with each claim."""

    def __init__(self, types: Iterable[str], left_out: LeftOut) -> None:
        self._types = frozenset(types)
        self._left_out = left_out
        self._text: str | None = None
        self.unsure = False  # the last time, some were parked for the ends of others, which may have come meanwhile
        self.paused: frozenset[str] = frozenset()
        self.limited: frozenset[str] = frozenset()

    async def heard(self, conn: Connection, worker: int, settings: str | None) -> None:
        """What check_due.sql says of the queues. Of one that is limited from now on, what runs here counts."""
        if settings == self._text:
            return
        queues: Mapping[str, tuple[bool, bool]] = _parse(settings) if settings is not None else {}
        limited = frozenset(name for name, (_, is_limited) in queues.items() if is_limited)
        if new := limited - self.limited:
            await conn.execute(SQL["admit_running"], worker, sorted(new))
        self.limited = limited
        self.paused = frozenset(name for name, (is_paused, _) in queues.items() if is_paused)
        self._text = settings

    async def admit(self, conn: Connection, worker: int, jobs: list[Job]) -> tuple[list[Job], list[Job]]:
        """Those that may run, in their order; and those to be handed back, as somebody has just locked them, or as
        PostgreSQL doesn't let them be parked.

        What this worker has no handler for isn't asked about: it takes no place, and goes aside.
        """
        self.unsure = False
        asked = [job for job in jobs if (job.needs_admission or job.queue in self.limited) and job.type in self._types]
        if not asked:
            return jobs, []
        rows = await self._left_out.admit(conn, worker, asked)
        waits: dict[int, str | None] = {row[0]: row[1] for row in rows}
        self.unsure = "after" in waits.values()
        locked = [job for job in asked if job.id not in waits]
        kept = {job.id for job in asked if waits.get(job.id, "") is not None}
        return [job for job in jobs if job.id not in kept], locked
