"""The runners of a worker, which run its tasks side by side.

A fixed set of long-lived runners takes jobs from a deque. To spawn a coroutine for each job would cost 11 to 13 µs; the
deque costs 0.2. A runner has one cancel scope, and makes a new one only after a cancellation; only a job with a timeout
gets a scope of its own.

The runners' task group is served by an asyncio task of its own. The group waits for its children however long they
take, and a handler that swallows its cancellation must not keep the worker from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Sequence
from typing import Any

import anyio

from .. import log
from ..registry import Registry
from .attempt import Attempts, Runner
from .batch import Batches
from .calls import Calls
from .group import RunGroup
from .job import Job
from .outcome import Finished, HandedBack, Outcome
from .pipe import Sink
from .services import Services
from .slots import Slots

logger = log.logger("notifyq.run")

CANCEL_SECONDS = 2.0  # how long a cancelled handler may take to end
YIELD_SECONDS = 0.005  # a runner whose handlers never wait lets other coroutines run each time that this has passed


class Runners:
    """Takes jobs by `add_jobs`. Of each it tells the sink its outcome, and then that a slot is free. Its methods are
    for the worker's event loop, but two that say otherwise."""

    def __init__(
        self,
        registry: Registry,
        concurrency: int,
        threads: int,
        sink: Sink,
        services: Services | None = None,
    ) -> None:
        self._concurrency = concurrency
        self._sink = sink
        self._put = sink.settle
        self._services = services = services or Services()
        self._transactions = services.transaction_states
        self.slots = Slots(registry)
        self.held = self.slots.held
        self._next_attempts: dict[int, Job] = {}  # of tasks whose lost attempts are still held, by the task's id
        self._runners: set[Runner] = set()
        self._idle: list[asyncio.Future[None]] = []  # of runners without a job
        self._calls = Calls(threads)
        self._group = RunGroup()
        self._batches = Batches(concurrency, self.slots, self._calls, self._group, self._services)
        self._attempts = Attempts(registry, self._calls, self._batches, self._services)

    @property
    def ready(self) -> asyncio.Event:
        """Set when `add_jobs` may be called."""
        return self._group.ready

    @property
    def computing(self) -> list[str]:
        """The names of the plain handlers that run now, each once. Called in the heartbeat's thread."""
        return self._calls.computing

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        return self._calls.trouble

    @property
    def leases(self) -> list[Job]:
        """The jobs whose leases count: those held, and the next attempts, without those that are lost or were settled
        by their own transactions."""
        jobs = [*self.held.values(), *self._next_attempts.values()]
        return [job for job in jobs if job not in self.slots.lost and self._transactions.get(job) != "committed"]

    def name_handler(self, task: asyncio.Task[Any] | None) -> str | None:
        """`app.send_mail (task 5)`: what this asyncio task runs. Called in the heartbeat's thread."""
        for runner in list(self._runners):
            if runner.task is task and (job := runner.job) is not None:
                return self._attempts.name_handler(job)
        return self._batches.name_handler(task)

    # From the start to the end.

    async def run(self) -> None:
        """Fails when a runner does. Cancelled, it hands everything back, and abandons, after a while, the handlers that
        can't be cancelled."""
        host = asyncio.get_running_loop().create_task(self._group.serve(), name="notifyq runners")
        try:
            await asyncio.wait([host])
            host.result()
        finally:
            seconds = 0.1 if self._group.is_closed else CANCEL_SECONDS
            self.hand_back_waiting()
            self.hand_back_running()
            self.close()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([host], timeout=seconds)
            if not host.done():
                stuck = [self.name_handler(runner.task) or "unknown" for runner in self._runners]
                logger.error(
                    "these handlers didn't end when cancelled; they are abandoned, and their tasks handed back",
                    extra={"fields": {"handlers": stuck[:20]}},
                )

    def add_jobs(self, jobs: Sequence[Job]) -> None:
        """Run these, in their order."""
        if self._group.is_closed:  # the last claim's answer came after the end
            for job in jobs:
                self._put(HandedBack(job))
            return
        if not self.held.keys().isdisjoint([job.id for job in jobs]):
            jobs = [job for job in jobs if not self._queue_behind_lost(job)]
        self.slots.add(jobs)
        for _ in range(min(len(self.slots.waiting), self._concurrency)):
            if self._idle:
                idle = self._idle.pop()
                if not idle.done():
                    idle.set_result(None)
            elif len(self._runners) < self._concurrency:
                self._spawn()
            else:
                break

    def _queue_behind_lost(self, job: Job) -> bool:
        """If the task is held already, keep the job until the handler of the earlier attempt has ended, and return
        True. The earlier lease is lost: other workers took it, a crash of the server undid it, or the task was
        cancelled and retried."""
        if (held := self.held.get(job.id)) is not None:
            self.cancel_lost(held)
            if job.id in self.held:
                self._next_attempts[job.id] = job
                return True
        return False

    def start_batches(self) -> None:
        """No more jobs will come for now: let batches begin with what they have."""
        self._batches.start_all()

    def cancel_lost(self, job: Job) -> bool:
        """The lease of this job is lost: cancel its handler, and settle nothing. False if the job isn't held any more,
        or if its own transaction settles it: that finds out by itself, or has ended the lease."""
        if self.held.get(job.id) is not job or self._transactions.get(job) in ("ending", "committed"):
            return False
        if job in self.slots.waiting:
            self.slots.waiting.remove(job)
            self._release(job)
            return True
        self.slots.lost.add(job)
        for runner in self._runners:
            if runner.job is job:
                runner.scope.cancel()
        return True

    def hand_back_waiting(self) -> None:
        """Hand back all jobs whose handlers haven't begun."""
        while self._next_attempts:
            self._put(HandedBack(self._next_attempts.popitem()[1]))
        while self.slots.waiting:
            self._settle(HandedBack(self.slots.waiting.popleft()))
        large = self._services.large_payloads
        for runner in self._runners:
            job = runner.job
            if job is not None and (
                self._batches.remove_member(job) or (large is not None and large.cancel_request(job))
            ):
                runner.job = None
                runner.scope.cancel()
                self._settle(HandedBack(job))

    def hand_back_running(self) -> None:
        """Cancel every handler, and hand its job back."""
        for runner in self._runners:
            if runner.job is not None and runner.stop is None:
                runner.stop = HandedBack(runner.job)
                runner.scope.cancel()

    def close(self) -> None:
        """Runners without a job end. Call it when nothing is held."""
        self._group.close()
        for idle in self._idle:
            if not idle.done():
                idle.set_result(None)
        self._idle.clear()

    # One runner.

    def _spawn(self) -> None:
        runner = Runner(self.slots, self._services)
        self._runners.add(runner)
        self._group.start(runner, self._run, runner)

    async def _run(self, runner: Runner) -> None:
        runner.task = me = asyncio.current_task()
        assert me is not None
        clean = contextvars.copy_context()
        try:
            while not self._group.is_closed:
                if not self.slots.waiting:
                    await self._wait_for_job()
                    continue
                runner.scope = anyio.CancelScope()
                with runner.scope:
                    await self._run_waiting(runner, clean)
                if runner.job is not None:  # its scope was cancelled while the handler ran
                    self._end_cancelled(runner)
                if me.cancelling() or contextvars.copy_context() != clean:
                    # Another runner takes its place, without that. A cancellation still to come would end the group.
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError:
                        pass
                    break
        finally:
            self._runners.discard(runner)
        if self.slots.waiting and not self._group.is_closed and len(self._runners) < self._concurrency:
            self._spawn()

    async def _wait_for_job(self) -> None:
        idle = asyncio.get_running_loop().create_future()
        self._idle.append(idle)
        try:
            await idle
        finally:
            if idle in self._idle:
                self._idle.remove(idle)

    async def _run_waiting(self, runner: Runner, clean: contextvars.Context) -> None:
        """Run jobs, one after the other, until none waits, or until the runner must be replaced or was cancelled."""
        assert runner.task is not None
        waiting, scope, cancelling = self.slots.waiting, runner.scope, runner.task.cancelling
        now = time.monotonic()
        yield_at = now + YIELD_SECONDS
        while waiting:
            runner.job = job = waiting.popleft()
            runner.began = now
            result = await self._attempts.run(runner, job)
            if runner.stop is not None:
                # It is to be handed back, and it ended by itself: that counts only if it has succeeded.
                if not (isinstance(result, Finished) and result.state == "done"):
                    result = runner.stop
                runner.stop = None
            runner.job = None
            if job in self.slots.lost:  # the fence would refuse it, but not if we hold the same attempt once more
                self._release(job)
            else:
                self._settle(result)
            # A handler may have left something in its context variables, or have cancelled the asyncio task it ran in.
            if scope.cancel_called or cancelling() or contextvars.copy_context() != clean:
                return
            if (now := time.monotonic()) > yield_at:
                await asyncio.sleep(0)
                now = time.monotonic()
                yield_at = now + YIELD_SECONDS

    def _end_cancelled(self, runner: Runner) -> None:
        job, stop = runner.job, runner.stop
        runner.job = runner.stop = None
        assert job is not None
        if stop is None:
            self._release(job)  # the lease is lost, so there is nothing to write
        else:
            self._settle(stop)

    def _settle(self, result: Outcome) -> None:
        if not self._transactions or self._transactions.get(result.job) != "committed":
            self._put(result)
        self._release(result.job)

    def _release(self, job: Job) -> None:
        """The attempt has ended: forget what is known about it."""
        self.slots.remove(job)
        if self._transactions:
            self._transactions.pop(job, None)
        if job.size and (large := self._services.large_payloads) is not None:
            large.release(job)
        if self._next_attempts and (again := self._next_attempts.pop(job.id, None)) is not None:
            self.add_jobs([again])
        self._sink.on_slot_released()
