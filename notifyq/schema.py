"""The `notifyq` schema: which one this code needs, what a database has, and how it gets there.

Version 1 is the first, so all there is to migrate is nothing at all or a newer one, which is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from .errors import DatabaseError, SchemaError

if TYPE_CHECKING:
    from .store import Connection

SCHEMA_VERSION = 2


def schema_sql() -> str:
    """The text of schema.sql: beside this module in a wheel, at the top of the project in a checkout."""
    here = Path(__file__).parent
    checkout, wheel = here.parent / "schema.sql", here / "schema.sql"
    # A checkout first: an editable install may have left a copy of another day in site-packages.
    is_checkout = checkout.exists() and (here.parent / "pyproject.toml").exists()
    return (checkout if is_checkout else wheel).read_text(encoding="utf-8")


async def installed_version(conn: Connection) -> int | None:
    """The schema's version in this database, None if it isn't there. Raises SchemaError for a stranger's schema."""
    found = await conn.fetchrow("SELECT to_regnamespace('notifyq') IS NULL AS missing, current_user::text AS role")
    assert found is not None
    if found["missing"]:
        return None
    try:
        version: object = await conn.fetchval("SELECT max(version) FROM notifyq.schema_version")
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError):
        version = None
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseError(
            f"user {found['role']} may not use the schema notifyq; schema.sql ends with the GRANTs"
        ) from error
    if not isinstance(version, int):
        raise SchemaError("this database has a schema notifyq that notifyq didn't make; rename or drop that one")
    return version


async def check(conn: Connection) -> int:
    """The version, if it is the one this code needs. Raises SchemaError with the cure if not."""
    version = await installed_version(conn)
    if version is None:
        database = await conn.fetchval("SELECT current_database()")
        raise SchemaError(f"database {database!r} has no schema notifyq; install it: notifyq migrate")
    if version < SCHEMA_VERSION:
        raise SchemaError(f"the schema is version {version}, this notifyq needs {SCHEMA_VERSION}; run: notifyq migrate")
    _refuse_newer(version)
    return version


async def migrate(conn: Connection) -> tuple[int | None, int]:
    """Install or upgrade, in one transaction: (version before, version after). Two at once take turns.

    Raises SchemaError for a newer schema, DatabaseError where this user may not create one.
    """
    try:
        # Read committed, whatever the default is here: who waits for the lock must see what was installed meanwhile.
        async with conn.transaction(isolation="read_committed"):
            await conn.execute("SET LOCAL search_path = pg_catalog")  # schema.sql's names mean the usual things
            await conn.execute("SELECT pg_advisory_xact_lock(1852990817, 0)")
            before = await installed_version(conn)
            if before is None:
                await conn.execute(schema_sql())
            else:
                _refuse_newer(before)
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseError(f"this user may not create the schema ({error}); run it as the database's owner") from error
    except asyncpg.ReadOnlySQLTransactionError as error:
        raise DatabaseError("this server is read-only (a standby?); migrate the primary") from error
    return before, SCHEMA_VERSION


def gone(error: BaseException) -> SchemaError | None:
    """If that is what `error` of a worker's statement means: the schema was there, and is no more."""
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.InvalidSchemaNameError):
        return SchemaError("the schema notifyq has gone from under this worker; run: notifyq migrate")
    return None


def _refuse_newer(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"the schema is version {version}, newer than this notifyq, which knows {SCHEMA_VERSION}; upgrade notifyq"
        )
