"""The demo's tasks as the database has them: read through the view, which is the stable way to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Self

import msgspec

from notifyq.database.connection import Connection, connect

from .check import Row
from .database import Database


class Tasks:
    """A connection, and questions about our queue."""

    def __init__(self, conn: Connection, db: Database) -> None:
        self.conn = conn
        self._ours = (db.queue, db.last_id)  # the ids for speed: a server may have millions of finished tasks

    @classmethod
    @asynccontextmanager
    async def connect(cls, db: Database) -> AsyncGenerator[Self, None]:
        conn = await connect(db.dsn, role="demo", settings={"search_path": db.schema})
        try:
            yield cls(conn, db)
        finally:
            conn.terminate()

    async def states(self) -> Counter[str]:
        """How many by state."""
        count = "SELECT state, count(*) FROM notifyq.all_tasks WHERE queue = $1 AND id > $2 GROUP BY 1"
        return Counter({row["state"]: row["count"] for row in await self.conn.fetch(count, *self._ours)})

    async def unsettled(self) -> int:
        states = await self.states()
        return states.total() - sum(states[state] for state in ("done", "dead", "cancelled"))

    async def held(self, pid: int) -> dict[int, int]:
        """The attempt that a worker is at, by task."""
        query = """
            SELECT id, attempts FROM notifyq.all_tasks
            WHERE queue = $1 AND id > $2 AND state = 'running' AND worker LIKE '%:' || $3
        """
        rows = await self.conn.fetch(query, *self._ours, str(pid))  # a worker's name is host:pid
        return {row["id"]: row["attempts"] for row in rows}

    async def progress(self) -> tuple[Counter[tuple[str, str]], Counter[int]]:
        """How many by type and state, and how many each process runs."""
        count = """
            SELECT type, state, CASE WHEN state = 'running' THEN worker END AS worker, count(*)
            FROM notifyq.all_tasks WHERE queue = $1 AND id > $2 GROUP BY 1, 2, 3
        """
        states, running = Counter[tuple[str, str]](), Counter[int]()
        for row in await self.conn.fetch(count, *self._ours):
            states[row["type"], row["state"]] += row["count"]
            if row["worker"]:
                running[int(row["worker"].rpartition(":")[2])] += row["count"]
        return states, running

    async def workers(self) -> int:
        """How many are at work."""
        count: int = await self.conn.fetchval(
            "SELECT count(*) FROM notifyq.worker WHERE $1 = ANY (queues)", self._ours[0]
        )
        return count

    async def rows(self) -> list[Row]:
        """All, with what the checks need of them."""
        query = """
            SELECT id, type, state, attempts, created_at, run_at, processing_at, error,
                   coalesce(payload ->> 'verification_key', payload ->> 'reset_key') AS key,
                   payload #>> '{user,id}' AS user
            FROM notifyq.all_tasks WHERE queue = $1 AND id > $2
        """
        return [msgspec.convert(dict(row), Row) for row in await self.conn.fetch(query, *self._ours)]
