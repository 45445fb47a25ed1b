"""The results of the tasks in a task's `after`, for `await ctx.results()`.

They are read when a handler asks, on one connection that is made then. It isn't one of those for ctx.transaction(): ten
handlers inside of their transactions would each wait for an eleventh connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import msgspec

from .. import loops
from ..database.connection import SQL, STATEMENT_BYTES, connect_worker, seconds_for
from ..database.errors import TRANSIENT
from ..errors import failure


class Predecessors:
    """The predecessors of one worker's tasks. It answers one call at a time."""

    def __init__(self, dsn: str | None) -> None:
        self._dsn = dsn
        self._loop = asyncio.get_running_loop()
        self._conn: asyncpg.Connection[asyncpg.Record] | None = None
        self._lock = asyncio.Lock()

    async def results(self, task: int) -> list[Any]:
        """The results of the tasks in this task's `after`, in that order. Raises one of TRANSIENT."""
        cure = "in a plain `def` handler, call anyio.from_thread.run(ctx.results)"
        loops.same(self._loop, "ctx.results()", "the worker", cure)
        async with self._lock:
            try:
                rows = await self._fetch(task)
            except TRANSIENT:  # a connection that was idle may be lost
                self.close()
                rows = await self._fetch(task)
        return [_result(id, type, state, result, error) for id, type, state, result, error, _ in rows]

    async def _fetch(self, task: int) -> list[asyncpg.Record]:
        if self._conn is None:
            self._conn = await connect_worker(self._dsn, "results")
        rows: list[asyncpg.Record] = []
        while True:
            # Each page has the time that its bytes need. Stored results may be compressed, to a quarter perhaps.
            seconds = seconds_for(4 * STATEMENT_BYTES)
            page = await self._conn.fetch(SQL["read_predecessor_results"], task, len(rows) + 1, timeout=seconds)
            rows += page
            if not page or page[0]["left"] == len(page):
                return rows

    def close(self) -> None:
        if self._conn is not None:
            self._conn.terminate()
            self._conn = None


def _result(id: int, type: str | None, state: str | None, result: bytes | None, error: str | None) -> Any:
    if (failed := failure(id, str(type), state, error)) is not None:
        return failed
    return None if result is None else msgspec.json.decode(result)
