"""Results: waiters are notified when a task has ended, and only then is its row read.

All waiters of an app share one connection. It is open while there is a waiter, and a minute longer. On it:

    LISTEN notifyq_done   comes first, so that no end is missed
    read_and_await.sql    for the tasks that have a new waiter or a notification since the last time. It marks each task
                          that lives, so that its end is notified, and reads each one that has ended
    wait                  for a notification, a new waiter, or the slow look. The slow look finds the ends without a
                          notification: a lost one, or all of them behind a pooler

A notification is an id, and only a reason to look, as any role can send one. Those that arrive during a statement go
into the next one, so a thousand ends take few statements. After a lost connection all awaited tasks are looked at
again. No end in between is missed, since ended tasks are kept and can be read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import asyncpg

from .. import log
from ..codec import describe
from ..database.connection import SQL, WORKER_TIMEOUT_SECONDS, Connection, connect_worker, is_pooled, notified_id
from ..database.errors import RULES_TO_READ, TRANSIENT, UNREADABLE, translate
from ..database.reconnect import reconnecting
from ..errors import ConfigError, DatabaseError, NotifyqError, failure
from ..options import ENDED
from ..pause import Pause
from ..task import Progress
from .ref import check_same
from .values import decode_result

if TYPE_CHECKING:
    from ..registry import Registry

logger = log.logger("notifyq.results")

DONE, PROGRESS = "notifyq_done", "notifyq_progress"
BATCH = 500  # tasks in one statement; fewer after a statement that took too long
PATIENCE = 8  # at most how many times the usual timeout a statement about one task gets
LOOK_SECONDS = 5.0  # between slow looks, which normally find nothing
POOLED_SECONDS = 0.5  # between looks behind a pooler, where no notification arrives
AGAIN_LEAST, AGAIN_MOST = 0.003, 0.5  # until the next look at a locked row; doubles from the first to the second
IDLE_SECONDS = 60.0  # then the connection is closed, as each notification in the database wakes one that listens


class Ended(NamedTuple):
    """The end of a task."""

    state: str
    type: str
    result: bytes | None
    error: str | None


class Waiter:
    """A caller that waits for one task. `Results` fills it in, and sets `changed` each time."""

    __slots__ = ("changed", "created_at", "ended", "failure", "progress")

    def __init__(self, created_at: datetime | None) -> None:
        self.created_at = created_at  # of the awaited task, if it is known: another task may have the same id
        self.changed = asyncio.Event()
        self.ended: Ended | None = None
        self.failure: NotifyqError | None = None  # why the end can't be known
        self.progress: Progress | None = None  # the latest

    def has_ended(self) -> bool:
        """Whether the task has ended. Raises `failure` if that can't be known."""
        if self.failure is not None:
            raise self.failure
        return self.ended is not None


