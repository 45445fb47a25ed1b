"""A connection for one command, and the translation of its errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg

from notifyq.database import schema
from notifyq.database.connection import Connection, connect
from notifyq.database.errors import RULES_FOR_ALL, translate_errors
from notifyq.errors import DatabaseError

LONG_SECONDS = 3600.0  # for a statement that reads or deletes a lot: a person waits for it, and can end it


@asynccontextmanager
async def session(dsn: str | None, *, reads: bool = True, migrated: bool = True) -> AsyncGenerator[Connection, None]:
    """Connect, and check the version of the schema.

    migrated  False: don't check it
    reads     False: go on without the check if the role may not read the version

    Raises ConfigError, DatabaseError or SchemaError, and NotifyqError for every other error of the database.
    """
    # pg_catalog alone: with public in the search_path, a role that may create functions there could have its own
    # to_json(record) run with the rights of the administrator who runs a command.
    conn = await connect(dsn, role="cli", settings={"TimeZone": "UTC", "search_path": "pg_catalog"})
    try:
        with translate_errors("do that", rules=RULES_FOR_ALL):
            if migrated:
                try:
                    await schema.check(conn)
                except DatabaseError:
                    if reads:
                        raise
            yield conn
    finally:
        try:
            await conn.close(timeout=2)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            conn.terminate()
