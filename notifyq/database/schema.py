"""The `notifyq` schema: which version this code needs, which one a database has; to install it and to upgrade it.

A row of schema_version also names the oldest version of the code that the schema works with. That is mostly the version
before, so the schema is upgraded first, and then the workers, one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from ..errors import DatabaseError, SchemaError
from . import upgrade
from .connection import is_pooled
from .errors import ACCESS, GRANTS, translate_errors

if TYPE_CHECKING:
    from .connection import Connection

SCHEMA_VERSION = 1
STRANGER = "this database has a schema notifyq that notifyq didn't make; rename or drop that one"
VERSION_ROW = "INSERT INTO notifyq.schema_version (version, serves) VALUES (1, 1)"  # schema.sql's


def schema_sql() -> str:
    """The text of schema.sql, which a wheel has in the package, and a checkout at the top of the project."""
    package = Path(__file__).parents[1]
    checkout, wheel = package.parent / "schema.sql", package / "schema.sql"
    # The checkout comes first: an editable install may have left an older copy in site-packages.
    is_checkout = checkout.exists() and (package.parent / "pyproject.toml").exists()
    return (checkout if is_checkout else wheel).read_text(encoding="utf-8")


async def installed_version(conn: Connection) -> int | None:
    """The schema's version in this database; None if there is no schema notifyq. Raises SchemaError for a schema of
    that name which isn't notifyq's."""
    found = await conn.fetchrow(
        """SELECT n IS NULL AS missing, pg_catalog.has_schema_privilege(n, 'USAGE') AS usable, current_user AS role
           FROM (SELECT pg_catalog.to_regnamespace('notifyq')::pg_catalog.oid AS n) AS s"""
    )
    assert found is not None
    if found["missing"]:
        return None
    try:
        version: object = await conn.fetchval("SELECT pg_catalog.max(version) FROM notifyq.schema_version")
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError):
        raise SchemaError(STRANGER) from None
    except asyncpg.InsufficientPrivilegeError as error:
        what = "use the schema notifyq"
        if found["usable"]:
            what = "read the table notifyq.schema_version, as roles that may read, operators and workers may"
        raise DatabaseError(f"user {found['role']} may not {what}; {GRANTS}") from error
    if not isinstance(version, int):
        await _explain_no_version(conn)
        raise SchemaError(STRANGER)
    return version


async def _explain_no_version(conn: Connection) -> None:
    """Raise an error that explains why no row of schema_version was found, if row level security hides it, or if the
    other tables are notifyq's."""
    found = await conn.fetchrow(
        """SELECT pg_catalog.to_regclass('notifyq.task') IS NOT NULL
                      AND pg_catalog.to_regclass('notifyq.bell') IS NOT NULL AS ours,
                  pg_catalog.row_security_active('notifyq.schema_version') AS hidden, current_user AS role"""
    )
    assert found is not None
    if found["hidden"]:
        raise DatabaseError(
            f"row level security hides the rows of notifyq.schema_version from user {found['role']}; switch it off for "
            "the tables of notifyq (ALTER TABLE ... DISABLE ROW LEVEL SECURITY), or make policies that show this user "
            "all rows"
        )
    if found["ours"]:
        raise SchemaError(
            "the table notifyq.schema_version is empty: its row was deleted, or the tables were copied without rows. "
            f"If the schema is this notifyq's, {VERSION_ROW}"
        )


async def check(conn: Connection) -> int:
    """The version, if this code can work with it. Raises SchemaError with the cure if not."""
    version = await installed_version(conn)
    if version is None:
        database = await conn.fetchval("SELECT current_database()")
        raise SchemaError(f"database {database!r} has no schema notifyq; install it: notifyq migrate")
    if version < SCHEMA_VERSION:
        raise SchemaError(f"the schema is version {version}, this notifyq needs {SCHEMA_VERSION}; run: notifyq migrate")
    await _refuse_newer(conn, version)
    return version


async def migrate(conn: Connection, say: Callable[[str], None] = lambda line: None) -> tuple[int | None, int]:
    """Install or upgrade the schema. Returns (version before, version after). Two at the same time take turns.

    say  gets a line for everything that it waits for

    Raises SchemaError for a schema that is too new, DatabaseError where this user may not create one.
    """
    cure = "run it as the database's owner"
    with translate_errors("create the schema, or change it", cure=cure, rules=ACCESS):
        before = await _install(conn)
        if before is not None and before < SCHEMA_VERSION:
            async with _turn(conn, say):
                before = await installed_version(conn) or before  # another upgrade may have ended meanwhile
                if before < SCHEMA_VERSION:
                    await upgrade.run(conn, before, schema_sql(), say)
    return before, max(before or 0, SCHEMA_VERSION)


async def _install(conn: Connection) -> int | None:
    """If there is no schema, install it, in one transaction. Returns the version that was there before.

    Read committed, whatever the database's default is: after waiting for the lock it must see a schema that another
    session has installed meanwhile.
    """
    async with conn.transaction(isolation="read_committed"):
        await conn.execute("SET LOCAL search_path = pg_catalog, pg_temp")  # PostgreSQL's own objects
        await conn.execute("SELECT pg_advisory_xact_lock(1852990817, 0)")
        before = await installed_version(conn)
        if before is None:
            await conn.execute(schema_sql())
        else:
            await _refuse_newer(conn, before)
    return before


@asynccontextmanager
async def _turn(conn: Connection, say: Callable[[str], None]) -> AsyncGenerator[None, None]:
    """Hold the lock of upgrades inside the block. The session holds it, since an upgrade has many transactions.

    It polls for the lock. A statement that waits for it in the database would hold a snapshot, and the CREATE INDEX
    CONCURRENTLY of the upgrade that has the lock would wait for that snapshot.
    """
    if is_pooled(conn):
        raise DatabaseError(
            "this is a pooler in transaction mode, and an upgrade needs a session; name the server itself"
        )
    told = False
    while not await conn.fetchval("SELECT pg_catalog.pg_try_advisory_lock(1852990817, 1)"):
        if not told:
            told = True
            say("another `notifyq migrate` is at work; waiting for it")
        await asyncio.sleep(0.2)
    try:
        yield
    finally:
        if not conn.is_closed():
            await conn.execute("SELECT pg_catalog.pg_advisory_unlock(1852990817, 1)")


async def _refuse_newer(conn: Connection, version: int) -> None:
    if version <= SCHEMA_VERSION:
        return
    serves: object = await conn.fetchval("SELECT serves FROM notifyq.schema_version WHERE version = $1", version)
    if not isinstance(serves, int) or serves > SCHEMA_VERSION:
        raise SchemaError(
            f"the schema is version {version}, newer than this notifyq, which knows {SCHEMA_VERSION}; upgrade notifyq"
        )
