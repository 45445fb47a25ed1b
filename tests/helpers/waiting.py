"""Waiting until handlers have run, or until the database says what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.abc

from .machine import LIMIT_SECONDS, limit


class Seen:
    """What handlers have done, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._changed = anyio.Event()

    def add(self, item: Any) -> None:
        self.items.append(item)
        self._changed.set()
        self._changed = anyio.Event()

    async def reach(self, count: int, seconds: float = LIMIT_SECONDS) -> list[Any]:
        """Wait for that many."""
        with anyio.fail_after(limit(seconds)):
            while len(self.items) < count:
                await self._changed.wait()
        return self.items


async def eventually(query: Callable[[], Any], want: Any = True, seconds: float = LIMIT_SECONDS) -> None:
    """Wait until `query` returns `want`: for what only the database knows, and no signal tells."""
    value, seconds = None, limit(seconds)
    try:
        with anyio.fail_after(seconds):
            while (value := await query()) != want:
                await anyio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"after {seconds:.0f} s it is {value!r}, not {want!r}") from None


async def heartbeats(db: Any, count: int = 2) -> None:
    """Wait until each worker has sent that many more heartbeats. After two of them each chore that was due has run."""
    query = "SELECT min(seen_at) > $1 FROM notifyq.worker"
    for _ in range(count):
        last = await db.fetchval("SELECT max(seen_at) FROM notifyq.worker")
        await eventually(lambda last=last: db.fetchval(query, last))  # type: ignore[misc]


async def asleep(db: Any, workers: int = 1) -> None:
    """Wait until a worker holds SHARE on the bell, granted, and the claim after that is over."""
    query = """SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.relation = 'notifyq.bell'::regclass AND l.mode = 'ShareLock' AND l.granted
                 AND a.state = 'idle in transaction'"""
    await eventually(lambda: db.fetchval(query), workers)
    idle = """SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'notifyq claims %'
              AND datname = current_database() AND state <> 'idle'"""
    await eventually(lambda: db.fetchval(idle), 0)
