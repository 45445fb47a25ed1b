"""A database for each test: a copy of a template that is migrated once.

The server is an embedded one, or your own with a role that may create databases. A copy takes tens of ms, since no
schema is installed. No test sees what another one did.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Self

import asyncpg

from notifyq.config import resolve_dsn
from notifyq.database import schema
from notifyq.database.connection import connect
from notifyq.database.dsn import with_database
from notifyq.errors import DatabaseError


class Databases:
    """`async with Databases(dsn) as databases, databases.new() as dsn: ...`

    dsn  a database of the server, to connect to while databases are created and dropped; nothing is changed in it
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._prefix = f"notifyq_test_{secrets.token_hex(4)}"  # other test runs may use the same server
        self._number = 0

    @property
    def template(self) -> str:
        """The name of the database that each new one is a copy of."""
        return f"{self._prefix}_template"

    async def __aenter__(self) -> Self:
        """Create the template. Raises DatabaseError if the server can't be reached, or the role may not do that."""
        await self._run(f"CREATE DATABASE {self.template} TEMPLATE template0")
        try:
            conn = await connect(self._url(self.template), role="test")
            try:
                await schema.migrate(conn)
            finally:
                await conn.close()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._run(f"DROP DATABASE {self.template} WITH (FORCE)")

    @asynccontextmanager
    async def new(self) -> AsyncGenerator[str, None]:
        """The DSN of an empty database with the schema. It is dropped at the end, and its connections are closed."""
        self._number += 1
        name = f"{self._prefix}_{self._number}"
        await self._run(f"CREATE DATABASE {name} TEMPLATE {self.template}")
        try:
            yield self._url(name)
        finally:
            await self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def _url(self, database: str) -> str:
        return with_database(resolve_dsn(self._dsn)[0], database)

    async def _run(self, statement: str) -> None:
        # A new connection each time: a connection belongs to an event loop, and a test session may have several.
        conn = await connect(self._dsn, role="test")
        try:
            await conn.execute(statement)
        except asyncpg.InsufficientPrivilegeError as error:
            raise DatabaseError(f"this role may not create databases ({error}); ALTER ROLE ... CREATEDB") from error
        finally:
            await conn.close()
