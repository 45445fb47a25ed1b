"""Where the demo runs: the embedded PostgreSQL, or yours. On yours it takes away all that it brought."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import anyio
import anyio.to_thread

from notifyq.config import resolve_dsn
from notifyq.database.connection import Connection, connect, server_version
from notifyq.database.schema import migrate
from notifyq.embedded import Server

TABLES = """
    CREATE TABLE users (
        id         uuid        PRIMARY KEY,
        email      text        NOT NULL UNIQUE,
        reset_key  text,
        created_at timestamptz NOT NULL DEFAULT now()
    )
"""


@dataclass(frozen=True)
class Database:
    """A migrated database. All of a demo is in a queue and a schema of its own, so that two don't meet."""

    dsn: str
    queue: str
    schema: str
    last_id: int  # of the tasks before ours

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that are to find it: not as arguments, which other users can see."""
        return {"DEMO_QUEUE": self.queue, "DEMO_SCHEMA": self.schema, "NOTIFYQ_DSN": self.dsn}


@asynccontextmanager
async def database(dsn: str | None, say: Callable[[str], None]) -> AsyncGenerator[Database, None]:
    """The database `dsn`; without one that of an embedded server, which runs until this is left."""
    name = secrets.token_hex(3)
    async with AsyncExitStack() as stack:
        said = "yours"
        if dsn:
            url = resolve_dsn(dsn)[0] or dsn  # without a "+driver", which psql would not understand
        else:
            server = Server()
            stack.push_async_callback(_stop, server)
            await anyio.to_thread.run_sync(server.start)
            url, said = server.dsn(), server.binaries.source
        conn = await connect(url, role="demo")
        stack.push_async_callback(_close, conn)
        before, version = await migrate(conn)
        if dsn and before is None:
            said += f"; installed schema version {version}, which stays"
        say(f"PostgreSQL {await server_version(conn)} ({said})")
        last_id = await conn.fetchval("SELECT coalesce(max(id), 0) FROM notifyq.all_tasks")
        ours = Database(url, f"demo-{name}", f"notifyq_demo_{name}", last_id)
        stack.push_async_callback(_clean_up, conn, ours)
        async with conn.transaction():
            await conn.execute(f"CREATE SCHEMA {ours.schema}; SET LOCAL search_path = {ours.schema}; {TABLES}")
        yield ours


async def _stop(server: Server) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(server.stop)


async def _close(conn: Connection) -> None:
    with anyio.move_on_after(2, shield=True):
        await conn.close()


async def _clean_up(conn: Connection, ours: Database) -> None:
    with anyio.move_on_after(10, shield=True):
        await conn.execute(f"DROP SCHEMA {ours.schema} CASCADE")
        await conn.execute("DELETE FROM notifyq.task WHERE queue = $1", ours.queue)
        await conn.execute("DELETE FROM notifyq.finished WHERE queue = $1", ours.queue)
