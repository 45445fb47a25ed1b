"""How to go on after a connection fails: connect again, after a pause, until the work is done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from .connection import Connection
from .errors import TRANSIENT

T = TypeVar("T")


async def reconnecting(
    connect: Callable[[], Awaitable[Connection]],
    serve: Callable[[Connection], Awaitable[T]],
    failed: Callable[[Exception], Awaitable[object]],
    errors: tuple[type[Exception], ...] = TRANSIENT,
) -> T:
    """Return what `serve` returns. After each failure with one of `errors`, call it again with a new connection.

    failed  is awaited between two tries: it logs and waits. It raises an error that no new connection would cure
    """
    while True:
        conn: Connection | None = None
        try:
            conn = await connect()
            return await serve(conn)
        except errors as error:
            failure = error
        finally:
            if conn is not None:
                conn.terminate()
        await failed(failure)
