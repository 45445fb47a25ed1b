"""SyncClient's connections: psycopg's pool, and a bound for everything that waits for the server.

A host that vanished says nothing more, and libpq waits for it: for ever, or for as long as some kernel on the way
acknowledges what is sent. So keepalives and tcp_user_timeout are as short as those of the app's own connections, each
statement has a time by which it is given up, and the first connection that is found dead takes those along that were
opened before: they lead to the same host.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import psycopg.conninfo
from psycopg_pool import ConnectionPool, PoolTimeout

from .. import forked
from ..database.connection import COMMAND_TIMEOUT_SECONDS, HOST_SECONDS, PROOF_SECONDS, SLOWEST
from ..errors import DatabaseError
from . import drivers

_Result = TypeVar("_Result")

SIZE = 10
WAIT_SECONDS = 10.0  # for a connection
TRY_SECONDS = 1.0  # between attempts to open one

# As libpq names them. What the DSN says of a timeout wins.
SETTINGS: dict[str, Any] = {
    "application_name": "notifyq client",
    "client_encoding": "UTF8",  # whatever PGCLIENTENCODING says: payloads may hold any character
    "connect_timeout": round(HOST_SECONDS),  # for each host
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 12_000,  # ms, for unacknowledged data, which keepalives don't cover
}


class Bounded(psycopg.Connection[Any]):
    """A connection on which nothing waits for the server longer than `seconds`."""

    seconds = COMMAND_TIMEOUT_SECONDS
    opened_at = 0.0  # by time.monotonic

    def run(self, query: str, args: Sequence[Any]) -> Sequence[Any]:
        """A statement, whose second parameter, if it has any, is a payload, or several: large ones take longer."""
        payloads: str | list[str] = args[1] if args else ""
        size = len(payloads) if isinstance(payloads, str) else sum(map(len, payloads))
        self.seconds = COMMAND_TIMEOUT_SECONDS + size / SLOWEST
        return drivers.fetch(self, query, args)

    def wait(self, gen: Generator[Any, Any, _Result], *args: Any, **kwargs: Any) -> _Result:
        return super().wait(_until(time.monotonic() + self.seconds, self.seconds, gen), *args, **kwargs)


def _until(deadline: float, seconds: float, gen: Generator[Any, Any, _Result]) -> Generator[Any, Any, _Result]:
    """psycopg's generator, which is sent a false value ten times a second while there is no answer."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                gen.close()
                raise psycopg.OperationalError(f"no answer within {seconds:g} s")
            wanted = gen.send(ready)
    except StopIteration as ended:
        result: _Result = ended.value
        return result


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A connection by itself, to see whether there is a server."""
    return Bounded.connect(dsn, **_settings(dsn))


class Pool:
    """The connections of one process. `where` is how a message names the server."""

    def __init__(self, dsn: str, where: str) -> None:
        self._where = where
        self._dead_at = 0.0  # when a connection was last found dead
        self._pool: ConnectionPool[Bounded] = ConnectionPool(
            dsn,
            connection_class=Bounded,
            min_size=0,
            max_size=SIZE,
            timeout=WAIT_SECONDS,
            # An attempt is given up soon, and each that waits for a connection begins another: with psycopg's own times
            # a server that is back would be found up to 16 s later.
            reconnect_timeout=TRY_SECONDS,
            open=True,
            configure=self._opened,
            check=self._check,
            name="notifyq",
            kwargs={
                "autocommit": True,  # each statement is its own transaction, in one round trip
                "prepare_threshold": None,  # behind a pooler it would fail
                **_settings(dsn),
            },
        )

    @contextmanager
    def connection(self) -> Generator[Bounded]:
        """One that answers. Raises DatabaseError if there is none in time, or if it is lost meanwhile."""
        conn = self._get()
        try:
            yield conn
        except psycopg.OperationalError as error:
            if not _is_lost(conn, error):
                raise
            self._dead_at = time.monotonic()
            raise DatabaseError(
                f"lost the connection to the database ({self._where}): {error}; the task may have been enqueued, or not"
            ) from None
        finally:
            self._pool.putconn(conn)

    def close(self) -> None:
        self._pool.close()

    def _get(self) -> Bounded:
        deadline = time.monotonic() + WAIT_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._pool.getconn(min(left, TRY_SECONDS + 0.5))
            except PoolTimeout:
                pass
        raise DatabaseError(f"no connection to the database within {WAIT_SECONDS:g} s ({self._where})")

    def _opened(self, conn: Bounded) -> None:
        conn.opened_at = time.monotonic()
        forked.keep_from_children(conn.fileno())

    def _check(self, conn: Bounded) -> None:
        """Before each use. Raises if it is dead, and another is opened."""
        if conn.opened_at <= self._dead_at:
            conn.close()
            raise psycopg.OperationalError("opened before another one was found dead")
        conn.seconds = PROOF_SECONDS
        try:
            conn.execute("")
        except BaseException:
            self._dead_at = time.monotonic()
            conn.close()
            raise
        conn.seconds = COMMAND_TIMEOUT_SECONDS


def _settings(dsn: str) -> dict[str, Any]:
    said = psycopg.conninfo.conninfo_to_dict(dsn)
    ours = ("application_name", "client_encoding")
    return {name: value for name, value in SETTINGS.items() if name in ours or name not in said}


def _is_lost(conn: psycopg.Connection[Any], error: psycopg.OperationalError) -> bool:
    """Whether it was the connection that failed: no answer, closed by the server, the server shut down."""
    return error.sqlstate is None or conn.closed or error.sqlstate.startswith(("08", "57P"))
