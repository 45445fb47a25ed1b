"""Run one task by itself: encoded as `enqueue` encodes it, then decoded and run as a worker does.

The task runs on a worker's runner (worker/runners.py), and a worker's code decides its outcome (worker/outcome.py). So
a timeout cancels the handler, a plain `def` runs in a thread, and the handler doesn't see the test's context variables.
There is no database, so what only PostgreSQL refuses isn't noticed: a NUL in a string, say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict, Unpack, assert_never, cast, overload

import anyio
import asyncpg
import msgspec

from notifyq.app import App
from notifyq.client.enqueue import validated_task
from notifyq.client.options import options_for
from notifyq.client.values import decode_by_handler
from notifyq.errors import ConfigError
from notifyq.lifespan import within
from notifyq.loops import awaited, is_awaitable
from notifyq.registry import Handler, Registry
from notifyq.task import Task, Verdict
from notifyq.worker.job import Job
from notifyq.worker.outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled
from notifyq.worker.runners import Runners
from notifyq.worker.services import Services


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a run, as a worker would write it.

    result  what the handler returned, decoded from JSON as the type that the handler is annotated to return
    reason  the error that the row gets, if the task is to be retried, dead or cancelled
    delay   seconds until the next attempt, if there is one
    """

    state: Literal["done", "retry", "dead", "cancelled"]
    result: Any = None
    reason: str | None = None
    delay: float | None = None


class RunOptions(TypedDict, total=False):
    """The options of `run_inline`. Those that aren't given are as for a first attempt that a worker claims now.

    attempt       the number of the attempt, from 1
    max_attempts  None: what the task's class says; so are queue and priority
    id            the id of the first task; the others have the ids after it
    created_at    None: now
    raises        True: an error of the handler is raised here, unless it is Retry, Cancel or Dead
    results       the return value of ctx.results()
    """

    attempt: int
    max_attempts: int | None
    queue: str | None
    priority: int | None
    id: int
    created_at: datetime | None
    raises: bool
    results: Sequence[Any]


@overload
async def run_inline(app: App, task: Task, **options: Unpack[RunOptions]) -> Ran: ...
@overload
async def run_inline(app: App, task: Sequence[Task], **options: Unpack[RunOptions]) -> list[Ran]: ...
async def run_inline(app: App, task: Task | Sequence[Task], **options: Unpack[RunOptions]) -> Ran | list[Ran]:
    """Run a task with its handler in this process, and return its outcome; for a list, the outcome of each task.

    All tasks of a list are of one type. A batch handler gets as many of them at once as its `batch` allows. A single
    task is a batch of one.

    options  attempt, max_attempts, queue, priority, id, created_at, raises, results: see RunOptions

    The task runs through the app's middleware, inside its lifespan. Raises ConfigError for an unknown option, a task
    that `enqueue` would refuse, or a task without a handler.
    """
    if unknown := options.keys() - RunOptions.__annotations__.keys():
        known = ", ".join(RunOptions.__annotations__)
        raise ConfigError(f"run_inline has no option {min(unknown)!r}; it has {known}")
    jobs = _claimed(app, task, options)
    type = jobs[0].type
    handler = app.registry.get(type)
    assert handler is not None
    raised: list[BaseException] = []
    outcomes: list[Outcome] = []

    async def run(given: Sequence[object] | None) -> None:
        bound = app.registry.bound(given).get(type)
        assert bound is not None
        many = bound.batch or len(jobs)
        for first in range(0, len(jobs), many):
            outcomes.extend(await _run(_Only(bound, raised), jobs[first : first + many], options.get("results", ())))

    await within(app.registry.lifespan, run)
    if options.get("raises") and raised and not isinstance(raised[0], Verdict):
        raise raised[0]
    ran = [_ran(handler, outcome) for outcome in outcomes]
    return ran[0] if isinstance(task, Task) else ran


