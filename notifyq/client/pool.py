"""The connections of a connected app, with a limit on the time that a call waits for them.

A frozen server, or a host that vanished, answers nothing. asyncpg gives up a statement at its timeout. It then waits as
long again for an answer to its cancel request before the pool gets the connection back, and so for each connection. So
a connection whose statement isn't answered in time is cut, and one whose call is cancelled has a second to be free
again. After either, the idle connections are cut too, and the pool opens new ones.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import asyncpg

from ..database import connection, errors
from ..errors import DatabaseError

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

    Pooled = PoolConnectionProxy[asyncpg.Record]

SIZE = 10
CONNECT_SECONDS = 10.0
FREE_SECONDS = 1.0  # until a connection whose call was cancelled must be free


class AppPool:
    """An app's pool of connections, on one event loop."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record], timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout

    @classmethod
    async def open(cls, url: str | None, timeout: float) -> AppPool:
        """Connect once, to see that there is a server, and make the pool.

        Call it inside translate_connect_errors, which translates the errors.

        timeout  seconds for each statement, and for each wait for a connection
        """
        connecting = min(CONNECT_SECONDS, timeout)
        conn = await connection.open(url, "app", {}, timeout=connecting, command_timeout=timeout)
        options: dict[str, Any] = {"connect": connection.dial_for_pool}  # with types that asyncpg's stubs don't have
        if connection.is_pooled(conn):
            options["statement_cache_size"] = 0
        await conn.close(timeout=connecting)
        pool = await asyncpg.create_pool(
            url,
            min_size=0,  # a pool that must keep one logs a traceback each time it can't
            max_size=SIZE,
            command_timeout=timeout,
            timeout=connecting,
            server_settings={"application_name": "notifyq app"},
            init=_keep_alive,
            reset=_do_nothing,  # a call leaves nothing to reset on its connection: saves a round trip
            **options,
        )
        return cls(pool, timeout)

    async def close(self) -> None:
        """Close the connections in order, if the server answers. `terminate` cuts those that are left."""
        with suppress(*errors.TRANSIENT):
            await self._pool.close()

    def terminate(self) -> None:
        self._pool.terminate()

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> Sequence[asyncpg.Record]:
        async with self.acquire() as conn:
            return await conn.fetch(query, *args, timeout=timeout)

    async def fetchrow(self, query: str, *args: Any) -> asyncpg.Record | None:
        async with self.acquire() as conn:
            return await conn.fetchrow(query, *args)

    @asynccontextmanager
    async def acquire(self) -> AsyncGenerator[Pooled, None]:
        """A connection. Raises DatabaseError if none is free in time, or if the server doesn't answer in time."""
        try:
            conn = await self._pool.acquire(timeout=self._timeout)
        except TimeoutError:
            raise DatabaseError(f"no connection to the database within {self._timeout:g} s") from None
        try:
            yield conn
        except TimeoutError:
            conn.terminate()
            self._cut_idle()
            raise DatabaseError(
                f"no answer from the database in time ({self._timeout:g} s); what was asked may have been done, or not"
            ) from None
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await self._pool.release(conn, timeout=FREE_SECONDS)
                except (*errors.TRANSIENT, asyncpg.InterfaceError):
                    self._cut_idle()

    def _cut_idle(self) -> None:
        """Cut the idle connections, as they lead to the same host.

        asyncpg's expire_connections would close each in order in a task of its own, which fails without an answer.
        """
        for holder in list(getattr(self._pool, "_holders", ())):
            if holder._con is not None and holder._in_use is None:
                holder._con.terminate()

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Pooled, None]:
        """A connection in a transaction."""
        async with self.acquire() as conn:
            transaction = conn.transaction()
            try:
                await transaction.start()
                yield conn
                await transaction.commit()
            except TimeoutError:
                raise  # `acquire` cuts the connection: a ROLLBACK wouldn't be answered either
            except BaseException:
                await self._roll_back(conn, transaction)
                raise

    async def _roll_back(self, conn: Pooled, transaction: Transaction) -> None:
        """Roll back; if that takes too long, cut the connection and the idle ones, as `acquire` does."""
        with anyio.move_on_after(FREE_SECONDS, shield=True) as limit, suppress(*errors.TRANSIENT):
            await transaction.rollback()
            return
        conn.terminate()
        if limit.cancelled_caught:
            self._cut_idle()


async def _keep_alive(conn: asyncpg.Connection[asyncpg.Record]) -> None:
    connection.keep_alive(conn)


async def _do_nothing(_: object) -> None:
    pass
