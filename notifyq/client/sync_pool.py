"""SyncClient's connections: psycopg's pool, with a limit on every wait for the server.

A host that vanished answers nothing, and libpq waits forever, or as long as a kernel on the way acknowledges the data.
So keepalives and tcp_user_timeout are as short as those of the app's own connections, and each statement has a
deadline. When one connection is found dead, all that were opened before are closed too, as they lead to the same host.
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

# libpq's parameters. Those of the DSN win, but for the first two.
SETTINGS: dict[str, Any] = {
    "application_name": "notifyq client",
    "client_encoding": "UTF8",  # overrides PGCLIENTENCODING, as payloads may have any character
    "connect_timeout": round(HOST_SECONDS),  # for each host
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 12_000,  # ms, for unacknowledged data, which keepalives don't cover
}


class Bounded(psycopg.Connection[Any]):
    """A connection that waits for the server at most `seconds`."""

    seconds = COMMAND_TIMEOUT_SECONDS
    opened_at = 0.0  # by time.monotonic

    def run(self, query: str, args: Sequence[Any]) -> Sequence[Any]:
        """Run a statement and return its rows. Payloads, its second parameter, add time to the deadline if large."""
        payloads: str | list[str] = args[1] if args else ""
        size = len(payloads) if isinstance(payloads, str) else sum(map(len, payloads))
        self.seconds = COMMAND_TIMEOUT_SECONDS + size / SLOWEST
        return drivers.fetch(self, query, args)

    def wait(self, gen: Generator[Any, Any, _Result], *args: Any, **kwargs: Any) -> _Result:
        return super().wait(_until(time.monotonic() + self.seconds, self.seconds, gen), *args, **kwargs)


def _until(deadline: float, seconds: float, gen: Generator[Any, Any, _Result]) -> Generator[Any, Any, _Result]:
    """psycopg's generator, which gets a false value ten times a second until the answer arrives, with a deadline."""
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
    """A connection outside of the pool, to see whether there is a server."""
    return Bounded.connect(dsn, **_settings(dsn))


class Pool:
    """The connections of one process. `where` is the server's name for messages."""

    def __init__(self, dsn: str, where: str) -> None:
        self._where = where
        self._dead_at = 0.0  # when a connection was last found dead
        self._pool: ConnectionPool[Bounded] = ConnectionPool(
            dsn,
            connection_class=Bounded,
            min_size=0,
            max_size=SIZE,
            timeout=WAIT_SECONDS,
            # A failed attempt is given up soon, and each call that waits begins another one. With psycopg's own times,
            # the pool would notice up to 16 s late that the server is back.
            reconnect_timeout=TRY_SECONDS,
            open=True,
            configure=self._opened,
            check=self._check,
            name="notifyq",
            kwargs={
                "autocommit": True,  # each statement is its own transaction, in one round trip
                "prepare_threshold": None,  # prepared statements fail behind a pooler
                **_settings(dsn),
            },
        )

    @contextmanager
    def connection(self) -> Generator[Bounded]:
        """A connection that answers. Raises DatabaseError if none does in time, or if it is lost inside the block."""
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
        """The pool calls this before each use. It raises if the connection is dead, and the pool opens another."""
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
    """Whether the connection itself failed: no answer, closed by the server, or the server shut down."""
    return error.sqlstate is None or conn.closed or error.sqlstate.startswith(("08", "57P"))
