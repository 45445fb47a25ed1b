"""What faults act on: the server, the fleet, the dice, and sessions to do it in."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from notifyq.database import errors
from notifyq.demo.traffic import find_psql
from notifyq.embedded import Server

from ..helpers.machine import limit
from . import ledger
from .fleet import Fleet
from .history import Batch, History

Say = Callable[[str], None]


class Stage:
    """`project` is the folder of the notifyq that the workers run. `folder` is where they write what they do."""

    def __init__(self, server: Server, project: Path, folder: Path, seed: int, say: Say) -> None:
        self.server = server
        self.dsn = server.dsn()
        self.random = random.Random(seed)
        self.say = say
        self.psql = find_psql()
        self.fleet = Fleet(self.dsn, folder, self._role, project)
        self.history = History(rows=[], runs=[], batches=[], windows=[], processes=[], lags=[], logs=[], left={})
        self._project = project
        self._numbers = itertools.count(1)

    async def install(self) -> None:
        async with self.session() as conn:
            await conn.execute((self._project / "schema.sql").read_text(encoding="utf-8"))
            await conn.execute(ledger.INSTALL)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        conn = await asyncpg.connect(self.dsn, timeout=limit(10), server_settings={"application_name": "conductor"})
        try:
            yield conn
        finally:
            conn.terminate()

    async def sql(self, query: str, *args: object) -> list[Any]:
        async with self.session() as conn:
            return list(await conn.fetch(query, *args, timeout=limit(30)))

    async def until(self, query: str, seconds: float) -> bool:
        """Poll until it says true; False if it never did. Waits for a server that is away."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            try:
                if (await self.sql(query))[0][0]:
                    return True
            except errors.TRANSIENT:
                pass  # it is away
            await asyncio.sleep(0.1)
        return False

    def number(self) -> int:
        """A number for a task, by which its enqueuer recognizes it."""
        return next(self._numbers)

    def batch(self, by: str, count: int = 1) -> Batch:
        batch = Batch(by=by, numbers=[self.number() for _ in range(count)], at=time.time())
        self.history.batches.append(batch)
        return batch

    async def insert(self, type: str, count: int, queue: str = "default", **payload: Any) -> None:
        batch = self.batch("fault", count)
        await self.sql(
            """INSERT INTO notifyq.task (type, queue, payload)
               SELECT $1, $2, jsonb_set($3::jsonb, '{n}', to_jsonb(n)) FROM unnest($4::bigint[]) AS n""",
            type, queue, json.dumps({"n": 0, **payload}), batch.numbers,
        )  # fmt: skip
        batch.outcome = "committed"

    @asynccontextmanager
    async def open_enqueue(self, by: str) -> AsyncIterator[None]:
        """A transaction that has enqueued three and is open; committed at the end."""
        batch = self.batch(by, 3)
        async with self.session() as conn:
            await conn.execute("BEGIN")
            await conn.execute(
                """INSERT INTO notifyq.task (type, payload)
                   SELECT 'Quick', jsonb_build_object('n', n) FROM unnest($1::bigint[]) AS n""",
                batch.numbers,
            )
            try:
                yield
            finally:
                await conn.execute("COMMIT")
                batch.outcome = "committed"

    async def _role(self, who: str) -> None:
        """Make a worker's own role, as soon as there is a server."""
        while True:
            try:
                if not await self.sql("SELECT FROM pg_roles WHERE rolname = $1", who):
                    await self.sql(f"CREATE ROLE {who} LOGIN IN ROLE chaos_worker")
                return
            except errors.TRANSIENT:
                await asyncio.sleep(0.2)
