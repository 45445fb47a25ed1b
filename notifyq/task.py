"""What a user writes, raises and is given: Task, Context, Retry, Cancel and Dead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import msgspec

from . import loops
from .config import in_seconds, is_number
from .errors import ConfigError
from .options import State
from .settings import StructMeta

if TYPE_CHECKING:
    import asyncpg

    Transaction: TypeAlias = AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]
else:
    Transaction = Any


Isolation: TypeAlias = Literal["read_committed", "repeatable_read", "serializable"]


class Task(msgspec.Struct, metaclass=StructMeta, tag=True, tag_field="$type"):
    """One unit of work. Subclass it with the fields of the payload; the class name, or `tag=`, names its type.

        class SendMail(notifyq.Task, tag="SEND_MAIL"):
            timeout = 30.0
            to: str
            subject: str = ""

    Settings of the class, which subclasses may replace (without an annotation, or as a ClassVar). A time is in seconds,
    or a timedelta:

    max_attempts  how many attempts a task has before it is dead. The row's max_attempts wins, if it has one.
    backoff       the wait after attempt n is drawn evenly from 0 to backoff * 2**(n - 1) seconds, at most an hour
                  ("full jitter"): with 2, up to 2, 4, 8, 16, ... seconds, on average half of that.
    timeout       how long an attempt may take. Then its handler is cancelled, and the attempt has failed. None: no
                  limit.
    unique        True: a task isn't enqueued while there is one with the same payload. ("user", "day"): while there is
                  one with the same values in these fields. EnqueueOptions explains it, and also:
    unique_for, unique_states, on_conflict
    queue, priority  of its tasks; "default" and 0
    order_key     a key, or fields whose values make one: ("account",). Of the tasks with the same key, one runs at a
                  time, in the order of their ids.
    limit_key     a key, or fields whose values make one: ("tenant",). None: the type. For all tasks with the same key:
    limit         how many may run at the same time
    rate          how many may start in a period, as in "100/minute"
    expires       a task that hasn't started this long after it was due is cancelled; None: never

    An option that is given to enqueue wins over each of them.

    The stored payload is the JSON of the fields without the tag, which is in the row's `type` column.
    """

    max_attempts: ClassVar[int] = 10
    backoff: ClassVar[float | timedelta] = 2.0
    timeout: ClassVar[float | timedelta | None] = None
    unique: ClassVar[bool | tuple[str, ...]] = False
    unique_for: ClassVar[float | timedelta | None] = None
    unique_states: ClassVar[tuple[State, ...] | None] = None
    on_conflict: ClassVar[Literal["keep", "replace", "move"]] = "keep"
    if not TYPE_CHECKING:  # a payload may have fields of these names, which type checkers would take for an override
        queue: ClassVar[str] = "default"
        priority: ClassVar[int] = 0
        order_key: ClassVar[str | tuple[str, ...] | None] = None
        limit_key: ClassVar[str | tuple[str, ...] | None] = None
        limit: ClassVar[int | None] = None
        rate: ClassVar[str | None] = None
        expires: ClassVar[float | timedelta | None] = None


class Progress(msgspec.Struct, frozen=True):
    """How far a running task is, as its handler reports it."""

    fraction: float  # 0 to 1
    note: str | None = None


def _check_results(_: Context) -> None:
    loops.running("ctx.results()", "in a plain `def` handler, call anyio.from_thread.run(ctx.results)")


class Context(msgspec.Struct, frozen=True):
    """What a handler may want to know about its task. A handler's parameter of this type is given it."""

    id: int
    queue: str
    attempt: int  # from 1
    max_attempts: int
    priority: int
    created_at: datetime

    def transaction(self, *, isolation: Isolation | None = None) -> Transaction:
        """A transaction that commits the handler's writes and the end of the task together, or neither.

            async with ctx.transaction() as conn:  # an asyncpg connection of the worker's
                await conn.execute("INSERT INTO ledger ...")

        At the end of the block the same transaction writes that the task is done, and commits. An exception inside
        rolls back, and the attempt fails as usual. A result or an exception after the block is ignored, so the task has
        no result.

        Raises LeaseLost at the end of the block, and rolls back, if this attempt has lost its lease. Raises ConfigError
        for a second block inside of the first, or after the first has begun to commit.
        """
        run = current_run.get()
        if run is None:
            raise ConfigError("ctx.transaction() is for handlers that a worker runs: it settles a claimed task")
        return run.begin_transaction(self, isolation)

    @property
    def cancelled(self) -> bool:
        """Whether this attempt doesn't count any more: the task was cancelled, the lease is lost, the timeout is over,
        or the worker stops now.

        An async handler is cancelled by then, and may ask in a `finally`. A plain `def` runs in a thread, which can't
        be cancelled: it should ask now and then, and return. In a thread that the handler starts, this is False, unless
        the thread runs in a copy of the handler's context variables.
        """
        run = current_run.get()
        return run is not None and run.is_cancelled(self)

    def progress(self, fraction: float, note: str | None = None) -> Awaitable[None]:
        """Report how far this attempt is, from 0 to 1, and what it does now. Call it as often as you like.

            await ctx.progress(0.4, "resizing")  # in a plain def: the same without await

        The latest report is written once a second, with those of the worker's other tasks in one statement. `notifyq
        tasks`, `notifyq show` and Ref.progress show it. It is deleted when the attempt ends. Awaiting the call lets
        other coroutines run, and is where a cancellation arrives; it waits for nothing else. Of the note the first 200
        characters are kept.

        Raises ConfigError for a fraction outside of 0 to 1, and for a note that is no str.
        """
        if not is_number(fraction) or not 0 <= fraction <= 1:  # a NaN fails this too
            raise ConfigError(f"ctx.progress({fraction!r}): expected a fraction, from 0 to 1")
        if note is not None and not isinstance(note, str):
            raise ConfigError(f"ctx.progress(..., {note!r:.100}): expected a str as the note")
        run = current_run.get()
        if run is not None:
            run.report(self, Progress(fraction, note))
        return CHECKPOINT

    @loops.checked_at_call(_check_results)
    async def results(self) -> list[Any]:
        """The results of the tasks in this task's `after`, in that order: plain JSON values.

        A task that is dead or was cancelled has a TaskDead or TaskCancelled in its place, like an exception in what
        asyncio.gather(..., return_exceptions=True) returns. A task that was deleted, or that runs again after a
        retry, has None. A plain `def` calls anyio.from_thread.run(ctx.results).
        """
        run = current_run.get()
        if run is None:
            raise ConfigError(
                "ctx.results() is for handlers that a worker runs; in tests: run_inline(..., results=[...])"
            )
        return await run.results(self)


