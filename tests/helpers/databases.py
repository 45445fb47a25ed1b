"""Databases, sessions and roles for tests, and a database that refuses sessions for a while."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
import anyio.abc
import asyncpg

from notifyq.database import connection, schema
from notifyq.embedded import Server

_numbers = itertools.count()


async def admin(server: Server, *statements: str) -> None:
    """Run statements in the server's own database."""
    conn = await connection.connect(server.dsn("postgres"), role="test")
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


@asynccontextmanager
async def database(server: Server, template: str) -> AsyncIterator[str]:
    """A copy of `template`: its DSN. The copy is dropped at the end, even if sessions are still connected."""
    name = f"t{next(_numbers)}"
    await admin(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.dsn(name)
    await admin(server, f"DROP DATABASE {name} WITH (FORCE)")


class Stock:
    """`async with stock.database() as dsn: ...`: a database with the schema and nothing in it.

    After the block it is emptied for the next test. That takes some ms; a copy and a drop take 40, and were a fifth of
    the whole run. A database that has grown, or in which anything but rows has changed, isn't used again. Each has a
    session that stays: a new session looks up every table anew, which takes longer than all the rest."""

    # All that a test might do to a schema: what is new anywhere has a higher oid, and what has changed in notifyq's
    # own objects, or in short lists, another xmin. And what is written without a new row.
    _STATE = """
    WITH ours AS (SELECT oid, xmin, reltuples, relname FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace)
    SELECT (SELECT max(oid) FROM pg_class), (SELECT max(oid) FROM pg_proc), (SELECT max(oid) FROM pg_type),
           (SELECT max(oid) FROM pg_constraint),
           (SELECT bool_or(reltuples > 0) OR sum(pg_relation_size(oid)) > 1000000 FROM ours
            WHERE relname !~ '^(key_lock|schema_version)'),
           count(*), max(xmin::text::bigint)
    FROM (SELECT xmin FROM ours
          UNION ALL SELECT xmin FROM pg_attribute WHERE attrelid IN (SELECT oid FROM ours)
          UNION ALL SELECT xmin FROM pg_attrdef UNION ALL SELECT xmin FROM pg_trigger
          UNION ALL SELECT xmin FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace
          UNION ALL SELECT xmin FROM pg_constraint WHERE connamespace = 'notifyq'::regnamespace
          UNION ALL SELECT xmin FROM pg_namespace UNION ALL SELECT xmin FROM pg_extension
          UNION ALL SELECT xmin FROM pg_publication UNION ALL SELECT xmin FROM pg_policy
          UNION ALL SELECT xmin FROM pg_event_trigger UNION ALL SELECT xmin FROM pg_default_acl
          UNION ALL SELECT xmin FROM pg_database WHERE datname = current_database()
          UNION ALL SELECT s.xmin FROM pg_db_role_setting s
          JOIN pg_database d ON d.oid = s.setdatabase AND d.datname = current_database()
          UNION ALL SELECT xmin FROM notifyq.schema_version UNION ALL SELECT '1' FROM notifyq.key_lock) it"""
    _TABLES = """
    SELECT array_agg(oid::regclass::text) FROM pg_class
    WHERE relnamespace = 'notifyq'::regnamespace AND relkind = 'r' AND relname NOT IN ('key_lock', 'schema_version')"""
    _LEAVE = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    _EMPTY = """
    {deletes};
    SELECT setval(format('%I.%I', schemaname, sequencename), start_value, false) FROM pg_sequences
    WHERE schemaname = 'notifyq'"""

    def __init__(self, server: Server, template: str) -> None:
        self._server = server
        self._template = template
        self._empty = ""
        self._clean: list[Copy] = []

    async def __aenter__(self) -> Stock:
        conn = await connection.connect(self._server.dsn(self._template), role="test")
        tables = await conn.fetchval(self._TABLES)
        self._empty = self._EMPTY.format(deletes=";".join(f"DELETE FROM {table}" for table in tables))
        await conn.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._clean:
            await self._clean.pop().stack.aclose()

    async def _copy(self) -> Copy:
        stack = AsyncExitStack()
        dsn = await stack.enter_async_context(database(self._server, self._template))
        conn = await asyncpg.connect(dsn, server_settings={"session_replication_role": "replica"})  # no triggers
        stack.callback(conn.terminate)
        return Copy(dsn, stack, conn, await conn.fetchrow(self._STATE))

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        copy = self._clean.pop() if self._clean else await self._copy()
        yield copy.dsn
        clean = False
        try:
            await copy.conn.execute(self._LEAVE)
            if clean := await copy.conn.fetchrow(self._STATE) == copy.new:
                await copy.conn.execute(self._empty)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            clean = False  # a test has dropped the schema, or has ended the session
        if clean:
            self._clean.append(copy)
        else:
            await copy.stack.aclose()


class Copy(NamedTuple):
    """A database of the stock, what drops it, its session that stays, and its state when it was new."""

    dsn: str
    stack: AsyncExitStack
    conn: Any
    new: Any


class Sessions:
    """Connections to one database, closed at the end."""

    def __init__(self, dsn: str, stack: AsyncExitStack) -> None:
        self.dsn = dsn
        self._stack = stack

    async def __call__(self, dsn: str | None = None) -> Any:
        conn = await connection.connect(dsn or self.dsn, role="test")
        self._stack.callback(conn.terminate)
        return conn


def grants(role: str, schema_sql: str = schema.schema_sql()) -> list[str]:
    """The GRANTs for this role, as they stand in the comment at the end of schema.sql."""
    text = schema_sql.rpartition("-- Roles.")[2]
    lines = [line.removeprefix("--").strip().partition("  -- ")[0] for line in text.splitlines()]
    starts = {
        "enqueuer": "may enqueue",
        "keys": "with keys",
        "reader": "may read",
        "awaiter": "may await",
        "operator": "operator",
        "worker": "worker",
    }
    found: list[str] = []
    inside = False
    for line in lines:
        if any(line.startswith(start) for start in starts.values()):
            inside = line.startswith(starts[role])
            line = line[line.index("GRANT") :]  # noqa: PLW2901
        if inside and line.startswith("GRANT") and " TO r;" in line:
            found.append(line.replace("TO r;", f"TO {role};"))
    return found


async def overload(db: Any) -> None:
    """Overload what notifyq calls, each with types that an untyped or shorter call could mean as well.

    An extension may add functions under the names of PostgreSQL's own. A call with untyped arguments is ambiguous then.
    """
    overloads = {
        "pg_terminate_backend": ("bigint", "text", "integer"),
        "pg_cancel_backend": ("bigint", "text"),
        "pg_notify": ("name, name",),
        "set_config": ("name, name, boolean", "text, integer, boolean"),
        "make_interval": ("secs integer", "secs numeric", "secs text"),
    }
    for lock in ("advisory_lock", "try_advisory_lock", "try_advisory_lock_shared", "advisory_unlock"):
        overloads[f"pg_{lock}"] = ("integer, bigint", "bigint, bigint", "integer, text")
    overloads["pg_try_advisory_xact_lock"] = overloads["pg_advisory_xact_lock"] = overloads["pg_advisory_lock"]
    for name, arguments in overloads.items():
        for types in arguments:
            await db.execute(f"""CREATE FUNCTION pg_catalog.{name}({types}) RETURNS boolean LANGUAGE plpgsql
                                 AS $$ BEGIN RAISE EXCEPTION 'the wrong {name}'; END $$""")


@asynccontextmanager
async def outage(dsn: str) -> AsyncIterator[None]:
    """Inside, this one database ends every session and takes no new one."""
    parts = urlsplit(dsn)
    name = parts.path.strip("/")
    admin = await connection.connect(parts._replace(path="/postgres").geturl(), role="test")
    try:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await admin.close()
