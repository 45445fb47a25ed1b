"""The words: what a user writes, raises and is given. Imports nothing of ours but errors, loops and
settings."""

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

    Class-level settings, which subclasses may replace (without an annotation, or as a ClassVar). Where a time is
    wanted, it is in seconds, or a timedelta:

    max_attempts  runs in all before the task is dead. What the row says, if it says, wins.
    backoff       the wait after attempt n is drawn evenly from 0 to backoff * 2**(n - 1), at most an
                  hour ("full jitter"): up to 2, 4, 8, 16, ... seconds, on average half of that.
    timeout       how long a run may take until its handler is cancelled and the attempt counts as failed;
                  None: as long as it likes.
    unique        True: not enqueued while one with the same payload is there; ("user", "day"): with the same in these
                  fields. EnqueueOptions, where it may be said of one task too, explains it, and what goes with it:
    unique_for, unique_states, on_conflict
    queue, priority  of its tasks, "default" and 0
    order_key     a key, or ("account",): of tasks with the same value in these fields, one runs at a time, in the order
                  of their ids
    limit_key     a key, or ("tenant",): of tasks with the same value in these fields; the type, if it isn't said,
    limit         at most so many run at once,
    rate          and at most so many start in any such time: "100/minute"

    What enqueue is told wins over each of them.

    The stored payload is the fields' JSON without the tag: that is in the row's `type` column.
    """

    max_attempts: ClassVar[int] = 10
    backoff: ClassVar[float | timedelta] = 2.0
    timeout: ClassVar[float | timedelta | None] = None
    unique: ClassVar[bool | tuple[str, ...]] = False
    unique_for: ClassVar[float | timedelta | None] = None
    unique_states: ClassVar[tuple[State, ...] | None] = None
    on_conflict: ClassVar[Literal["keep", "replace", "move"]] = "keep"
    if not TYPE_CHECKING:  # payloads have fields of these names, which type checkers would take for an override
        queue: ClassVar[str] = "default"
        priority: ClassVar[int] = 0
        order_key: ClassVar[str | tuple[str, ...] | None] = None
        limit_key: ClassVar[str | tuple[str, ...] | None] = None
        limit: ClassVar[int | None] = None
        rate: ClassVar[str | None] = None


class Progress(msgspec.Struct, frozen=True):
    """How far a running task says it is."""

    fraction: float  # 0 to 1
    note: str | None = None


def _check_results(_: Context) -> None:
    loops.running("ctx.results()", "in a plain `def` handler, call anyio.from_thread.run(ctx.results)")


class Context(msgspec.Struct, frozen=True):
    """What a handler may want to know of the row it runs: a parameter of this type is given it."""

    id: int
    queue: str
    attempt: int  # from 1
    max_attempts: int
    priority: int
    created_at: datetime

    def transaction(self, *, isolation: Isolation | None = None) -> Transaction:
        """A transaction of your own, in which the task is settled too: all of it happens, once, or nothing.

            async with ctx.transaction() as conn:  # an asyncpg connection of the worker's
                await conn.execute("INSERT INTO ledger ...")

        At the block's end the same transaction writes that the task is done, and commits. Raising inside rolls back,
        and the attempt fails as usual. What the handler returns or raises after the block doesn't count any more, so
        there is no result. Raises LeaseLost at its end, and rolls back, if the task was taken from this run; and
        ConfigError for a second block once the first one has begun to commit, or inside of it.
        """
        run = current_run.get()
        if run is None:
            raise ConfigError("ctx.transaction() is for handlers that a worker runs: it settles what that has claimed")
        return run.begin(self, isolation)

    @property
    def cancelled(self) -> bool:
        """Whether this run counts no more: the task was cancelled, its lease lost, its time is up, or the worker stops
        now. An async handler is cancelled by then, and may want to know in a `finally`. A plain `def` in its thread
        can't be: it should look now and then, and return. Threads that a handler starts by itself see False, unless
        they run in a copy of its context variables.
        """
        run = current_run.get()
        return run is not None and run.is_cancelled(self)

    def progress(self, fraction: float, note: str | None = None) -> Awaitable[None]:
        """Tell how far this run is, from 0 to 1, and what it does now; call it as often as you like.

            await ctx.progress(0.4, "resizing")  # in a plain def: the same without await

        The latest is written once a second, all of the worker's tasks in one statement, and seen by `notifyq tasks`,
        `notifyq show` and Ref.progress; it is gone when the run ends. To await it lets others run, and is where a
        cancellation arrives; it waits for nothing else. Of the note the first 200 characters are kept.

        Raises ConfigError for what isn't a fraction, or a str.
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
        """The results of the tasks that this one has waited for, its `after`, in their order: plain JSON values.

        In the place of one that is dead or was cancelled stands a TaskDead or TaskCancelled, as an exception does in
        what asyncio.gather(..., return_exceptions=True) returns; of one that isn't known any more, None. A plain `def`
        calls anyio.from_thread.run(ctx.results).
        """
        run = current_run.get()
        if run is None:
            raise ConfigError(
                "ctx.results() is for handlers that a worker runs; in tests: run_inline(..., results=[...])"
            )
        return await run.results(self)


class Run(Protocol):
    """What runs a handler, as its Context sees it."""

    def begin(self, context: Context, isolation: Isolation | None) -> Transaction: ...
    def is_cancelled(self, context: Context) -> bool: ...
    def report(self, context: Context, progress: Progress) -> None: ...
    def results(self, context: Context) -> Awaitable[list[Any]]: ...


class Yield:
    """Nothing to wait for, but others have the loop for a moment, and a cancellation arrives."""

    def __await__(self) -> Generator[None, None, None]:
        yield


CHECKPOINT = Yield()


# Set once for each of a worker's runners, which costs a task nothing, and leaves Context what it is: data.
current_run: ContextVar[Run | None] = ContextVar("current_run", default=None)

Call: TypeAlias = Callable[[Task, Context], Awaitable[object]]
Middleware: TypeAlias = Callable[[Task, Context, Call], Awaitable[object]]


class Verdict(Exception):
    """Base of Retry, Cancel and Dead, which a handler may return as well as raise."""

    reason: str = "ended by its handler"  # of a subclass that gives none


def is_delay(delay: object) -> bool:
    """Whether it is None, or seconds from 0 to a year, which a NaN isn't."""
    return delay is None or (is_number(delay) and 0 <= delay <= 366 * 86400)


class Retry(Verdict):
    """Try again after `delay`, seconds or a timedelta (None: the task's backoff). Counts as an attempt; after the last,
    dead."""

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
    """Don't run it again: it ends as cancelled."""

    reason = "cancelled by its handler"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Dead(Verdict):
    """Don't run it again: it ends as dead, however many attempts are left."""

    reason = "given up by its handler"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason
