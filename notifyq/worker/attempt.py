"""One attempt of one task: find its handler, fetch and decode the payload, call the handler, decide the outcome."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable
from typing import Any

import anyio
import msgspec

from ..codec import PAYLOAD_LIMIT, describe
from ..config import NAME_LENGTH
from ..errors import ConfigError, LeaseLost
from ..loops import awaited
from ..registry import Handler, Registry
from ..task import Context, Isolation, Task, Transaction
from . import outcome
from .batch import Batches
from .calls import Calls, is_our_cancellation
from .handler_run import HandlerRun
from .job import Job
from .outcome import Finished, HandedBack, Outcome, Unhandled
from .outcome_log import is_debugging, log_ignored, log_outcome, log_unnameable
from .services import Services
from .slots import Slots

TIMED_OUT = object()  # in the place of a handler's result


class Runner(HandlerRun):
    """The state of one runner: the job that it runs, and the scopes that cancel it."""

    __slots__ = ("began", "job", "stop", "task")

    def __init__(self, slots: Slots, services: Services) -> None:
        super().__init__(slots, services)
        self.job: Job | None = None
        self.began = 0.0
        self.stop: HandedBack | None = None  # the outcome, if `scope` was cancelled to hand the job back
        self.task: asyncio.Task[Any] | None = None

    def begin_transaction(self, context: Context, isolation: Isolation | None) -> Transaction:
        if self._services.transactions is None:
            raise ConfigError(
                "ctx.transaction() needs a worker, which settles the task; in tests: notifyq.testing.drain"
            )
        job = self._slots.held.get(context.id)
        if job is None or job.attempt != context.attempt:
            raise ConfigError(f"task {context.id} doesn't run here (any more), so there is nothing to settle for it")
        if job in self._slots.lost:
            raise LeaseLost(f"task {job.id} isn't this run's any more")
        return self._services.transactions.begin(job, isolation, self._slots.lost.add)

    def job_of(self, context: Context) -> Job | None:
        job = self.job  # another, if the Context is of a handler that has ended, in an asyncio task that it left behind
        return job if job is not None and (job.id, job.attempt) == (context.id, context.attempt) else None


class Attempts:
    """Makes the attempts of all runners of a worker."""

    def __init__(self, registry: Registry, calls: Calls, batches: Batches, services: Services) -> None:
        self._handlers = {handler.type: handler for handler in registry.handlers}
        self._calls = calls
        self._batches = batches
        self._services = services
        self._transactions = services.transaction_states

    async def run(self, runner: Runner, job: Job) -> Outcome:
        """Raises nothing but a cancellation of the runner's scope."""
        handler = self._handlers.get(job.type)
        if handler is None:
            return _without_handler(job)
        task = _decode(handler, job.payload) if job.payload is not None else await self._fetch(handler, job)
        if task is None:
            return HandedBack(job)
        if isinstance(task, str):
            return self._conclude(runner, handler, outcome.undecodable(job, task))
        if job.deadline is not None and job.deadline.has_passed:
            return self._conclude(runner, handler, outcome.expired(job, job.deadline.expires_at))
        context = Context(
            id=job.id,
            queue=job.queue,
            attempt=job.attempt,
            max_attempts=outcome.attempts_allowed(job, handler),
            priority=job.priority,
            created_at=job.created_at,
        )
        if handler.batch is not None:
            return self._conclude(runner, handler, await self._batches.join(handler, job, task, context))
        try:
            if handler.timeout is None:
                value = await self._call(handler, task, context)
            else:
                value = await self._call_within_limit(runner, handler, task, context)
        except BaseException as error:
            if is_our_cancellation(error):
                raise
            return self._conclude(runner, handler, outcome.raised(job, handler, error))
        if value is None and not self._transactions and not is_debugging():
            return Finished(job, "done")  # as most tasks end, so this is quick: _conclude would do no more
        if value is TIMED_OUT:
            return self._conclude(runner, handler, outcome.timed_out(job, handler))
        return self._conclude(runner, handler, outcome.returned(job, handler, value))

    def name_handler(self, job: Job) -> str:
        handler = self._handlers.get(job.type)
        return f"{handler.name if handler else job.type} (task {job.id})"

    async def _fetch(self, handler: Handler, job: Job) -> Task | str | None:
        """The task of a job that was claimed without its payload, which is large. A str says why there is none; None:
        the lease is lost, so the fence refuses any outcome."""
        assert self._services.large_payloads is not None
        answer = await self._services.large_payloads.read(job)
        return _decode(handler, answer) if isinstance(answer, bytes) else answer

    async def _call_within_limit(self, runner: Runner, handler: Handler, task: Task, context: Context) -> object:
        """What the handler returns, or TIMED_OUT."""
        assert handler.timeout is not None
        value: object = None
        with anyio.CancelScope(deadline=anyio.current_time() + handler.timeout) as limit:
            runner.limit = limit
            try:
                value = await self._call(handler, task, context)
            finally:
                runner.limit = None
        return TIMED_OUT if limit.cancelled_caught else value

    def _call(self, handler: Handler, task: Task, context: Context) -> Awaitable[object]:
        """Through the middleware, if the app has any."""
        if handler.around is None:
            return self._calls.call(handler, task, context)
        return awaited(handler.around(task, context, functools.partial(self._calls.call, handler)))

    def _conclude(self, runner: Runner, handler: Handler, result: Outcome) -> Outcome:
        """Log how the attempt ended. Its outcome is `result`, or done if the handler's own transaction has settled the
        task."""
        if self._transactions and self._transactions.get(result.job) == "committed":
            log_ignored(handler, result)
            result = Finished(result.job, "done")
        log_outcome(handler, result, runner.began)
        return result


def _without_handler(job: Job) -> Outcome:
    if len(job.type) <= NAME_LENGTH:
        return Unhandled(job)
    # No handler's type is as long, and the row would not fit into the index of unhandled tasks.
    why = f"its type is longer than {NAME_LENGTH} characters"
    log_unnameable(job, why)
    return outcome.undecodable(job, why)


def _decode(handler: Handler, payload: bytes) -> Task | str:
    """A str says why it can't be decoded. The caller keeps no payload, so that a large one isn't held twice."""
    if len(payload) > PAYLOAD_LIMIT:
        return f"its payload is larger than {PAYLOAD_LIMIT:,} bytes"
    try:
        return handler.decode(payload)
    except Exception as error:
        return str(error) if isinstance(error, msgspec.MsgspecError) else describe(error)
