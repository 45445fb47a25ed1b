"""Batches gather tasks of one type for its batch handler, which is called once with all of them.

Each task keeps the runner that took it, and waits there for its own outcome. So a batch of n tasks counts as n of
`concurrency`. A lost lease, or a shutdown, reaches a task in a batch through its runner, like any other task:

    the batch gathers   the task leaves it, and the handler never gets it
    the batch runs      the task leaves it, its outcome is dropped, and the call goes on for the others. When all have
                        left, the call is cancelled. A task is held until the call has ended, since the handler has it

A batch begins when it is full, `linger` seconds after its first task came, or when no further task can come, since
each slot of the worker has a task that is being gathered.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from .. import log
from ..errors import ConfigError
from ..registry import Handler
from ..task import Context, Isolation, Task, Transaction
from . import outcome
from .calls import Calls, is_our_cancellation
from .group import RunGroup
from .handler_run import HandlerRun
from .job import Job
from .outcome import Outcome
from .services import Services
from .slots import Slots

logger = log.logger("notifyq.batch")


class Member:
    """A task in its batch."""

    __slots__ = ("context", "outcome", "task")

    def __init__(self, task: Task, context: Context) -> None:
        self.task = task
        self.context = context
        self.outcome: Outcome | None = None


class Batch(HandlerRun):
    """Tasks for one call of their handler: gathered, then running, then `over`."""

    __slots__ = ("_running", "handler", "members", "over", "task", "timer")

    def __init__(self, handler: Handler, slots: Slots, services: Services) -> None:
        super().__init__(slots, services)
        self.handler = handler
        self.members: dict[Job, Member] = {}
        self._running: dict[int, Job] = {}  # while the handler runs: the members that haven't left, by the task's id
        self.over = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def begin_transaction(self, context: Context, isolation: Isolation | None) -> Transaction:
        raise ConfigError(
            f"ctx.transaction() settles one task, and task {context.id} runs in a batch; use a connection of your own, "
            "or a handler without batch="
        )

    def job_of(self, context: Context) -> Job | None:
        job = self._running.get(context.id)  # None, in an asyncio task that an ended handler left behind
        return job if job is not None and job.attempt == context.attempt else None

    def start(self) -> None:
        """Nothing joins it any more."""
        self._running = {job.id: job for job in self.members}

    def leave(self, job: Job) -> None:
        """Drop this task's outcome; cancel the call if no task is left."""
        self._running.pop(job.id, None)
        if not self._running:
            self.scope.cancel()

    async def run(self, calls: Calls) -> None:
        """Call the handler, at most once. Then each member has an outcome, unless all have left."""
        self.task = me = asyncio.current_task()
        assert me is not None
        try:
            if not self.scope.cancel_called:  # it is, if all have left before this began
                with self.scope:
                    for job, result in (await self._outcomes(calls)).items():
                        self.members[job].outcome = result
        finally:
            self._running = {}
            self.over.set()
        if me.cancelling():  # by the handler, which would end the group of all runners
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass

    async def _outcomes(self, calls: Calls) -> Mapping[Job, Outcome]:
        """The handler gets no task that has expired while the batch gathered. Raises as `_call`."""
        late = {
            job: outcome.expired(job, job.deadline.expires_at)
            for job in self.members
            if job.deadline is not None and job.deadline.has_passed
        }
        jobs = [job for job in self.members if job not in late]
        return late | dict(zip(jobs, await self._call(calls, jobs), strict=True)) if jobs else late

    async def _call(self, calls: Calls, jobs: list[Job]) -> Sequence[Outcome]:
        """Raises nothing but a cancellation of the batch's scope."""
        handler = self.handler
        tasks = [self.members[job].task for job in jobs]
        contexts = [self.members[job].context for job in jobs]
        try:
            value = None
            with anyio.CancelScope(deadline=anyio.current_time() + (handler.timeout or math.inf)) as self.limit:
                value = await calls.call(handler, tasks, contexts)
            limit, self.limit = self.limit, None
            if limit.cancelled_caught:
                return [outcome.timed_out(job, handler) for job in jobs]
        except BaseException as error:
            if is_our_cancellation(error):
                raise
            return [outcome.raised(job, handler, error) for job in jobs]
        return outcome.returned_by_batch(jobs, handler, value)


class Batches:
    """The batches of a worker, which its runners gather."""

    def __init__(
        self,
        concurrency: int,
        slots: Slots,
        calls: Calls,
        group: RunGroup,
        services: Services,
    ) -> None:
        self._concurrency = concurrency
        self._slots = slots
        self._calls = calls
        self._group = group
        self._services = services
        self._gathering: dict[str, Batch] = {}  # by type
        self._gathered: dict[Job, Batch] = {}  # of all types
        self._running: set[Batch] = set()

    async def join(self, handler: Handler, job: Job, task: Task, context: Context) -> Outcome:
        """Put the task into a batch, and return its outcome. Raises nothing but a cancellation from outside, and that
        not before the call has ended."""
        batch = self._gathering.get(handler.type)
        if batch is None:
            batch = self._gathering[handler.type] = Batch(handler, self._slots, self._services)
            batch.timer = asyncio.get_running_loop().call_later(handler.linger, self._begin, batch)
        member = batch.members[job] = Member(task, context)
        self._gathered[job] = batch
        if len(batch.members) == handler.batch:
            self._begin(batch)
        elif len(self._gathered) == self._concurrency:
            self.start_all()
        try:
            await batch.over.wait()
        except asyncio.CancelledError:
            if self.remove_member(job) or job not in batch.members:
                raise
            batch.leave(job)
            with anyio.CancelScope(shield=True):
                await batch.over.wait()
            if member.outcome is None or job in self._slots.lost:
                raise
        assert member.outcome is not None
        return member.outcome

    def remove_member(self, job: Job) -> bool:
        """Take a job out of a batch that hasn't begun; False if it isn't in one. The caller cancels its runner."""
        batch = self._gathered.pop(job, None)
        if batch is None:
            return False
        del batch.members[job]
        if not batch.members:
            self._stop_gathering(batch)
        return True

    def start_all(self) -> None:
        """No further task comes for now: let all batches begin."""
        for batch in list(self._gathering.values()):
            self._begin(batch)

    def name_handler(self, task: asyncio.Task[Any] | None) -> str | None:
        """What this asyncio task runs, if it is a batch. Called in the heartbeat's thread."""
        for batch in list(self._running):
            if batch.task is task:
                return f"{batch.handler.name} (a batch of {len(batch.members)} tasks)"
        return None

    def _begin(self, batch: Batch) -> None:
        self._stop_gathering(batch)
        for job in batch.members:
            del self._gathered[job]
        self._running.add(batch)
        batch.start()
        self._group.start(batch, self._run, batch)

    def _stop_gathering(self, batch: Batch) -> None:
        assert batch.timer is not None
        batch.timer.cancel()
        del self._gathering[batch.handler.type]

    async def _run(self, batch: Batch) -> None:
        try:
            await batch.run(self._calls)
        finally:
            self._running.discard(batch)