def _claimed(app: App, task: Task | Sequence[Task], options: RunOptions) -> list[Job]:
    """The tasks as a worker would have claimed them, with these options."""
    tasks = [task] if isinstance(task, Task) else task
    if not isinstance(tasks, list | tuple) or not tasks:
        tasks = [cast("Task", task)]  # not a task: `validated_task` raises
    rows = [validated_task(app.registry, one) for one in tasks]
    type = rows[0][0]
    if others := {name for name, _ in rows} - {type}:
        raise ConfigError(f"run_inline got tasks of types {type} and {', '.join(sorted(others))}; expected one type")
    columns = options_for(options.get("queue"), options.get("priority")).for_task(tasks[0]).columns
    attempt, max_attempts = options.get("attempt", 1), options.get("max_attempts")
    at = options.get("created_at") or datetime.now(UTC)
    jobs: list[Job] = []
    for id, (_, text) in enumerate(rows, options.get("id", 1)):
        payload = text.encode()
        app.registry.check(type, payload)
        row = (id, attempt, type, columns.queue, columns.priority, max_attempts, at, payload, False, 0)
        jobs.append(Job(0, cast("asyncpg.Record", row)))
    return jobs


def _ran(handler: Handler, outcome: Outcome) -> Ran:
    match outcome:
        case Finished():
            result = None if outcome.result is None else decode_by_handler(handler, outcome.result)
            return Ran(state=outcome.state, result=result, reason=_reason(outcome.error))
        case RetryLater():
            return Ran(state="retry", reason=_reason(outcome.error), delay=outcome.delay)
        case HandedBack() | Unhandled():
            raise AssertionError("handed back, though nothing stopped the run")
        case _:
            assert_never(outcome)


class _Only(Registry):
    """A registry of one handler. The handler's errors go into `raised`, since an outcome has only their text."""

    def __init__(self, handler: Handler, raised: list[BaseException]) -> None:
        super().__init__()
        recorded = copy.copy(handler)
        recorded.function = _record_errors(handler, raised)
        self._handlers[handler.type] = recorded


def _record_errors(handler: Handler, raised: list[BaseException]) -> Callable[..., Any]:
    function = handler.function

    async def run_async(*args: Any) -> Any:
        return await record(function(*args))

    def run_plain(*args: Any) -> Any:
        try:
            value = function(*args)
        except BaseException as error:
            raised.append(error)
            raise
        return record(value) if is_awaitable(value) else value

    async def record(value: object) -> object:
        try:
            return await awaited(value)
        except BaseException as error:
            raised.append(error)
            raise

    return run_async if handler.is_async else run_plain


class _Sink:
    """Takes the outcomes in place of a worker."""

    def __init__(self, expected: int) -> None:
        self.outcomes: dict[Job, Outcome] = {}
        self.full = anyio.Event()
        self._expected = expected

    def settle(self, outcome: Outcome) -> None:
        self.outcomes[outcome.job] = outcome
        if len(self.outcomes) == self._expected:
            self.full.set()

    def on_slot_released(self) -> None: ...


class _Given:
    """The results of predecessors that the test made up."""

    def __init__(self, results: Sequence[Any]) -> None:
        self._results = results

    async def results(self, task: int) -> list[Any]:
        return list(self._results)

    def close(self) -> None: ...


async def _run(registry: Registry, jobs: Sequence[Job], results: Sequence[Any]) -> list[Outcome]:
    sink = _Sink(len(jobs))
    services = Services(predecessors=_Given(results))
    # As many runners as jobs: a batch knows that no more will come.
    runners = Runners(registry, len(jobs), len(jobs), sink, services)
    async with anyio.create_task_group() as group:
        group.start_soon(runners.run)
        await runners.ready.wait()
        runners.add_jobs(jobs)
        await sink.full.wait()
        runners.close()
    return [sink.outcomes[job] for job in jobs]


def _reason(error: bytes | None) -> str | None:
    return None if error is None else msgspec.json.decode(error)["error"]
