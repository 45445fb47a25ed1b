"""The last check: what --drain asks before it ends, besides what each claim and each due check ask.

    a task's worker isn't registered   take the task back now. The heartbeat's thread does so once a minute
    a task's worker is dead            go on until the heartbeat's thread, or another worker's, has rescued the task
    a worker has no handler for a      go on for a moment. It may have claimed such a task, and releases it as unhandled
    type that this one has

A worker seems dead if it has no session left. It isn't dead if its heartbeat changes: behind a pooler a worker can't
keep a lock. A frozen worker has sessions, so a drain leaves its tasks to the workers that run on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from .. import log
from ..database.connection import SQL, Connection
from .left_out import LeftOut
from .state import State

logger = log.logger("notifyq.claim")

RESCUE_SECONDS = 10.0  # how long to wait for a rescue, which mostly takes 5 s at most


class Rescues:
    """For which workers' rescue a drain waits. Pure: it reads no clock."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[float, float]] = {}  # by worker: its heartbeat when it was found, and when

    def expected(self, dead: Iterable[tuple[int, float]], now: float) -> list[int]:
        """Those of the workers that are still expected to be rescued. `dead`: those that seem dead, each with the time
        of its last heartbeat."""
        return [
            worker
            for worker, seen in dead
            for first, since in [self._found.setdefault(worker, (seen, now))]
            if seen == first and now - since < RESCUE_SECONDS
        ]


class LastCheck:
    """Makes the last checks of one session of a claimer."""

    def __init__(self, queues: Iterable[str], types: Iterable[str], state: State) -> None:
        self._queues = list(queues)
        self._types = list(types)
        self._state = state
        self._left_out = LeftOut()  # tasks that PostgreSQL doesn't let it take back
        self._rescues = Rescues()
        self._told: set[int] = set()

    async def run(self, conn: Connection, worker: int) -> None:
        """Its answer is in the State then."""
        await self._left_out.reclaim_unowned(conn)
        rows = await conn.fetch(SQL["list_others"], worker, self._queues, self._types)
        now = asyncio.get_running_loop().time()
        expected = self._rescues.expected([(row["id"], row["seen"]) for row in rows if row["dead"]], now)
        if not self._told.issuperset(expected):
            self._told.update(expected)
            logger.info("waiting until the tasks of dead workers are rescued", extra={"fields": {"workers": expected}})
        others = not all(row["dead"] for row in rows)
        self._state.last_check_begins(now, awaits_rescue=bool(expected), others=others)