class Run(Protocol):
    """The attempt that a Context belongs to. Runners, batches and calls in threads implement it."""

    def begin_transaction(self, context: Context, isolation: Isolation | None) -> Transaction: ...
    def is_cancelled(self, context: Context) -> bool: ...
    def report(self, context: Context, progress: Progress) -> None: ...
    def results(self, context: Context) -> Awaitable[list[Any]]: ...


class Yield:
    """To await it lets other coroutines run once, and is where a cancellation arrives."""

    def __await__(self) -> Generator[None, None, None]:
        yield


CHECKPOINT = Yield()


# Set once for each of a worker's runners, so it costs a task nothing, and Context stays plain data.
current_run: ContextVar[Run | None] = ContextVar("current_run", default=None)

Call: TypeAlias = Callable[[Task, Context], Awaitable[object]]
Middleware: TypeAlias = Callable[[Task, Context, Call], Awaitable[object]]


class Verdict(Exception):
    """Base of Retry, Cancel and Dead, which a handler may raise or return."""

    reason: str = "ended by its handler"  # the default of a user's own subclass


def is_delay(delay: object) -> bool:
    """Whether it is None, or seconds from 0 to a year. A NaN isn't."""
    return delay is None or (is_number(delay) and 0 <= delay <= 366 * 86400)


class Retry(Verdict):
    """Try again after `delay`: seconds, or a timedelta; None: the task's backoff. The attempt counts. If it was the
    last one, the task is dead."""

    delay: float | None = None
    reason = "retry asked for"

    def __init__(self, delay: float | timedelta | None = None, reason: str = reason) -> None:
        delay = in_seconds(delay)
        if not is_delay(delay):
            raise ValueError(f"Retry(delay={delay!r}): expected seconds, from 0 to a year, or a timedelta")
        super().__init__(reason)
        self.delay = delay
        self.reason = reason


class Cancel(Verdict):
    """Don't run the task again: it ends as cancelled."""

    reason = "cancelled by its handler"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Dead(Verdict):
    """Don't run the task again: it ends as dead, however many attempts are left."""

    reason = "given up by its handler"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason
