"""Connections of other libraries, to enqueue on in their transactions: psycopg 3, SQLAlchemy 2, Django.

A connection is recognized by the name of its type, so no library is imported for it. Each runs the statement that
asyncpg runs. psycopg takes it as it is, with its $1; `pyformat` rewrites it for SQLAlchemy and Django. The statement
goes through those two and never past them to their driver: they begin a transaction at its first statement, and a row
that is sent past them survives their rollback.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import anyio
import asyncpg
import asyncpg.pool

from ..errors import ConfigError

BUSY_SECONDS = 30.0  # to wait for a psycopg connection that runs something else

if TYPE_CHECKING:
    from ..database.connection import Connection

    Pool = asyncpg.Pool[asyncpg.Record]


# The types for `conn` are protocols: the libraries' own types are unknown to a type checker where a library is missing.


class Rows(Protocol):
    def fetchall(self) -> Any: ...


class Psycopg(Protocol):
    def execute(self, query: bytes, params: Sequence[Any], /) -> Rows: ...


class AsyncPsycopg(Protocol):
    def execute(self, query: bytes, params: Sequence[Any], /) -> Awaitable[Rows]: ...


class Alchemy(Protocol):
    def exec_driver_sql(self, statement: str, parameters: Any, /) -> Rows: ...


class AsyncAlchemy(Protocol):
    def exec_driver_sql(self, statement: str, parameters: Any, /) -> Awaitable[Rows]: ...


class Session(Protocol):
    def connection(self) -> Alchemy: ...


class AsyncSession(Protocol):
    def connection(self) -> Awaitable[AsyncAlchemy]: ...


class Django(Protocol):
    vendor: str

    def cursor(self) -> AbstractContextManager[Any]: ...


AsyncConnection: TypeAlias = "Connection | Pool | AsyncPsycopg | AsyncAlchemy | AsyncSession"
SyncConnection: TypeAlias = "Psycopg | Alchemy | Session | Django"

ASYNC_EXPECTED = "a connection of asyncpg, a psycopg.AsyncConnection, or SQLAlchemy's AsyncSession or AsyncConnection"
SYNC_EXPECTED = "a psycopg.Connection, SQLAlchemy's Session or Connection, or django.db.connection"


class DriverConnection:
    """Another library's async connection, with the `fetch` of asyncpg's."""

    def __init__(self, conn: Any, run: AsyncRun) -> None:
        self._conn = conn
        self._run = run

    async def fetch(self, query: str, *args: Any) -> Sequence[Any]:
        return await self._run(self._conn, query, args)


def to_async(conn: AsyncConnection) -> Connection | Pool | DriverConnection:
    """`conn` with asyncpg's `fetch`. Raises ConfigError for another object, or a connection that blocks the loop."""
    if isinstance(conn, asyncpg.Connection | asyncpg.pool.PoolConnectionProxy | asyncpg.Pool):
        return conn
    if (run := _find(conn, _ASYNC)) is not None:
        return DriverConnection(conn, run)
    if _find(conn, _SYNC) is not None:
        raise ConfigError(
            f"conn is {_shown(conn)}, which would block the event loop; expected {ASYNC_EXPECTED}; "
            "where nothing is awaited, notifyq.SyncClient(app).enqueue(task, conn=...) takes it"
        )
    raise ConfigError(f"conn is {_shown(conn)}; expected {ASYNC_EXPECTED}")


def fetch(conn: SyncConnection, query: str, args: Sequence[Any]) -> Sequence[Any]:
    """Run a statement and return its rows. Raises ConfigError for another object, or an async connection."""
    if (run := _find(conn, _SYNC)) is not None:
        return run(conn, query, args)
    asynchronous = isinstance(conn, asyncpg.Connection | asyncpg.pool.PoolConnectionProxy | asyncpg.Pool)
    if asynchronous or _find(conn, _ASYNC) is not None:
        raise ConfigError(f"conn is {_shown(conn)}, which is awaited: `await app.enqueue(task, conn=...)` takes it")
    raise ConfigError(f"conn is {_shown(conn)}; expected {SYNC_EXPECTED}")


