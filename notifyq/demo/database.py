"""Where the demo runs: the embedded PostgreSQL, or yours. From yours it removes all but the schema notifyq."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import anyio
import asyncpg

from notifyq.database.connection import connect
from notifyq.database.dsn import VARIABLES, read, url_of
from notifyq.database.schema import migrate
from notifyq.embedded import Server, find_binaries
from notifyq.errors import EmbeddedError

USERS = """
    CREATE TABLE users (
        id         uuid        PRIMARY KEY,
        email      text        NOT NULL UNIQUE,
        reset_key  text,
        created_at timestamptz NOT NULL DEFAULT now()
    )
"""


@dataclass(frozen=True)
class Database:
    """A migrated database. Each demo has a queue and a schema of its own, so two at the same time don't mix.

    The schema has the table `users`, and the view `tasks` of the demo's own tasks. The pool's connections find both.
    """

    url: str
    queue: str
    schema: str
    pool: asyncpg.Pool[asyncpg.Record]


@asynccontextmanager
async def open_database(dsn: str | None, say: Callable[[str], None]) -> AsyncIterator[Database]:
    """The database `dsn`; without one, that of an embedded server that runs until this ends."""
    queue = f"demo_{secrets.token_hex(3)}"
    schema = f"notifyq_{queue}"
    with ExitStack() as stack:
        source = "yours"
        if dsn is None:
            server = stack.enter_context(Server())
            dsn, source = server.dsn(), server.binaries.source
        conn = await connect(dsn, role="demo")
        try:
            before, version = await migrate(conn)
        finally:
            conn.terminate()
        if source == "yours" and before is None:
            source += f"; installed schema version {version}, which stays"
        # connect_timeout is not for asyncpg, which would send it to the server as a setting.
        url = url_of({name: value for name, value in read(dsn).items() if name != "connect_timeout"})
        async with asyncpg.create_pool(url, min_size=1, server_settings={"search_path": schema}) as pool:
            say(f"PostgreSQL {await pool.fetchval('SHOW server_version')} ({source})")
            last_id = await pool.fetchval("SELECT coalesce(max(id), 0) FROM notifyq.all_tasks")
            # The condition on id is for speed: a server may have millions of finished tasks.
            ours = f"SELECT * FROM notifyq.all_tasks WHERE queue = '{queue}' AND id > {last_id}"  # noqa: S608
            try:
                await pool.execute(f"CREATE SCHEMA {schema}; {USERS}; CREATE VIEW tasks AS {ours}")
                yield Database(url, queue, schema, pool)
            finally:
                with anyio.move_on_after(10, shield=True):
                    await pool.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
                    await pool.execute("DELETE FROM notifyq.task WHERE queue = $1", queue)
                    await pool.execute("DELETE FROM notifyq.finished WHERE queue = $1", queue)


def find_psql() -> str | None:
    """A psql that runs: beside the embedded server's programs, or on PATH."""
    folders = os.environ.get("PATH", os.defpath)
    try:
        folders = f"{find_binaries().bin_dir}{os.pathsep}{folders}"
    except EmbeddedError:
        pass  # with a server of your own, there may be none
    psql = shutil.which("psql", path=folders)
    if psql is None or subprocess.run([psql, "--version"], capture_output=True, check=False).returncode:
        return None
    return psql


def libpq_variables(dsn: str) -> dict[str, str]:
    """The DSN for psql as environment variables: other users of the machine can see the arguments of a process."""
    return {VARIABLES[name]: value for name, value in read(dsn).items() if name in VARIABLES}
