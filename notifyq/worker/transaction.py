"""A handler's own transaction, which also settles its task: `ctx.transaction()`.

    BEGIN                       on a connection of a pool that is made at first use
    ...                         the handler's writes
    finish_in_transaction.sql   the task is done, if the lease is still ours; if not: LeaseLost, and ROLLBACK
    COMMIT                      all of it, or nothing

The task's row isn't touched before the end, so no rescue waits for a handler. From then on the handler's timeout and a
shutdown wait for the answer to COMMIT. Only two things end that wait: COMMAND_TIMEOUT_SECONDS, and a cancellation of
the asyncio task itself, which no shield holds off. If there was no answer, another connection asks by the transaction's
id whether it was committed. If the database can't be asked either, the attempt's outcome is written as if there had
been no transaction; the fence refuses it if there was one. So if the worker takes a transaction wrongly for committed,
or for rolled back, that misleads the handler and the log. It never decides whether the task runs again. The row decides
that, and it is committed together with the handler's writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import anyio
import asyncpg

from .. import loops
from ..config import resolve_dsn
from ..database.connection import (
    COMMAND_TIMEOUT_SECONDS,
    GONE_SETTINGS,
    SQL,
    Connection,
    connect,
    dial_for_pool,
    keep_alive,
)
from ..database.errors import TRANSIENT, translate_connect_errors
from ..database.reconnect import reconnecting
from ..errors import ConfigError, DatabaseError, LeaseLost
from ..pause import Pause
from ..task import Isolation
from .outcome_writer import KEPT
from .pipe import Waiters

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

    from .job import Job

    Pool = asyncpg.Pool[asyncpg.Record]
    Pooled = PoolConnectionProxy[asyncpg.Record]

CONNECTIONS = 10  # transactions that are open at the same time; further ones wait for one to end
ROLLBACK_SECONDS = 1.0  # then the connection is cut, which rolls back as well
ANSWER_SECONDS = 1.0  # to ask whether a transaction was committed, while its handler is to be cancelled

State: TypeAlias = Literal["open", "ending", "committed"]


class Transactions:
    """The transactions of one worker's handlers. `states` has the jobs that have begun one; Runners removes a job whose
    attempt has ended."""

    def __init__(self, dsn: str | None, keep: bool, worker: Waiters) -> None:
        self._dsn = dsn
        self._loop = asyncio.get_running_loop()
        self._worker = worker
        self._keep = keep
        self._pool: Pool | None = None
        self._making = asyncio.Lock()
        self.states: dict[Job, State] = {}

    @asynccontextmanager
    async def begin(
        self, job: Job, isolation: Isolation | None, lost: Callable[[Job], None]
    ) -> AsyncGenerator[asyncpg.Connection[asyncpg.Record], None]:
        """The block of ctx.transaction(). `lost` is called if the lease turns out to be lost."""
        cure = "make the handler an `async def`, and use it there"
        loops.same(self._loop, "ctx.transaction()", "the worker", cure)
        if job in self.states:
            raise ConfigError(
                f"task {job.id} has a transaction already; a handler has one ctx.transaction(), which settles its task"
            )
        self.states[job] = "open"
        try:
            pool = await self._open_pool()
            conn = await pool.acquire()
            try:
                transaction = conn.transaction(isolation=isolation)
                try:
                    await transaction.start()
                    yield cast("asyncpg.Connection[asyncpg.Record]", conn)
                    await self._commit(job, conn, transaction, lost)
                except BaseException as error:
                    was_lost = _is_lost(conn)
                    with anyio.move_on_after(ROLLBACK_SECONDS, shield=True) as late:
                        await _roll_back(conn, transaction)
                    if late.cancelled_caught:
                        _cut(conn)
                    if was_lost and isinstance(error, asyncpg.InterfaceError):
                        # asyncpg blames the caller, as its pool has taken the lost connection back.
                        raise _lost(job) from error
                    raise
            finally:
                with anyio.CancelScope(shield=True):
                    await pool.release(conn, timeout=ROLLBACK_SECONDS)
        finally:
            if self.states.get(job) != "committed":
                self.states.pop(job, None)  # the handler may begin another one

    async def close(self) -> None:
        """Close the pool. Handlers that were abandoned lose their connections."""
        if self._pool is None:
            return
        if self._pool.get_size() == self._pool.get_idle_size():
            with anyio.move_on_after(ROLLBACK_SECONDS, shield=True):
                await self._pool.close()
        self._pool.terminate()

    async def _open_pool(self) -> Pool:
        async with self._making:
            if self._pool is None:
                url, source = resolve_dsn(self._dsn)
                # asyncpg's pool takes this argument, and its stubs lack it.
                options: dict[str, Any] = {"connect": dial_for_pool}
                with translate_connect_errors(url, source):
                    self._pool = await asyncpg.create_pool(
                        url,
                        min_size=0,
                        max_size=CONNECTIONS,
                        timeout=10,
                        init=_keep_alive,
                        server_settings={"application_name": "notifyq handler", **GONE_SETTINGS},
                        **options,
                    )
            return self._pool

    async def _commit(self, job: Job, conn: Pooled, transaction: Transaction, lost: Callable[[Job], None]) -> None:
        if _is_lost(conn):
            raise _lost(job)
        if not conn.is_in_transaction():
            raise ConfigError("the transaction was ended inside of its block; leave that to ctx.transaction()")
        self._note_state(job, "ending")
        failure: Exception | None = None
        xid, released = "", False
        with anyio.CancelScope(shield=True):
            fence = (job.worker, job.id, job.attempt, self._keep)
            row = await conn.fetchrow(SQL["finish_in_transaction"], *fence, timeout=COMMAND_TIMEOUT_SECONDS)
            if row is None:
                if await conn.fetch(
                    SQL["list_still_leased"], job.worker, [job.id], [job.attempt], timeout=COMMAND_TIMEOUT_SECONDS
                ):
                    raise DatabaseError(f"task {job.id} can't be settled, its transaction is rolled back: {KEPT}")
                lost(job)
                raise LeaseLost(f"task {job.id} isn't this run's any more; its transaction is rolled back")
            xid, released = row
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                    await transaction.commit()
            except BaseException as error:
                _cut(conn)
                committed: bool | None = None
                with anyio.move_on_after(ANSWER_SECONDS):
                    committed = await self._was_committed(xid)
                if committed:
                    self._note_state(job, "committed")
                # A BaseException is asyncio's own cancellation, which no shield holds off.
                if committed is False or not isinstance(error, Exception):
                    raise
                failure = None if committed else error
        if failure is not None and not await self._was_committed(xid):
            raise failure
        self._note_state(job, "committed")
        if released:
            self._worker.on_released()

    def _note_state(self, job: Job, state: State) -> None:
        if job in self.states:  # it isn't if the handler has ended before the block, in an asyncio task of its own
            self.states[job] = state

    async def _was_committed(self, xid: str) -> bool:
        """Whether that transaction was committed. Asks until the database answers."""
        pause = Pause(0.05, 2.0)

        async def ask(conn: Connection) -> bool:
            try:
                while (status := await conn.fetchval(SQL["read_transaction_status"], xid)) == "in progress":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # PostgreSQL announces no commit
            except asyncpg.InvalidParameterValueError:  # the id is in the future of this server, which took over
                return False
            return bool(status == "committed")

        async def wait(_: Exception) -> None:
            await asyncio.sleep(pause.lengthen())

        return await reconnecting(lambda: connect(self._dsn, role="handler's commit"), ask, wait)


async def _roll_back(conn: Pooled, transaction: Transaction) -> None:
    """A lost connection has rolled it back."""
    try:
        if not _is_lost(conn) and conn.is_in_transaction():
            await transaction.rollback()
    except TRANSIENT:
        _cut(conn)


def _is_lost(conn: Pooled) -> bool:
    try:
        return conn.is_closed()
    except asyncpg.InterfaceError:
        return True  # the pool has taken the connection back


def _lost(job: Job) -> DatabaseError:
    return DatabaseError(
        f"task {job.id}: the connection of its transaction was lost, so the transaction is rolled back"
    )


def _cut(conn: Pooled) -> None:
    try:
        conn.terminate()
    except asyncpg.InterfaceError:
        pass  # the pool has taken the connection back


async def _keep_alive(conn: asyncpg.Connection[asyncpg.Record]) -> None:
    keep_alive(conn)
