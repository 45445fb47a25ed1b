"""Gather tasks of a type for its batch handler, which runs once with all of them.

Each task keeps the runner that took it, and waits there for its own outcome. So a batch counts as that many of
`concurrency`, and whatever befalls one task, a lost lease say, reaches its runner as it does any other's:

    gathered    it leaves, and nobody knew it
    running     it leaves, its outcome is dropped, and the call goes on for the others. When all have left, the call is
                cancelled; a task is held until the call has ended, as it is in its hands

A batch begins when it is full, `linger` seconds after its first task came, or when nothing more can come, since
everything that has a slot here is being gathered.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import anyio

from .. import log
from ..errors import ConfigError
from ..registry import Handler, Registry
from ..task import Context, Isolation, Progress, Run, Task, Transaction, Verdict
from . import outcome
from .job import Job
from .outcome import Outcome

logger = log.logger("notifyq.batch")

Call = Callable[[Handler, Any, Any], Awaitable[object]]  # a handler, with the tasks and their contexts
ReadResults = Callable[[int], Awaitable[list[Any]]]  # of the tasks that this one has waited for


class Member:
    """A task in its batch."""

    __slots__ = ("context", "outcome", "task")

    def __init__(self, task: Task, context: Context) -> None:
        self.task = task
        self.context = context
        self.outcome: Outcome | None = None


class Batch:
    """Tasks for one call of their handler: gathered, then run, then `over`. A Run, to its handlers' Contexts."""

    __slots__ = ("_reports", "_results", "_running", "handler", "limit", "members", "over", "scope", "task", "timer")

    def __init__(self, handler: Handler, reports: dict[Job, Progress], results: ReadResults) -> None:
        self.handler = handler
        self._reports = reports
        self._results = results
        self.members: dict[Job, Member] = {}
        self._running: dict[int, Job] = {}  # of these, by id, while it runs: those that haven't left
        self.over = asyncio.Event()
        self.scope = anyio.CancelScope()
        self.limit: anyio.CancelScope | None = None  # inside of it
        self.task: asyncio.Task[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def begin(self, context: Context, isolation: Isolation | None) -> Transaction:
        raise ConfigError(
            f"ctx.transaction() settles one task, and task {context.id} runs in a batch; use a connection of your own, "
            "or a handler without batch="
        )

    def is_cancelled(self, context: Context) -> bool:
        if self.scope.cancel_called or (self.limit is not None and self.limit.cancel_called):
            return True
        job = self._running.get(context.id)  # none, for what a handler has left behind
        return job is None or job.attempt != context.attempt

    def report(self, context: Context, progress: Progress) -> None:
        job = self._running.get(context.id)
        if job is not None and not self.is_cancelled(context):
            self._reports[job] = progress

    def results(self, context: Context) -> Awaitable[list[Any]]:
        return self._results(context.id)

    def start(self) -> None:
        """Nobody joins it any more."""
        self._running = {job.id: job for job in self.members}

    def leave(self, job: Job) -> None:
        """That task is no longer for it to settle."""
        self._running.pop(job.id, None)
        if not self._running:
            self.scope.cancel()

    async def run(self, call: Call) -> None:
        """Once; then each member has its outcome, or all have left."""
        self.task = me = asyncio.current_task()
        assert me is not None
        try:
            if not self.scope.cancel_called:  # all may have left before it began
                with self.scope:
                    for member, result in zip(self.members.values(), await self._outcomes(call), strict=True):
                        member.outcome = result
        finally:
            self._running = {}
            self.over.set()
        if me.cancelling():  # by the handler, which would end the group of all runners
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass

    async def _outcomes(self, call: Call) -> Sequence[Outcome]:
        """Raises nothing but a cancellation of its scope; see Runners._attempt."""
        handler, jobs = self.handler, list(self.members)
        tasks = [member.task for member in self.members.values()]
        contexts = [member.context for member in self.members.values()]
        try:
            value = None
            with anyio.CancelScope(deadline=anyio.current_time() + (handler.timeout or math.inf)) as self.limit:
                value = await call(handler, tasks, contexts)
            limit, self.limit = self.limit, None
            if limit.cancelled_caught:
                return [outcome.timed_out(job, handler) for job in jobs]
        except BaseException as error:
            if is_ours(error):
                raise
            return [outcome.raised(job, handler, error) for job in jobs]
        return judged(handler, jobs, value)


class Batches:
    """What runners gather. `start` starts a coroutine function beside them; `lost` is whose leases are lost."""

    def __init__(
        self,
        concurrency: int,
        call: Call,
        start: Callable[[Run, Callable[[Batch], Coroutine[Any, Any, None]], Batch], None],
        lost: set[Job],
        reports: dict[Job, Progress],
        results: ReadResults,
    ) -> None:
        self._concurrency = concurrency
        self._call = call
        self._start = start
        self._lost = lost
        self._reports = reports
        self._results = results
        self._gathering: dict[str, Batch] = {}  # by type
        self._gathered: dict[Job, Batch] = {}  # of all types
        self._running: set[Batch] = set()

    async def join(self, handler: Handler, job: Job, task: Task, context: Context) -> Outcome:
        """Wait until the batch has run that this task became part of. Raises nothing but a cancellation from outside,
        and that not before the call has ended."""
        batch = self._gathering.get(handler.type)
        if batch is None:
            batch = self._gathering[handler.type] = Batch(handler, self._reports, self._results)
            batch.timer = asyncio.get_running_loop().call_later(handler.linger, self._begin, batch)
        member = batch.members[job] = Member(task, context)
        self._gathered[job] = batch
        if len(batch.members) == handler.batch:
            self._begin(batch)
        elif len(self._gathered) == self._concurrency:
            self.hurry()
        try:
            await batch.over.wait()
        except asyncio.CancelledError:
            if self.give_up(job) or job not in batch.members:
                raise
            batch.leave(job)
            with anyio.CancelScope(shield=True):
                await batch.over.wait()
            if member.outcome is None or job in self._lost:
                raise
        assert member.outcome is not None
        return member.outcome

    def give_up(self, job: Job) -> bool:
        """Take a job out that is gathered and not begun; False if it isn't. Whoever waits for it is to be cancelled."""
        batch = self._gathered.pop(job, None)
        if batch is None:
            return False
        del batch.members[job]
        if not batch.members:
            self._gathered_all(batch)
        return True

    def hurry(self) -> None:
        """Nothing more will come for now: run what there is."""
        for batch in list(self._gathering.values()):
            self._begin(batch)

    def whose(self, task: asyncio.Task[Any] | None) -> str | None:
        """Of the batch that this asyncio task runs. Called from another thread."""
        for batch in list(self._running):
            if batch.task is task:
                return f"{batch.handler.name} (a batch of {len(batch.members)} tasks)"
        return None

    def _begin(self, batch: Batch) -> None:
        self._gathered_all(batch)
        for job in batch.members:
            del self._gathered[job]
        self._running.add(batch)
        batch.start()
        self._start(batch, self._run, batch)

    def _gathered_all(self, batch: Batch) -> None:
        assert batch.timer is not None
        batch.timer.cancel()
        del self._gathering[batch.handler.type]

    async def _run(self, batch: Batch) -> None:
        try:
            await batch.run(self._call)
        finally:
            self._running.discard(batch)


def is_ours(error: BaseException) -> bool:
    """Whether a handler was ended by our own cancellation, which comes from a scope.

    Everything else it raises is its own failure, SystemExit and KeyboardInterrupt too, and so is a CancelledError of
    something it waited for, or of its own doing.
    """
    return isinstance(error, asyncio.CancelledError) and anyio.current_effective_deadline() == -math.inf


def judged(handler: Handler, jobs: Sequence[Job], value: object) -> Sequence[Outcome]:
    """What a batch handler that returned has made of each task."""
    if value is None or isinstance(value, Verdict) or outcome.is_verdict_class(value):
        return [outcome.returned(job, handler, value) for job in jobs]
    if not isinstance(value, list | tuple):
        why = f"its batch handler returned a {type(value).__name__}"
    elif len(items := cast("Sequence[object]", value)) != len(jobs):
        why = f"its batch handler returned a list of {len(items)} for {len(jobs)} tasks"
    else:
        return [
            outcome.raised(job, handler, item)
            if isinstance(item, BaseException)
            else outcome.returned(job, handler, item)
            for job, item in zip(jobs, items, strict=True)
        ]
    why += "; expected None, or a list with one item for each task"
    return [outcome.failed(job, handler, why) for job in jobs]


def tell_clipped(registry: Registry, concurrency: int) -> None:
    """Say which batches can't get as large as they may."""
    for handler in registry.handlers:
        if handler.batch is not None and handler.batch > concurrency:
            logger.warning(
                "a batch counts as that many of the worker's concurrency, so it gets no larger than that",
                extra={"fields": {"handler": handler.name, "batch": handler.batch, "concurrency": concurrency}},
            )
