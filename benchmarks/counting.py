"""What a server was asked to do, and what processes used: counted by pg_stat_statements and Linux's /proc.

A server of our own has that extension. A server that is given with --dsn must have it, and run on this machine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from notifyq.database import connection, schema
from notifyq.database.connection import Connection
from notifyq.embedded import Server

from .common import Bench

# Connections a worker: bell, claims, settle, heartbeat. 32 workers and some more.
SETTINGS = {"shared_preload_libraries": "pg_stat_statements", "max_connections": "200"}


@asynccontextmanager
async def counting(bench: Bench) -> AsyncGenerator[tuple[str, Connection], None]:
    """A migrated database whose server counts statements: its DSN, and the connection to read the counts on."""
    with ExitStack() as stack:
        dsn = stack.enter_context(Server(durable=True, settings=SETTINGS)).dsn() if bench.server else bench.dsn
        conn = await connection.connect(dsn)
        try:
            await schema.migrate(conn)
            await conn.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
            yield dsn, conn
        finally:
            await conn.close()


async def calls(conn: Connection, statement: str = "") -> int:
    """Statements so far in this database, other than these; or of those that begin as this one does."""
    text = "\n".join(line for line in statement.splitlines() if not line.startswith("--"))
    count: int = await conn.fetchval(
        """SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements
           WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND starts_with(query, $1) AND query !~ 'pg_stat_(statements|activity)'""",
        text[:50],  # constants further on are replaced there
    )
    return count


async def backends_cpu(conn: Connection) -> float:
    """CPU seconds so far of all backends of this database but this one."""
    rows = await conn.fetch(
        """SELECT pid FROM pg_stat_activity
           WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""
    )
    return sum(cpu(row[0]) for row in rows)


def cpu(pid: int) -> float:
    """CPU seconds so far of a process, all its threads."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text("ascii").split()[0]) for thread in threads) / 1e9


def resident(pid: int) -> float:
    """MB of memory that a process has now, shared libraries included."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
