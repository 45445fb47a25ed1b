"""Results: who waits for the end of a task hears of it, and asks only then.

All who wait in an app share one connection, which is there while somebody waits, and a minute longer. On it:

    LISTEN notifyq_done   comes first, so that no end is missed
    read_and_await.sql    for all that have begun to wait, or were heard of, since the last time: it marks what lives,
                          so that its end will be told, and reads what has ended
    wait                  for a notification, for somebody new, or for the slow look that finds what no notification
                          told of: one that was lost, or every one where there is a pooler in between

A notification is only an id, and only a reason to ask: any role can send one. What came while a statement was under
way goes into the next, so a thousand ends are few statements. A connection that is lost is made anew, and all who
wait are asked about again: nothing that ends meanwhile is missed, since what is kept can be read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import anyio
import asyncpg
import msgspec

from .. import log
from ..codec import describe
from ..database.connection import SQL, WORKER_TIMEOUT_SECONDS, Connection, connect_worker, is_pooled, notified_id
from ..database.errors import RULES_TO_READ, TRANSIENT, UNREADABLE, translate
from ..database.reconnect import reconnecting
from ..errors import ConfigError, DatabaseError, NotifyqError, failure
from ..options import ENDED
from ..pause import Pause
from ..signature import innermost
from ..task import Progress
from .ref import check_same

if TYPE_CHECKING:
    from ..registry import Handler, Registry

logger = log.logger("notifyq.results")

DONE, PROGRESS = "notifyq_done", "notifyq_progress"
BATCH = 500  # tasks asked about in one statement; fewer, after one that took too long
PATIENCE = 8  # times as long a statement about one task may take in the end
LOOK_SECONDS = 5.0  # between looks that shouldn't find anything
POOLED_SECONDS = 0.5  # between looks where nothing else tells
AGAIN_LEAST, AGAIN_MOST = 0.003, 0.5  # until it asks again about what somebody has locked; doubles
IDLE_SECONDS = 60.0  # a connection that listens is woken by every notification in the database


class Ended(NamedTuple):
    """The end of a task."""

    state: str
    type: str
    result: bytes | None
    error: str | None


class Waiter:
    """Somebody who waits. Told by `Results`; `changed` is set with each piece of news."""

    __slots__ = ("changed", "created_at", "ended", "failure", "step")

    def __init__(self, created_at: datetime | None) -> None:
        self.created_at = created_at  # of the task that is meant; another may have its id
        self.changed = asyncio.Event()
        self.ended: Ended | None = None
        self.failure: NotifyqError | None = None  # no way to find out
        self.step: Progress | None = None  # the latest

    def over(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.ended is not None


class Results:
    """Of one connected app, on one event loop."""

    def __init__(self, dsn: str | None, registry: Registry) -> None:
        self._dsn = dsn
        self._registry = registry
        self._waiting: dict[int, set[Waiter]] = {}
        self._watched = 0  # of these, who wants progress too
        self._ask: dict[int, None] = {}  # in order
        self._most = BATCH
        self._patience = 1
        self._again: set[int] = set()  # to be asked about once more: their rows were locked
        self._wake = asyncio.Event()
        self._cut = False
        self._down = False
        self._pause = Pause(0.05, 2.0)
        self._task: asyncio.Task[None] | None = None

    async def result(self, id: int, type: Any, timeout: float | None, created_at: datetime | None = None) -> Any:
        """What Ref.result says."""
        with self._wait(id, created_at) as waiter:
            with anyio.move_on_after(timeout):
                while not waiter.over():
                    waiter.changed.clear()
                    await waiter.changed.wait()
            if not waiter.over():
                raise TimeoutError(f"task {id} hasn't ended within {timeout:g} s")
        assert waiter.ended is not None
        return self._value(id, waiter.ended, type)

    async def steps(self, id: int, created_at: datetime | None = None) -> AsyncGenerator[Progress, None]:
        """What Ref.progress says."""
        told: Progress | None = None
        self._watched += 1
        try:
            with self._wait(id, created_at) as waiter:
                while not waiter.over():
                    waiter.changed.clear()
                    if waiter.step is not None and waiter.step != told:
                        told = waiter.step
                        yield told
                    else:
                        await waiter.changed.wait()
        finally:
            self._watched -= 1

    async def close(self) -> None:
        """Whoever still waits is told so."""
        self._fail(ConfigError, "the app was disconnected while this waited; wait inside `async with app.connect():`")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _value(self, id: int, ended: Ended, type: Any) -> Any:
        if (failed := failure(id, ended.type, ended.state, ended.error)) is not None:
            raise failed
        text = b"null" if ended.result is None else ended.result
        if type is None:
            handler = self._registry.get(ended.type)
            return msgspec.json.decode(text) if handler is None else typed(handler, text)
        try:
            return msgspec.json.decode(text, type=type)
        except msgspec.ValidationError as error:
            raise NotifyqError(f"the result of task {id} ({ended.type}) is not what was asked for: {error}") from None

    @contextmanager
    def _wait(self, id: int, created_at: datetime | None) -> Generator[Waiter, None, None]:
        """As one of those who wait, inside the block; nothing is left of it."""
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

    # The one who asks.

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
        if (why := _hopeless(error)) is not None:
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
        conn.add_termination_listener(self._was_cut)
        try:
            await self._answer(conn)
        finally:
            conn.remove_termination_listener(self._was_cut)

    async def _answer(self, conn: Connection) -> None:
        """Until nothing was waited for during IDLE_SECONDS, or the connection fails."""
        clock = asyncio.get_running_loop().time
        pooled, watches = is_pooled(conn), False
        if not pooled:
            await conn.add_listener(DONE, self._heard)
        look_at, again_at, again_wait = 0.0, 0.0, AGAIN_LEAST
        while True:
            self._wake.clear()
            now = clock()
            if self._cut:
                raise ConnectionError("the server closed the connection")
            if self._watched and not (watches or pooled):
                await conn.add_listener(PROGRESS, self._heard)
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
                await self._tell(conn, ids)
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

    async def _tell(self, conn: Connection, ids: Sequence[int]) -> None:
        """Ask about these, and tell whoever waits."""
        try:
            rows: dict[int, asyncpg.Record] = {}
            seconds = WORKER_TIMEOUT_SECONDS * self._patience
            for found in await conn.fetch(SQL["read_and_await"], ids, timeout=seconds):
                # Of an id that was given twice, the older task has ended, and isn't the one that is meant.
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
            # A result that was stored, and can't be sent.
            if len(ids) > 1:
                for id in ids:
                    await self._tell(conn, [id])
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
                    waiter.step = Progress(row["progress"], row["note"])
                waiter.changed.set()
            if not row["marked"] and id in self._waiting:
                self._again.add(id)

    def _fail(self, kind: type[NotifyqError], why: str, ids: Iterable[int] | None = None) -> None:
        for id in list(self._waiting) if ids is None else ids:
            for waiter in self._waiting.get(id, ()):
                waiter.failure = kind(why)  # each its own: who raises one gives it a traceback
                waiter.changed.set()

    def _heard(self, _: object, __: int, ___: str, payload: object) -> None:
        if (id := notified_id(payload)) in self._waiting:
            self._ask[id] = None
            self._wake.set()

    def _was_cut(self, _: object) -> None:
        self._cut = True
        self._wake.set()


_NO_TASK = (
    "it was pruned, or its transaction was rolled back, or isn't committed yet: what is enqueued with conn= can be "
    "waited for once that is"
)


def _hopeless(error: BaseException) -> tuple[type[NotifyqError], str] | None:
    """The error and message for what another try won't cure; None for what it may."""
    if (found := translate(error, "await results", rules=RULES_TO_READ)) is not None:
        return type(found), str(found)
    if isinstance(error, NotifyqError) and not isinstance(error, DatabaseError):
        return type(error), str(error)
    if isinstance(error, TRANSIENT):
        return None
    logger.error("waiting for results failed: a bug in notifyq", exc_info=error)
    return NotifyqError, f"a bug in notifyq: {type(error).__name__}: {error}"


def _is_error(choice: Any) -> bool:
    """As Retry is, which isn't the result."""
    return isinstance(choice, type) and issubclass(choice, BaseException)


def typed(handler: Handler, result: bytes) -> Any:
    """As the type that the handler says it returns; as plain JSON where it doesn't say, or it is another."""
    try:
        annotation: Any = get_type_hints(innermost(handler.function)).get("return", Any)
        if handler.batch is not None:
            lists = [choice for choice in (annotation, *get_args(annotation)) if get_origin(choice) in (list, tuple)]
            annotation = get_args(lists[0])[0] if lists else Any
        every: tuple[Any, ...] = get_args(annotation)
        some = tuple(choice for choice in every if not _is_error(choice))
        if len(some) < len(every):
            annotation = Union[some]  # noqa: UP007 - built at run time
        return msgspec.json.decode(result, type=annotation)
    except Exception:  # an annotation is evaluated, and may raise anything; or the result is of another type
        return msgspec.json.decode(result)