def pyformat(query: str, args: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """The statement with %(p1)s for $1, and its values by these names, as psycopg and psycopg2 take them."""
    text = re.sub(r"\$(\d+)", r"%(p\1)s", query.replace("%", "%%"))
    return text, {f"p{number}": value for number, value in enumerate(args, 1)}


def _psycopg(conn: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    from psycopg import RawCursor
    from psycopg.rows import tuple_row

    _wait_until_free(conn)
    with RawCursor(conn, row_factory=tuple_row) as cursor:  # the connection may have factories of its own
        return cursor.execute(query.encode(), args).fetchall()


async def _async_psycopg(conn: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    from psycopg import AsyncRawCursor
    from psycopg.rows import tuple_row

    if conn.lock.locked():
        try:
            with anyio.fail_after(BUSY_SECONDS):
                await conn.lock.acquire()
            conn.lock.release()
        except TimeoutError:
            raise _busy() from None
    async with AsyncRawCursor(conn, row_factory=tuple_row) as cursor:
        await cursor.execute(query.encode(), args)
        return await cursor.fetchall()


def _wait_until_free(conn: Any) -> None:
    """Wait until no other statement runs on a psycopg connection. Raises ConfigError after BUSY_SECONDS.

    Inside a loop over `cursor.stream()`, psycopg itself would wait forever. Only the time tells that from a long
    statement of another thread.
    """
    if conn.lock.locked():
        if not conn.lock.acquire(timeout=BUSY_SECONDS):
            raise _busy()
        conn.lock.release()


def _busy() -> ConfigError:
    return ConfigError(
        f"conn was busy for {BUSY_SECONDS:g} s; inside cursor.stream(), cursor.copy() and conn.notifies() psycopg "
        "runs nothing else on a connection: enqueue after these, or on another connection"
    )


def _alchemy(conn: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    statement, values = _for_dialect(conn.dialect, query, args)
    rows: Sequence[Any] = conn.exec_driver_sql(statement, values, _AT_ONCE).fetchall()
    return rows


async def _async_alchemy(conn: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    statement, values = _for_dialect(conn.dialect, query, args)
    rows: Sequence[Any] = (await conn.exec_driver_sql(statement, values, _AT_ONCE)).fetchall()
    return rows


def _session(session: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    return _alchemy(session.connection(), query, args)


async def _async_session(session: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    return await _async_alchemy(await session.connection(), query, args)


# Overrides options of the connection or engine that ask for a server-side cursor: an INSERT in one is a syntax error.
_AT_ONCE = {"stream_results": False, "yield_per": None}


def _for_dialect(dialect: Any, query: str, args: Sequence[Any]) -> tuple[str, Any]:
    if dialect.name == "postgresql" and dialect.paramstyle == "pyformat":
        return pyformat(query, args)
    if dialect.name == "postgresql" and dialect.paramstyle == "numeric_dollar":  # asyncpg's
        return query, tuple(args)
    raise ConfigError(
        f"conn is SQLAlchemy's for {dialect.name}+{dialect.driver}; expected PostgreSQL by asyncpg, psycopg or psycopg2"
    )


def _django(conn: Any, query: str, args: Sequence[Any]) -> Sequence[Any]:
    if conn.vendor != "postgresql":
        raise ConfigError(f"conn is Django's for {conn.vendor}; expected a database with ENGINE django...postgresql")
    if hasattr(conn.connection, "lock"):  # psycopg 3's
        _wait_until_free(conn.connection)
    with conn.cursor() as cursor:
        cursor.execute(*pyformat(query, args))
        rows: Sequence[Any] = cursor.fetchall()
        return rows


AsyncRun: TypeAlias = Callable[[Any, str, Sequence[Any]], Awaitable[Sequence[Any]]]
SyncRun: TypeAlias = Callable[[Any, str, Sequence[Any]], Sequence[Any]]

# By package and class. A subclass is recognized by its bases.
_ASYNC: Mapping[tuple[str, str], AsyncRun] = {
    ("psycopg", "AsyncConnection"): _async_psycopg,
    ("sqlalchemy", "AsyncConnection"): _async_alchemy,
    ("sqlalchemy", "AsyncSession"): _async_session,
    ("sqlalchemy", "async_scoped_session"): _async_session,
}
_SYNC: Mapping[tuple[str, str], SyncRun] = {
    ("psycopg", "Connection"): _psycopg,
    ("sqlalchemy", "Connection"): _alchemy,
    ("sqlalchemy", "Session"): _session,
    ("sqlalchemy", "scoped_session"): _session,
    ("django", "BaseDatabaseWrapper"): _django,
    ("django", "ConnectionProxy"): _django,
}

_Run = TypeVar("_Run")


def _find(conn: object, known: Mapping[tuple[str, str], _Run]) -> _Run | None:
    names = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(conn).__mro__)
    return next((known[name] for name in names if name in known), None)


def _shown(conn: object) -> str:
    cls = conn if isinstance(conn, type) else type(conn)
    name = f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
    return f"the class {name} itself" if isinstance(conn, type) else f"a {name}"
