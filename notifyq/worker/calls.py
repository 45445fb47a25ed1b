"""How a handler is called: an `async def` on the event loop, a plain one in a thread.

A thread can't be cancelled. When its attempt ends early, at a timeout or a shutdown, the thread is abandoned: its slot
is free for the next task, and no outcome is taken from it.

A handler may fork. A child that returns from the handler ends at once: otherwise it would go on as a second copy of
the worker.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any

import anyio
import anyio.to_thread

from .. import forked, log
from ..errors import ConfigError
from ..loops import awaited, is_awaitable
from ..registry import Handler
from ..task import Context, Isolation, Progress, Run, Task, Transaction, current_run

logger = log.logger("notifyq.run")


class Calls:
    """Calls the handlers of one worker, with at most `threads` plain ones at the same time."""

    def __init__(self, threads: int) -> None:
        self._is_child = False  # this process was forked by a handler
        forked.call_in_children(self._note_child)
        self._threads = threads
        self._limiter = anyio.CapacityLimiter(threads)
        self._in_threads: set[ThreadCall] = set()  # the calls that have a thread, or wait for one
        self._abandoned: list[ThreadCall] = []
        self._is_logged = False  # the log says that all threads are abandoned

    async def call(self, handler: Handler, task: Any, context: Any) -> object:
        """The result of the handler; of a batch handler, with lists of tasks and contexts. Raises what it raises."""
        try:
            value = await (handler.call(task, context) if handler.is_async else self._in_thread(handler, task, context))
            # A plain wrapper of an `async def` returns a coroutine. It is for the loop, whose connections it may use.
            if value is not None and is_awaitable(value):
                value = await awaited(value)
        except BaseException as error:
            if self._is_child:
                forked.leave(error)
            raise
        if self._is_child:
            forked.leave(None)
        return value

    @property
    def computing(self) -> list[str]:
        """The names of the plain handlers that run now, each once. Called in the heartbeat's thread."""
        return sorted({call.handler.name for call in list(self._in_threads) if call.has_begun and not call.has_ended})

    @property
    def trouble(self) -> str:
        """What is degraded, in words. It is read every 0.4 s or so, and logged when it begins and when it ends."""
        self._abandoned = [call for call in self._abandoned if not call.has_ended]
        if len(self._abandoned) < self._threads:
            if self._is_logged and not self._abandoned:
                self._is_logged = False
                logger.info("the abandoned threads have ended")
            return ""
        if not self._is_logged:
            self._is_logged = True
            logger.warning(
                "as many abandoned threads still run as it may use: does a plain handler never return?",
                extra={"fields": {"threads": len(self._abandoned), "handler": self._abandoned[-1].handler.name}},
            )
        return f"{len(self._abandoned)} abandoned threads"

    def _note_child(self) -> None:
        self._is_child = True

    async def _in_thread(self, handler: Handler, task: Any, context: Any) -> object:
        call = ThreadCall(handler, current_run.get())
        self._in_threads.add(call)
        try:
            value, error = await anyio.to_thread.run_sync(
                call, task, context, abandon_on_cancel=True, limiter=self._limiter
            )
        except BaseException:
            call.is_abandoned = True
            self._abandoned.append(call)
            raise
        finally:
            self._in_threads.discard(call)
        if error is not None:
            raise error
        return value


class ThreadCall:
    """One call of a plain handler, in a thread. The handler's Context talks to it, as its Run: the runner goes on
    without this call when it is abandoned."""

    __slots__ = ("handler", "has_begun", "has_ended", "is_abandoned", "run")

    def __init__(self, handler: Handler, run: Run | None) -> None:
        self.handler = handler
        self.run = run  # the runner's, or the batch's
        self.has_begun = False
        self.has_ended = False
        self.is_abandoned = False

    def begin_transaction(self, context: Context, isolation: Isolation | None) -> Transaction:
        if self.run is None:
            raise ConfigError("ctx.transaction() is for handlers that a worker runs")
        return self.run.begin_transaction(context, isolation)

    def is_cancelled(self, context: Context) -> bool:
        return self.is_abandoned or (self.run is not None and self.run.is_cancelled(context))

    def report(self, context: Context, progress: Progress) -> None:
        if self.run is not None and not self.is_abandoned:
            self.run.report(context, progress)

    def results(self, context: Context) -> Awaitable[list[Any]]:
        return self.run.results(context) if self.run is not None else no_results(context.id)

    def __call__(self, task: Task, context: Context) -> tuple[object, BaseException | None]:
        """What the handler returns, and what it raises: returned, not raised, since the future that brings it to the
        loop has no use for two exceptions. It would throw a GeneratorExit into our coroutine, which takes that as the
        order to close; and it refuses a StopIteration."""
        current_run.set(self)  # in the thread's copy of the context
        pid = forked.pid
        self.has_begun = True
        value, failure = None, None
        try:
            value = self.handler.call(task, context)
        except BaseException as error:
            failure = error
        if forked.pid != pid:
            forked.leave(failure)
        self.has_ended = True
        return value, failure


async def no_results(task: int) -> list[Any]:
    return []


def is_our_cancellation(error: BaseException) -> bool:
    """Whether a handler was ended by a cancel scope of ours.

    Everything else that it raises is its own failure: SystemExit and KeyboardInterrupt too, and a CancelledError of
    something that it awaited, or that it made itself.
    """
    return isinstance(error, asyncio.CancelledError) and anyio.current_effective_deadline() == -math.inf
