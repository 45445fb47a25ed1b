"""Run one task; and the runners, which do it side by side.

A fixed set of long-lived runners in one task group takes jobs from a deque. A task spawned for each job would cost
11 to 13 µs; a deque costs 0.2. A runner has one cancel scope, renewed only after it was cancelled; only a job with a
timeout gets a scope of its own.

The task group has an asyncio task of its own for host, since it waits for its children however long they take, and a
handler that swallows its cancellation must not keep the worker from ending.

What is held (waiting or running) is counted here, by queue, as that decides how much may be claimed.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import TaskGroup

from .. import forked, log
from ..codec import PAYLOAD_LIMIT, describe
from ..config import NAME_LENGTH
from ..errors import ConfigError, LeaseLost
from ..registry import Handler, Registry, awaited, is_awaitable
from ..task import Context, Isolation, Progress, Run, Task, Transaction, current_run
from . import outcome
from .batch import Batches, ReadResults, is_ours
from .job import Job
from .large_payloads import LargePayloads
from .outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled
from .pipe import Sink
from .transaction import State, Transactions

logger = log.logger("notifyq.run")

T = TypeVar("T")

CANCEL_SECONDS = 2.0  # for a handler to end that was cancelled
FAIR_SECONDS = 0.005  # a runner whose handlers never wait lets the others have the loop after so long


class Runner:
    """One runner's hands: the job it has, and how to take that away from it. A Run, to its handlers' Contexts."""

    __slots__ = ("_begin", "_reports", "_results", "began", "job", "limit", "scope", "stop", "task")

    def __init__(
        self,
        begin: Callable[[Context, Isolation | None], Transaction],
        reports: dict[Job, Progress],
        results: ReadResults,
    ) -> None:
        self._begin = begin
        self._reports = reports
        self._results = results
        self.job: Job | None = None
        self.began = 0.0
        self.scope = anyio.CancelScope()
        self.limit: anyio.CancelScope | None = None  # inside of it, of a job with a timeout
        self.stop: HandedBack | None = None  # cancelled from outside: this, or nothing, is the outcome
        self.task: asyncio.Task[Any] | None = None

    def begin(self, context: Context, isolation: Isolation | None) -> Transaction:
        return self._begin(context, isolation)

    def is_cancelled(self, context: Context) -> bool:
        if self.scope.cancel_called or (self.limit is not None and self.limit.cancel_called):
            return True
        job = self.job  # another, for what a handler has left behind
        return job is None or (job.id, job.attempt) != (context.id, context.attempt)

    def report(self, context: Context, progress: Progress) -> None:
        job = self.job
        if job is not None and not self.is_cancelled(context):
            self._reports[job] = progress

    def results(self, context: Context) -> Awaitable[list[Any]]:
        return self._results(context.id)


class Predecessors(Protocol):
    """What reads the results of the tasks that a task has waited for."""

    def results(self, task: int) -> Awaitable[list[Any]]: ...
    def close(self) -> None: ...


class Services(NamedTuple):
    """What a running attempt may need of the database; None: not here, in a test without a worker."""

    transactions: Transactions | None = None
    predecessors: Predecessors | None = None
    large_payloads: LargePayloads | None = None

    async def close(self) -> None:
        if self.transactions is not None:
            await self.transactions.close()
        if self.predecessors is not None:
            self.predecessors.close()
        if self.large_payloads is not None:
            self.large_payloads.close()


class Runners:
    """`feed` it jobs; it tells the sink each outcome, then that a slot is free. Lives on one event loop."""

    def __init__(
        self,
        registry: Registry,
        concurrency: int,
        threads: int,
        sink: Sink,
        services: Services | None = None,
    ) -> None:
        self._is_child = False  # this is a forked child, in which a handler has returned
        forked.call_in_children(self._forked)
        self._handlers = {handler.type: handler for handler in registry.handlers}
        self._concurrency = concurrency
        self._sink = sink
        self._settle = sink.settle
        services = services or Services()
        self._waiting: deque[Job] = deque()
        self._runners: set[Runner] = set()
        self._idle: list[asyncio.Future[None]] = []
        self._most_threads = threads
        self._threads = anyio.CapacityLimiter(threads)
        self._calls: set[_Call] = set()  # that have a thread, or wait for one
        self._left: list[_Call] = []  # threads that were left alone
        self._told_left = False
        self._group: TaskGroup | None = None
        self._closing = asyncio.Event()
        self.ready = asyncio.Event()  # it may be fed
        self._closed = False
        self._behind: dict[int, Job] = {}  # next attempts of tasks that are held
        self._lost: set[Job] = set()  # of those held: their leases; the handlers wind up
        self._transactions = services.transactions
        self.reports: dict[Job, Progress] = {}  # not written yet: handlers' threads put, the heartbeat's takes
        self._results = services.predecessors.results if services.predecessors else _no_results
        self._large = services.large_payloads
        self._batches = Batches(concurrency, self._call, self._start, self._lost, self.reports, self._results)
        self._states: dict[Job, State] = self._transactions.states if self._transactions else {}
        self.held: dict[int, Job] = {}  # by id: waiting and running
        self.by_queue: Counter[str] = Counter()  # of these
        self.finished = 0  # attempts ended, ever
        # Of plain handlers alone: how many tasks share a thread, which is more than one for a batch handler; how many
        # are held; how many have ended, ever.
        self.plain = {handler.type: handler.batch or 1 for handler in registry.handlers if handler.is_plain}
        self.plain_held: Counter[str] = Counter()
        self.plain_finished = 0

    @property
    def waiting(self) -> int:
        """Jobs claimed ahead, not begun."""
        return len(self._waiting)

    @property
    def threads_needed(self) -> int:
        """How many threads the held tasks of plain handlers take, or wait for."""
        return self.threads_for(self.plain_held)

    def threads_for(self, held: Mapping[str, int]) -> int:
        """How many threads so many tasks of these plain handlers take, or wait for."""
        return sum(-(-count // self.plain[type]) for type, count in held.items())

    @property
    def seats(self) -> int:
        """How many tasks of plain batch handlers fit into the threads that are counted for those held."""
        return sum(-held % self.plain[type] for type, held in self.plain_held.items())

    @property
    def computing(self) -> list[str]:
        """The names of the plain handlers that run now, each once. Called from another thread."""
        return sorted({call.handler.name for call in list(self._calls) if call.begun and not call.over})

    @property
    def leases(self) -> list[Job]:
        """What is held, or will be, but for what was lost, or settled by its own transaction."""
        held = [job for job in (*self.held.values(), *self._behind.values()) if job not in self._lost]
        return [job for job in held if self._states.get(job) != "committed"] if self._states else held

    @property
    def trouble(self) -> str:
        """What is degraded, in words; looked at now and then."""
        self._left = [call for call in self._left if not call.over]
        if len(self._left) < self._most_threads:
            if self._told_left and not self._left:
                self._told_left = False
                logger.info("the threads that were left alone have ended")
            return ""
        if not self._told_left:
            self._told_left = True
            logger.warning(
                "as many threads as it may use were left alone and still run: does a plain handler never return?",
                extra={"fields": {"threads": len(self._left), "handler": self._left[-1].handler.name}},
            )
        return f"{len(self._left)} threads left alone"

    async def run(self) -> None:
        """Fails when a runner does. Cancelled, it hands everything back, and leaves alone, after a while, what can't
        be cancelled."""
        host = asyncio.get_running_loop().create_task(self._host(), name="notifyq runners")
        try:
            await asyncio.wait([host])
            host.result()
        finally:
            seconds = 0.1 if self._closed else CANCEL_SECONDS
            self.hand_back_waiting()
            self.hand_back_running()
            self.close()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([host], timeout=seconds)
            if not host.done():
                stuck = [self.whose(runner.task) or "unknown" for runner in self._runners]
                logger.error(
                    "these handlers didn't end when cancelled; they are left alone, and their tasks handed back",
                    extra={"fields": {"handlers": stuck[:20]}},
                )

    async def _host(self) -> None:
        async with anyio.create_task_group() as self._group:
            self.ready.set()
            await self._closing.wait()

    def feed(self, jobs: Sequence[Job]) -> None:
        """Run these, in their order."""
        if self._closed:  # claimed by the last statement before the end
            for job in jobs:
                self._settle(HandedBack(job))
            return
        for job in jobs:
            if (held := self.held.get(job.id)) is not None:
                # Claimed by us again, so the lease we had is gone, whether we were told or not: taken by others, undone
                # by a crash of the server, or cancelled and retried. Its handler winds up first.
                self.lost(held)
                if job.id in self.held:
                    self._behind[job.id] = job
                    continue
            self.held[job.id] = job
            self.by_queue[job.queue] += 1
            if self.plain and job.type in self.plain:
                self.plain_held[job.type] += 1
            self._waiting.append(job)
        for _ in range(min(len(self._waiting), self._concurrency)):
            if self._idle:
                waiter = self._idle.pop()
                if not waiter.done():
                    waiter.set_result(None)
            elif len(self._runners) < self._concurrency:
                self._spawn()
            else:
                break

    def hand_back_waiting(self) -> None:
        """What hasn't begun goes back."""
        while self._behind:
            self._settle(HandedBack(self._behind.popitem()[1]))
        while self._waiting:
            self._end(HandedBack(self._waiting.popleft()))
        for runner in self._runners:
            if (job := runner.job) is not None and (self._batches.give_up(job) or self._gave_up_payload(job)):
                runner.job = None
                runner.scope.cancel()
                self._end(HandedBack(job))

    def _gave_up_payload(self, job: Job) -> bool:
        return self._large is not None and self._large.give_up(job)

    def hurry(self) -> None:
        """Nothing more will come for now: batches needn't wait for it."""
        self._batches.hurry()

    def hand_back_running(self) -> None:
        """Cancel every handler, and hand its job back."""
        for runner in self._runners:
            if runner.job is not None and runner.stop is None:
                runner.stop = HandedBack(runner.job)
                runner.scope.cancel()

    def lost(self, job: Job) -> bool:
        """The lease is gone: cancel the handler, settle nothing. False if it isn't held any more, or settles itself."""
        if self.held.get(job.id) is not job or self._states.get(job) in ("ending", "committed"):
            return False  # whoever is settling it by himself finds out, or is why it's gone
        if job in self._waiting:
            self._waiting.remove(job)
            self._drop(job)
            return True
        self._lost.add(job)
        for runner in self._runners:
            if runner.job is job:
                runner.scope.cancel()
        return True

    def take_reports(self) -> dict[Job, Progress]:
        """What handlers have told since the last time, the latest of each. The heartbeat's thread calls it: each step
        is atomic, so handlers may write meanwhile."""
        return dict(self.reports.popitem() for _ in range(len(self.reports)))

    def unwritten(self, job: Job, progress: Progress) -> None:
        """Once more, unless there is something newer, or nobody to be told of."""
        if self.held.get(job.id) is job:
            self.reports.setdefault(job, progress)

    def close(self) -> None:
        """Runners without a job end; call it when nothing is held."""
        self._closed = True
        self._closing.set()
        for waiter in self._idle:
            if not waiter.done():
                waiter.set_result(None)
        self._idle.clear()

    def whose(self, task: asyncio.Task[Any] | None) -> str | None:
        """`SEND_MAIL (id 5)` of the job that this asyncio task runs. Called from another thread."""
        for runner in list(self._runners):
            if runner.task is task and (job := runner.job) is not None:
                handler = self._handlers.get(job.type)
                return f"{handler.name if handler else job.type} (task {job.id})"
        return self._batches.whose(task)

    def _spawn(self) -> None:
        runner = Runner(self._begin, self.reports, self._results)
        self._runners.add(runner)
        self._start(runner, self._run, runner)

    def _start(self, run: Run, function: Callable[[T], Coroutine[Any, Any, None]], argument: T) -> None:
        """In an empty context, not in that of whoever fed the job."""
        assert self._group is not None
        context = contextvars.Context()
        context.run(current_run.set, run)
        context.run(self._group.start_soon, function, argument)

    async def _run(self, runner: Runner) -> None:
        runner.task = me = asyncio.current_task()
        assert me is not None
        clean = contextvars.copy_context()
        try:
            while not self._closed:
                if not self._waiting:
                    waiter = asyncio.get_running_loop().create_future()
                    self._idle.append(waiter)
                    try:
                        await waiter
                    finally:
                        if waiter in self._idle:
                            self._idle.remove(waiter)
                    continue
                runner.scope = anyio.CancelScope()
                with runner.scope:
                    await self._take(runner, clean)
                if runner.job is not None:  # cancelled from outside, in the middle of a handler
                    self._cut_short(runner)
                if me.cancelling() or contextvars.copy_context() != clean:
                    # Its successor starts without that. A cancellation that is still to come would end the group.
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError:
                        pass
                    break
        finally:
            self._runners.discard(runner)
        if self._waiting and not self._closed and len(self._runners) < self._concurrency:
            self._spawn()

    async def _take(self, runner: Runner, clean: contextvars.Context) -> None:
        """Jobs, one after the other, until there are none, or until the scope was cancelled."""
        assert runner.task is not None
        waiting, scope, cancelling = self._waiting, runner.scope, runner.task.cancelling
        now = time.monotonic()
        breath = now + FAIR_SECONDS
        while waiting:
            runner.job = job = waiting.popleft()
            runner.began = now
            result = await self._attempt(runner, job)
            if runner.stop is not None:
                # To be handed back, and it ended by itself: that counts only if it got to its end.
                if not (isinstance(result, Finished) and result.state == "done"):
                    result = runner.stop
                runner.stop = None
            runner.job = None
            if job in self._lost:  # the fence would refuse it, but not where we hold the same attempt once more
                self._drop(job)
            else:
                self._end(result)
            # A handler may have left something in its context variables, or have cancelled the asyncio task it ran in.
            if scope.cancel_called or cancelling() or contextvars.copy_context() != clean:
                return
            if (now := time.monotonic()) > breath:
                await asyncio.sleep(0)
                now = time.monotonic()
                breath = now + FAIR_SECONDS

    async def _attempt(self, runner: Runner, job: Job) -> Outcome:
        """Run one task: find its handler, decode, call, decide. Raises nothing but a cancellation of its scope."""
        handler = self._handlers.get(job.type)
        if handler is None:
            return Unhandled(job) if len(job.type) <= NAME_LENGTH else self._unnamed(job)
        payload = job.payload
        if payload is None:
            assert self._large is not None
            answer = await self._large.read(job)
            if answer is None:  # the lease is lost, and the fence refuses whatever is said
                return HandedBack(job)
            if isinstance(answer, str):
                return self._log(handler, outcome.undecodable(job, answer), runner.began)
            payload = answer
            del answer
        if len(payload) > PAYLOAD_LIMIT:
            return self._log(
                handler, outcome.undecodable(job, f"its payload is larger than {PAYLOAD_LIMIT:,} bytes"), runner.began
            )
        try:
            task = handler.decode(payload)
        except Exception as error:
            why = str(error) if isinstance(error, msgspec.MsgspecError) else describe(error)
            return self._log(handler, outcome.undecodable(job, why), runner.began)
        del payload  # a large one isn't held twice
        context = Context(
            id=job.id,
            queue=job.queue,
            attempt=job.attempt,
            max_attempts=outcome.attempts_allowed(job, handler),
            priority=job.priority,
            created_at=job.created_at,
        )
        if handler.batch is not None:
            return self._log(handler, await self._batches.join(handler, job, task, context), runner.began)
        try:
            if handler.timeout is None:
                value = await self._called(handler, task, context)
            else:
                value = None
                with anyio.CancelScope(deadline=anyio.current_time() + handler.timeout) as limit:
                    runner.limit = limit
                    try:
                        value = await self._called(handler, task, context)
                    finally:
                        runner.limit = None
                if limit.cancelled_caught:
                    return self._log(handler, outcome.timed_out(job, handler), runner.began)
        except BaseException as error:
            if is_ours(error):
                raise
            return self._log(handler, outcome.raised(job, handler, error), runner.began)
        if value is None and not self._states and not logger.isEnabledFor(logging.DEBUG):
            return Finished(job, "done")  # what comes of most, without two calls that find nothing to say
        return self._log(handler, outcome.returned(job, handler, value), runner.began)

    def _called(self, handler: Handler, task: Task, context: Context) -> Awaitable[object]:
        """Through the middleware, if there is any."""
        if handler.around is None:
            return self._call(handler, task, context)
        return awaited(handler.around(task, context, functools.partial(self._call, handler)))

    async def _call(self, handler: Handler, task: Any, context: Any) -> object:
        try:
            value = await (handler.call(task, context) if handler.is_async else self._in_thread(handler, task, context))
            # A wrapper of an `async def`: its coroutine is for the loop, whose connections it may use.
            if value is not None and is_awaitable(value):
                value = await awaited(value)
        except BaseException as error:
            if self._is_child:
                forked.leave(error)
            raise
        if self._is_child:
            forked.leave(None)
        return value

    def _forked(self) -> None:
        self._is_child = True

    async def _in_thread(self, handler: Handler, task: Any, context: Any) -> object:
        # A thread can't be cancelled, only left alone: its slot goes on, its outcome isn't waited for.
        call = _Call(handler, current_run.get())
        self._calls.add(call)
        try:
            value, error = await anyio.to_thread.run_sync(
                call, task, context, abandon_on_cancel=True, limiter=self._threads
            )
        except BaseException:
            call.left = True
            self._left.append(call)
            raise
        finally:
            self._calls.discard(call)
        if error is not None:
            raise error
        return value

    def _cut_short(self, runner: Runner) -> None:
        job, stop = runner.job, runner.stop
        runner.job = runner.stop = None
        assert job is not None
        if stop is None:
            self._drop(job)  # the lease is lost, so there is nothing to write
        else:
            self._end(stop)

    def _begin(self, context: Context, isolation: Isolation | None) -> Transaction:
        """ctx.transaction(), of what runs here."""
        if self._transactions is None:
            raise ConfigError(
                "ctx.transaction() needs a worker, which settles the task; in tests: notifyq.testing.drain"
            )
        job = self.held.get(context.id)
        if job is None or job.attempt != context.attempt:
            raise ConfigError(f"task {context.id} doesn't run here (any more), so there is nothing to settle for it")
        if job in self._lost:
            raise LeaseLost(f"task {job.id} isn't this run's any more")
        return self._transactions.begin(job, isolation, self._lost.add)

    def _end(self, result: Outcome) -> None:
        if not self._states or self._states.get(result.job) != "committed":
            self._settle(result)
        self._drop(result.job)

    def _drop(self, job: Job) -> None:
        del self.held[job.id]
        if self._lost:
            self._lost.discard(job)
        if self.reports:
            self.reports.pop(job, None)
        if self._states:
            self._states.pop(job, None)
        if job.size and self._large is not None:
            self._large.drop(job)
        self.by_queue[job.queue] -= 1
        if self.plain and job.type in self.plain:
            self.plain_held[job.type] -= 1
            self.plain_finished += 1
        self.finished += 1
        if self._behind and (again := self._behind.pop(job.id, None)) is not None:
            self.feed([again])
        self._sink.on_slot_released()

    def _settled_itself(self, handler: Handler, result: Outcome) -> Outcome:
        """Done, whatever came after its transaction; if that was anything, somebody may wonder where it is."""
        done = Finished(result.job, "done")
        if not isinstance(result, Finished) or (result.state, result.result, result.error) != ("done", None, None):
            error = getattr(result, "error", None)
            why = msgspec.json.decode(error)["error"].splitlines()[0][:300] if error else "it returned something"
            logger.warning(
                "what a handler returns or raises after its transaction doesn't count: the task is done",
                extra=_fields(result.job, handler, after=why),
            )
        return done

    def _unnamed(self, job: Job) -> Outcome:
        """Of a type that nobody can have a handler for: it would not fit the index of those set aside."""
        why = f"its type is longer than {NAME_LENGTH} characters"
        logger.error("task dead", extra={"fields": {"id": job.id, "type": job.type[:40] + "...", "error": why}})
        return outcome.undecodable(job, why)

    def _log(self, handler: Handler, result: Outcome, began: float) -> Outcome:
        job = result.job
        if self._states and self._states.get(job) == "committed":
            result = self._settled_itself(handler, result)
        if isinstance(result, Finished) and result.state == "done":
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("task done", extra=_fields(job, handler, seconds=_since(began)))
            return result
        entry: dict[str, Any] = {}
        if isinstance(result, Finished | RetryLater) and result.error:
            entry = msgspec.json.decode(result.error)
        why = entry.get("error") or ""
        extra = _fields(job, handler, error=why.splitlines()[0][:300] if why else "", seconds=_since(began))
        # The row keeps the traceback, where it is found by id.
        show = {"more": f"notifyq show {job.id}"}
        if logger.isEnabledFor(logging.DEBUG):
            extra["trace"] = entry.get("traceback")
        match result:
            case Finished(state="cancelled"):
                logger.info("task cancelled", extra=extra)
            case Finished():
                extra["fields"] |= show
                logger.error("task dead", extra=extra)
            case RetryLater(delay=delay):
                extra["fields"] |= {"again_in": round(delay, 3), **show}
                logger.warning("task failed, trying again", extra=extra)
            case HandedBack() | Unhandled():
                pass
        return result


