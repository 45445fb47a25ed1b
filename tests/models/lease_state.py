"""The states of the lease's model: the task's row, its jobs, and the worker processes."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

REGISTRATIONS = 2


class Task(IntEnum):
    __hash__ = int.__hash__  # an Enum's own is slow

    READY = 0
    SCHEDULED = 1
    RUNNING = 2
    DONE = 3
    DEAD = 4
    CANCELLED = 5


class Life(IntEnum):
    __hash__ = int.__hash__

    UP = 0
    STOPPING = 1
    FROZEN = 2
    OVER = 3


class Says(IntEnum):
    """An outcome."""

    __hash__ = int.__hash__

    FINISH = 0
    LATER = 1
    HAND_BACK = 2


class Job(NamedTuple):
    id: int  # of the worker that claimed it: which registration of its process
    attempt: int
    current: bool = True  # the claim that it comes from is the last one of the task
    lost: bool = False  # the handler was cancelled, as the lease is gone
    says: Says = Says.FINISH  # once it is an outcome


class Worker(NamedTuple):
    """A process, and what the database holds of it."""

    life: Life = Life.UP
    id: int = 1
    registered: bool = True  # notifyq.worker has a row for this id
    locked: bool = True  # its heartbeat's session is there, and shares the advisory lock
    silent: int = 0  # without a heartbeat: 1: over 2 s; 2: over its lease
    owns: int = 0  # the id that the task's row names, if it is one of this process; 0: it isn't
    sent: int = 0  # claim.sql runs for this id; negative: its client is gone; 0: none runs
    connected: bool = True  # its connection for claims, whose session shares the lock
    answer: Job | None = None  # of claim.sql, on its way
    held: Job | None = None
    behind: Job | None = None  # claimed again, while the handler of `held` winds up
    outcomes: tuple[Job, ...] = ()


class State(NamedTuple):
    workers: tuple[Worker, ...]
    task: Task = Task.READY
    attempts: int = 0
    relaxed: bool = False  # the last thing that was done to the row is a claim, not flushed yet
    faults: int = 0  # that may still come
    cancels: int = 0
    reclaimed: int = 0  # times that the task was taken back as unowned: that attempt counts, whether it ran or not
    bad: str = ""


def put(state: State, n: int, **fields: object) -> State:
    worker = state.workers[n]._replace(**fields)  # type: ignore[arg-type]
    return state._replace(workers=(*state.workers[:n], worker, *state.workers[n + 1 :]))


def killed(state: State, n: int) -> State:
    """Only its row is left, and the statement that its backend still runs."""
    was = state.workers[n]
    left = Worker(Life.OVER, was.id, was.registered, False, was.silent, was.owns, -abs(was.sent), False)
    return put(state, n, **left._asdict())


def outdated(worker: Worker) -> Worker:
    def old(job: Job | None) -> Job | None:
        return job._replace(current=False) if job else None

    answer, held, behind = old(worker.answer), old(worker.held), old(worker.behind)
    outcomes = tuple(job._replace(current=False) for job in worker.outcomes)
    return worker._replace(answer=answer, held=held, behind=behind, outcomes=outcomes)


def renamed(worker: Worker, attempt: int) -> Worker:
    """A job of it with the same id and attempt as the new claim is of the current lease again."""

    def again(job: Job | None) -> Job | None:
        return job and job._replace(current=job.current or (job.id, job.attempt) == (abs(worker.sent), attempt))

    outcomes = tuple(job for job in map(again, worker.outcomes) if job)
    return worker._replace(held=again(worker.held), behind=again(worker.behind), outcomes=outcomes)


def sort_key(worker: Worker) -> tuple[object, ...]:
    return tuple(field or () if field is None or isinstance(field, tuple) else field for field in worker)