class Results:
    """The waiters of one connected app, on one event loop, and the task that serves them."""

    def __init__(self, dsn: str | None, registry: Registry) -> None:
        self._dsn = dsn
        self._registry = registry
        self._waiting: dict[int, set[Waiter]] = {}  # by the task's id
        self._watched = 0  # how many waiters want progress too
        self._ask: dict[int, None] = {}  # ids to look at next, in order
        self._most = BATCH
        self._patience = 1
        self._again: set[int] = set()  # ids to look at once more: their rows were locked
        self._wake = asyncio.Event()
        self._cut = False
        self._down = False
        self._pause = Pause(0.05, 2.0)
        self._task: asyncio.Task[None] | None = None

    async def result(self, id: int, type: Any, timeout: float | None, created_at: datetime | None = None) -> Any:
        """See Ref.result."""
        with self._wait(id, created_at) as waiter:
            with anyio.move_on_after(timeout):
                while not waiter.has_ended():
                    waiter.changed.clear()
                    await waiter.changed.wait()
            if not waiter.has_ended():
                raise TimeoutError(f"task {id} hasn't ended within {timeout:g} s")
        ended = waiter.ended
        assert ended is not None
        if (failed := failure(id, ended.type, ended.state, ended.error)) is not None:
            raise failed
        return decode_result(self._registry, id, ended.type, ended.result, type)

    async def progress(self, id: int, created_at: datetime | None = None) -> AsyncGenerator[Progress, None]:
        """See Ref.progress."""
        last: Progress | None = None
        self._watched += 1
        try:
            with self._wait(id, created_at) as waiter:
                while not waiter.has_ended():
                    waiter.changed.clear()
                    if waiter.progress is not None and waiter.progress != last:
                        last = waiter.progress
                        yield last
                    else:
                        await waiter.changed.wait()
        finally:
            self._watched -= 1

    async def close(self) -> None:
        """End the serving task, and raise ConfigError in each waiter that is left."""
        self._fail(ConfigError, "the app was disconnected while this waited; wait inside `async with app.connect():`")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @contextmanager
    def _wait(self, id: int, created_at: datetime | None) -> Generator[Waiter, None, None]:
        """A waiter for the task inside the block. The first one starts the serving task."""
        waiter = Waiter(created_at)
        self._waiting.setdefault(id, set()).add(waiter)
        self._ask[id] = None
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="notifyq results")
        try:
            yield waiter
        finally:
            waiters = self._waiting[id]
            waiters.discard(waiter)
            if not waiters:
                del self._waiting[id]
                self._ask.pop(id, None)
                self._again.discard(id)
            if not self._waiting:
                self._wake.set()

    # The serving task.

    async def _run(self) -> None:
        while True:
            await reconnecting(self._connect, self._serve, self._failed, (Exception,))

    async def _connect(self) -> Connection:
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        conn = await connect_worker(self._dsn, "results", relaxed=True)
        self._pause.reset()
        return conn

    async def _failed(self, error: Exception) -> None:
        if (why := _find_final_error(error)) is not None:
            self._fail(*why)
        elif not self._down:
            self._down = True
            logger.warning(
                "lost the database, trying again",
                extra={"fields": {"stage": "results", "error": describe(error)}},
            )
        await asyncio.sleep(self._pause.jittered())

    async def _serve(self, conn: Connection) -> None:
        self._cut = False
        conn.add_termination_listener(self._on_connection_lost)
        try:
            await self._answer(conn)
        finally:
            conn.remove_termination_listener(self._on_connection_lost)

    async def _answer(self, conn: Connection) -> None:
        """Serve the waiters until there was none for IDLE_SECONDS, or the connection fails."""
        clock = asyncio.get_running_loop().time
        pooled, watches = is_pooled(conn), False
        if not pooled:
            await conn.add_listener(DONE, self._on_notification)
        look_at, again_at, again_wait = 0.0, 0.0, AGAIN_LEAST
        while True:
            self._wake.clear()
            now = clock()
            if self._cut:
                raise ConnectionError("the server closed the connection")
            if self._watched and not (watches or pooled):
                await conn.add_listener(PROGRESS, self._on_notification)
                watches = True
            if now >= look_at:
                look_at = now + random.uniform(0.8, 1.2) * (POOLED_SECONDS if pooled else LOOK_SECONDS)
                self._ask.update(dict.fromkeys(self._waiting))
            if self._again and now >= again_at:
                self._ask.update(dict.fromkeys(self._again))
                self._again.clear()
                again_at, again_wait = now + again_wait, min(AGAIN_MOST, again_wait * 2)
            if self._ask:
                ids = [id for id, _ in zip(self._ask, range(self._most), strict=False)]
                for id in ids:
                    del self._ask[id]
                await self._look_at(conn, ids)
                if self._down:
                    self._down = False
                    logger.info("the database is back", extra={"fields": {"stage": "results"}})
            elif self._waiting:
                if not self._again:
                    again_at, again_wait = 0.0, AGAIN_LEAST
                with anyio.move_on_after(min(look_at, again_at if self._again else look_at) - now):
                    await self._wake.wait()
            else:
                with anyio.move_on_after(IDLE_SECONDS):
                    await self._wake.wait()
                if not self._waiting and not self._cut:
                    await conn.close(timeout=1.0)
                    return

    async def _look_at(self, conn: Connection, ids: Sequence[int]) -> None:
        """Read these tasks, and fill in their waiters."""
        try:
            rows: dict[int, asyncpg.Record] = {}
            seconds = WORKER_TIMEOUT_SECONDS * self._patience
            for found in await conn.fetch(SQL["read_and_await"], ids, timeout=seconds):
                # If the sequence of ids was set back, an older task in the history may have the same id. Then the
                # awaited task is the one that hasn't ended.
                if found["id"] not in rows or found["state"] not in ENDED:
                    rows[found["id"]] = found
            self._most = min(BATCH, self._most * 2)
        except TimeoutError:
            if len(ids) > 1:
                self._most = len(ids) // 2
            else:
                self._patience = min(PATIENCE, self._patience * 2)
            raise
        except UNREADABLE as error:
            # PostgreSQL stored a result that it can't send.
            if len(ids) > 1:
                for id in ids:
                    await self._look_at(conn, [id])
            else:
                self._fail(NotifyqError, f"PostgreSQL can't read out the result of task {ids[0]}: {error}", ids)
            return
        for id in ids:
            if (row := rows.get(id)) is None:
                self._fail(NotifyqError, f"there is no task {id}; {_NO_TASK}", [id])
                continue
            if row["later"] and id in self._waiting:
                self._ask[id] = None
                continue
            for waiter in self._waiting.get(id, ()):
                try:
                    check_same(id, waiter.created_at, row["created_at"])
                except NotifyqError as error:
                    waiter.failure = error
                if row["state"] in ENDED:
                    waiter.ended = Ended(row["state"], row["type"], row["result"], row["error"])
                elif row["progress"] is not None:
                    waiter.progress = Progress(row["progress"], row["note"])
                waiter.changed.set()
            if not row["marked"] and id in self._waiting:
                self._again.add(id)

    def _fail(self, kind: type[NotifyqError], why: str, ids: Iterable[int] | None = None) -> None:
        for id in list(self._waiting) if ids is None else ids:
            for waiter in self._waiting.get(id, ()):
                waiter.failure = kind(why)  # one for each waiter, as raising an error adds a traceback to it
                waiter.changed.set()

    def _on_notification(self, _: object, __: int, ___: str, payload: object) -> None:
        if (id := notified_id(payload)) in self._waiting:
            self._ask[id] = None
            self._wake.set()

    def _on_connection_lost(self, _: object) -> None:
        self._cut = True
        self._wake.set()


_NO_TASK = (
    "it was pruned, or its transaction was rolled back, or isn't committed yet: a task that is enqueued with conn= can "
    "be waited for once that is"
)


def _find_final_error(error: BaseException) -> tuple[type[NotifyqError], str] | None:
    """The error and message for what another try won't cure; None for what it may."""
    if (found := translate(error, "await results", rules=RULES_TO_READ)) is not None:
        return type(found), str(found)
    if isinstance(error, NotifyqError) and not isinstance(error, DatabaseError):
        return type(error), str(error)
    if isinstance(error, TRANSIENT):
        return None
    logger.error("waiting for results failed: a bug in notifyq", exc_info=error)
    return NotifyqError, f"a bug in notifyq: {type(error).__name__}: {error}"