class _Call:
    """A plain handler's run, in a thread. A Run of its own: its runner goes on without it when it is left alone."""

    __slots__ = ("begun", "handler", "left", "over", "runner")

    def __init__(self, handler: Handler, runner: Run | None) -> None:
        self.handler = handler
        self.runner = runner
        self.begun = False
        self.left = False
        self.over = False

    def begin(self, context: Context, isolation: Isolation | None) -> Transaction:
        if self.runner is None:
            raise ConfigError("ctx.transaction() is for handlers that a worker runs")
        return self.runner.begin(context, isolation)

    def is_cancelled(self, context: Context) -> bool:
        return self.left or (self.runner is not None and self.runner.is_cancelled(context))

    def report(self, context: Context, progress: Progress) -> None:
        if self.runner is not None and not self.left:
            self.runner.report(context, progress)

    def results(self, context: Context) -> Awaitable[list[Any]]:
        return self.runner.results(context) if self.runner is not None else _no_results(context.id)

    def __call__(self, task: Task, context: Context) -> tuple[object, BaseException | None]:
        """What it returns, or raises. A future that is given a GeneratorExit to raise would throw it into our
        coroutine, where it means something else: to close; and a StopIteration it doesn't take."""
        current_run.set(self)  # in the thread's copy of the context
        pid = forked.pid
        self.begun = True
        value, failure = None, None
        try:
            value = self.handler.call(task, context)
        except BaseException as error:
            failure = error
        if forked.pid != pid:
            forked.leave(failure)
        self.over = True
        return value, failure


async def _no_results(task: int) -> list[Any]:
    return []


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


def _fields(job: Job, handler: Handler, **more: object) -> dict[str, Any]:
    return {
        "fields": {
            "id": job.id,
            "type": job.type,
            "queue": job.queue,
            "attempt": job.attempt,
            "handler": handler.name,
        }
        | more
    }
