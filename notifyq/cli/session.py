"""A connection for one command, and the translation of its errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

import asyncpg

from notifyq.database import schema
from notifyq.database.connection import Connection, connect
from notifyq.errors import ConfigError, DatabaseError, NotifyqError, SchemaError

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
        with _explained():
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


@contextmanager
def _explained() -> Generator[None, None, None]:
    try:
        yield
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseError(
            f"this user may not do that: {error}; schema.sql ends with the GRANTs, see: notifyq migrate --sql"
        ) from error
    except asyncpg.ReadOnlySQLTransactionError as error:
        raise DatabaseError("this server is read-only (a standby?); name the primary") from error
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError) as error:
        raise SchemaError("this database has no schema notifyq; install it: notifyq migrate") from error
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
        raise ConfigError(f"PostgreSQL can't store this: {error}") from error
    except (TimeoutError, asyncpg.QueryCanceledError) as error:
        raise NotifyqError("the database took too long over it, and nothing was changed; try again") from error
    except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError) as error:
        raise DatabaseError(f"lost the database in the middle: {error}; try again") from error
    except asyncpg.PostgresError as error:
        raise NotifyqError(f"the database refused: {error}") from error
