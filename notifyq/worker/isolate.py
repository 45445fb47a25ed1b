"""Isolate: run tasks whose workers have vanished, with no other task beside them, to find the one that kills workers.

schema.sql tells the rules, under "Tasks whose worker vanished". Only the holder of an advisory lock isolates.
"""

from __future__ import annotations

import asyncio

from .. import log
from ..database.connection import SQL, Connection, is_pooled
from .admission import Admission
from .capacity import Capacity
from .doorbell import BellConnection
from .intake import Intake
from .runners import Runners
from .state import Position, State
from .waiting import Waiting

logger = log.logger("notifyq.claim")

AT_ONCE = {2: 16, 3: 4}  # how many tasks are isolated together, by how often their workers vanished; above that, 1
# How long it waits until nothing else runs, and then for these tasks to end. Doubles with each crash.
PATIENCE_SECONDS, PATIENCE_MOST = 30.0, 600.0
REFUSED_SECONDS = 600.0  # for which another session may have the lock; then this worker isolates without it


class Isolation:
    """What one claimer does about tasks whose workers have vanished."""

    def __init__(
        self, capacity: Capacity, admission: Admission, intake: Intake, runners: Runners, waiting: Waiting, state: State
    ) -> None:
        self._capacity = capacity
        self._admission = admission
        self._intake = intake
        self._runners = runners
        self._waiting = waiting
        self._state = state
        self._refused_since: float | None = None  # since when another session has had the lock

    async def run(self, conn: Connection, worker: int, bell: BellConnection) -> int:
        """Isolate some tasks, if there are any to isolate. Returns how many it has begun."""
        clock = asyncio.get_running_loop().time
        self._state.isolation_wanted = False
        keys = [f"crashed:{queue}" for queue in self._capacity.queues if queue not in self._admission.paused]
        first = await conn.fetchrow(SQL["list_crashed"], keys, self._admission.types, self._admission.left_out.ids, 1)
        if first is None:
            self._refused_since = None
            return 0
        locked = False
        if not is_pooled(conn):
            locked = await conn.fetchval("SELECT pg_try_advisory_lock(1852990835, 0)")
            if not locked:
                # The holder isolates tasks, or is frozen, or is no worker. So don't wait for it for ever.
                self._refused_since = self._refused_since or clock()
                if clock() - self._refused_since < REFUSED_SECONDS:
                    return 0
        self._refused_since = None
        try:
            self._state.want(Position.AWAY, clock())
            bell.want(Position.AWAY)
            count = await self._run_alone(conn, worker, keys, first["crashes"])
        finally:
            if locked and not conn.is_closed():
                await conn.execute("SELECT pg_advisory_unlock(1852990835, 0)")
        self._state.claim_wanted |= count is not None
        return count or 0

    async def _run_alone(self, conn: Connection, worker: int, keys: list[str], crashes: int) -> int | None:
        """Wait until nothing else runs, claim, and wait for these tasks. Returns how many; None: it can't claim now."""
        state, capacity = self._state, self._capacity
        patience = min(PATIENCE_SECONDS * 2 ** min(crashes - 2, 10), PATIENCE_MOST)
        self._runners.start_batches()
        alone = await self._waiting.wait_until(conn, worker, lambda: capacity.is_idle, patience)
        if state.stopping or state.failure is not None:
            return None
        free = capacity.now(asyncio.get_running_loop().time(), self._admission.paused).total
        if free <= 0:
            return None  # it waits for a slot, as others do
        jobs = await self._intake.claim_crashed(conn, worker, keys, crashes, min(free, AT_ONCE.get(crashes, 1)))
        if jobs:
            fields = {"tasks": len(jobs), "ids": [job.id for job in jobs][:20], "alone": alone}
            logger.info("running tasks isolated, as their workers have vanished", extra={"fields": fields})
        self._runners.start_batches()
        if alone and jobs:
            ids = {job.id for job in jobs}
            await self._waiting.wait_until(conn, worker, lambda: capacity.has_written(ids), patience)
        return len(jobs)
