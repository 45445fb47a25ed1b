"""Run one task by itself: encoded as `enqueue` does it, then decoded, run and judged as a worker does it.

The runner is a worker's (run.py), and so is what decides the outcome (outcome.py): a timeout cancels, a plain `def`
runs in a thread, and context variables of the test are not the handler's. Only a database is missing, and with it what
PostgreSQL itself may refuse: a NUL in a string.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, assert_never, cast, overload

import anyio
import asyncpg
import msgspec

from notifyq.app import App
from notifyq.client.enqueue import validated_task
from notifyq.client.options import options_for
from notifyq.client.results import typed
from notifyq.errors import ConfigError
from notifyq.lifespan import within
from notifyq.registry import Handler, Registry, awaited, is_awaitable
from notifyq.task import Task, Verdict
from notifyq.worker.job import Job
from notifyq.worker.outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled
from notifyq.worker.runners import Runners
from notifyq.worker.services import Services


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run: what a worker would write of it."""

    state: Literal["done", "retry", "dead", "cancelled"]
    result: Any = None  # what the handler returned, from JSON, as the type it is annotated with
    reason: str | None = None  # of a retry, dead or cancelled: the row's error
    delay: float | None = None  # of a retry: seconds until then


@overload
async def run_inline(
    app: App,
    task: Task,
    *,
    attempt: int = 1,
    max_attempts: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    id: int = 1,
    created_at: datetime | None = None,
    raises: bool = False,
    results: Sequence[Any] = (),
) -> Ran: ...
@overload
async def run_inline(
    app: App,
    task: Sequence[Task],
    *,
    attempt: int = 1,
    max_attempts: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    id: int = 1,
    created_at: datetime | None = None,
    raises: bool = False,
    results: Sequence[Any] = (),
) -> list[Ran]: ...
async def run_inline(
    app: App,
    task: Task | Sequence[Task],
    *,
    attempt: int = 1,
    max_attempts: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    id: int = 1,
    created_at: datetime | None = None,
    raises: bool = False,
    results: Sequence[Any] = (),
) -> Ran | list[Ran]:
    """Run `task` with its handler, here, and return what came of it; of a list of tasks of one type, of each.

    A batch handler runs once with all of the list, as far as its `batch` allows, or with the one task.

    raises  True: what the handler raises, but for Retry, Cancel and Dead, is raised here
    results what ctx.results() returns
    else    what the handler's Context says, of the first; the others have the ids after it. None: what its type
            says, of created_at now

    It runs through the app's middleware, inside of its lifespan. Raises ConfigError for a task that `enqueue` would
    refuse, or that no handler takes.
    """
    tasks = [task] if isinstance(task, Task) else task
    if not isinstance(tasks, list | tuple) or not tasks:
        tasks = [cast("Task", task)]  # which is none, and `validated_task` says so
    rows = [validated_task(app.registry, one) for one in tasks]
    type = rows[0][0]
    if others := {name for name, _ in rows} - {type}:
        raise ConfigError(f"run_inline got tasks of types {type} and {', '.join(sorted(others))}; expected one type")
    options = options_for(queue, priority).for_task(tasks[0])
    jobs: list[Job] = []
    for number, (_, payload) in enumerate(rows, id):
        app.registry.check(type, payload.encode())
        at = created_at or datetime.now(UTC)
        row = (
            number,
            attempt,
            type,
            options.columns.queue,
            options.columns.priority,
            max_attempts,
            at,
            payload.encode(),
            False,
            0,
        )
        jobs.append(Job(0, cast("asyncpg.Record", row)))
    handler = app.registry.get(type)
    assert handler is not None
    raised: list[BaseException] = []
    outcomes: list[Outcome] = []

    async def run(given: Sequence[object] | None) -> None:
        bound = app.registry.bound(given).get(type)
        assert bound is not None
        many = bound.batch or len(jobs)
        for first in range(0, len(jobs), many):
            outcomes.extend(await _run(_Only(bound, raised), jobs[first : first + many], results))

    await within(app.registry.lifespan, run)
    if raises and raised and not isinstance(raised[0], Verdict):
        raise raised[0]
    ran = [_ran(handler, outcome) for outcome in outcomes]
    return ran[0] if isinstance(task, Task) else ran


def _ran(handler: Handler, outcome: Outcome) -> Ran:
    match outcome:
        case Finished():
            result = None if outcome.result is None else typed(handler, outcome.result)
            return Ran(state=outcome.state, result=result, reason=_reason(outcome.error))
        case RetryLater():
            return Ran(state="retry", reason=_reason(outcome.error), delay=outcome.delay)
        case HandedBack() | Unhandled():
            raise AssertionError("handed back, though nobody stopped it")
        case _:
            assert_never(outcome)


class _Only(Registry):
    """This handler, and what it raises is noted: an outcome has only its text."""

    def __init__(self, handler: Handler, raised: list[BaseException]) -> None:
        super().__init__()
        watched = copy.copy(handler)
        watched.function = _noting(handler, raised)
        self._handlers[handler.type] = watched


def _noting(handler: Handler, raised: list[BaseException]) -> Callable[..., Any]:
    function = handler.function

    async def waits(*args: Any) -> Any:
        return await noted(function(*args))

    def blocks(*args: Any) -> Any:
        try:
            value = function(*args)
        except BaseException as error:
            raised.append(error)
            raise
        return noted(value) if is_awaitable(value) else value

    async def noted(value: object) -> object:
        try:
            return await awaited(value)
        except BaseException as error:
            raised.append(error)
            raise

    return waits if handler.is_async else blocks


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
