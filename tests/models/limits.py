"""Limits: a few tasks with keys that have limits, and workers that claim them, a step for each statement.

A task is admitted by its keys in their order, and is parked at the first that is full. A lock on a key is held from one
step of a transaction to its last. Counting, granting and the commit are steps of their own, so that all that needs no
key lock (an end, a kill, a rescue, a cancellation) comes in between. A backend goes on when its worker is gone.

What is merged or left out, and why that hides nothing:

* Priorities and attempts: the order of tasks says which one is granted a slot first, and the fence is the lease model's
  matter.
* An order key is a limit of one whose slots are granted by id. A rate releases its slots by time, which is a grant
  ahead.
* Two keys with the same row of key_lock wait for each other more often than these do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import IntEnum
from typing import NamedTuple

from .explore import Comes, Promise, Step

NOW, SOON, MAYBE = Comes.NOW, Comes.SOON, Comes.MAYBE
NOBODY, NOWHERE = -1, -1


class At(IntEnum):
    __hash__ = int.__hash__

    READY = 0
    CLAIMED = 1  # and not admitted yet
    RUNS = 2
    PARKED = 3
    LATER = 4  # it failed, and is scheduled
    OVER = 5


class Task(NamedTuple):
    at: At = At.READY
    worker: int = NOBODY
    key: int = NOWHERE  # it is parked at, or granted a slot of
    stuck: bool = False  # no worker claims it any more: its queue was paused


class Worker(NamedTuple):
    alive: bool = True
    does: str = ""  # the transaction of the connection that claims: "admit", "release_waiters"
    tasks: tuple[int, ...] = ()  # that it is about
    released: tuple[int, ...] = ()  # rows of slot_released that it has taken
    verdict: tuple[tuple[int, int], ...] | None = None  # admit's, of each task: the key it is parked at, or NOWHERE
    grants: tuple[int, ...] | None = None  # tasks that it makes ready; None: it hasn't looked yet


class State(NamedTuple):
    workers: tuple[Worker, ...]
    tasks: tuple[Task, ...]
    released: tuple[int, ...] = ()  # tasks whose end or loss has a row of slot_released, taken or not
    kills: int = 0  # left
    others: int = 0  # cancellations and hand-backs


WRONG = {
    "no lock": "no key is locked",
    "early count": "running tasks are counted in a snapshot from before the key was locked",
    "early look": "release_waiters looks for waiting tasks before it locks the key",
    "no refill": "admit doesn't grant the slots of the keys of the tasks that it parks",
    "silent loss": "an attempt that is lost, or will be repeated, leaves no row in notifyq.slot_released",
    "no net": "a key isn't filled again for a granted task that no worker claims",
}


class Limits:
    """`keys` of each task, in the order of its admission, and the `limits` of the keys. `paused`: a task may become
    stuck, and handlers go on for ever, so that only recheck_waiting has the slot that it was granted granted anew."""

    def __init__(
        self,
        workers: int,
        keys: tuple[tuple[int, ...], ...],
        limits: tuple[int, ...],
        kills: int = 0,
        others: int = 0,
        paused: bool = False,
        wrong: str = "",
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._paused = paused
        self._wrong = wrong
        self.start = State((Worker(),) * workers, (Task(),) * len(keys), kills=kills, others=others)
        used = "a task stays parked, though its key has a slot that is neither used nor granted"
        self.promises = [Promise(used, SOON if paused else NOW, self._used)]
        if not paused:
            self.promises.append(Promise("a task never ends, though a worker is up", SOON, self._ends))

    def _used(self, state: State) -> bool:
        waiting = {task.key for task in state.tasks if task.at is At.PARKED}
        dead = {w for w, worker in enumerate(state.workers) if not worker.alive}
        return (
            all(self._free(state, key) <= 0 for key in waiting)
            or any(task.worker in dead for task in state.tasks)  # its rescue writes a row
            or len(dead) == len(state.workers)
        )

    def _ends(self, state: State) -> bool:
        over = all(task.at is At.OVER for task in state.tasks)
        return over or not any(worker.alive for worker in state.workers)

    def wrong(self, state: State) -> str | None:
        for key, limit in enumerate(self._limits):
            if self._holders(state, key) > limit:
                return f"more tasks of a key run at once than its limit of {limit}"
        return None

    def same(self, state: State) -> Hashable:
        return state

    # What statements see.

    def _holders(self, state: State, key: int) -> int:
        return sum(task.at is At.RUNS for task, keys in zip(state.tasks, self._keys, strict=True) if key in keys)

    def _granted(self, state: State, key: int, but: tuple[int, ...] = ()) -> int:
        return sum(
            task.at in {At.READY, At.CLAIMED} and task.key == key for n, task in enumerate(state.tasks) if n not in but
        )

    def _free(self, state: State, key: int) -> int:
        return self._limits[key] - self._holders(state, key) - self._granted(state, key)

    def _admit(self, state: State, mine: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """The key that each task is parked at; NOWHERE: it runs."""
        verdict = dict.fromkeys(mine, NOWHERE)
        for key, limit in enumerate(self._limits):
            held = self._holders(state, key)
            kept, place = self._granted(state, key, mine), 0
            queue = any(task.at is At.PARKED and task.key == key for task in state.tasks)
            for n in mine:
                if key in self._keys[n] and verdict[n] == NOWHERE:
                    place += 1
                    granted = state.tasks[n].key == key
                    if (queue and not granted) or held + place + (0 if granted else kept) > limit:
                        verdict[n] = key
        return tuple(verdict.items())

    def _fill(self, state: State, key: int) -> list[int]:
        waiting = [n for n, task in enumerate(state.tasks) if task.at is At.PARKED and task.key == key]
        return waiting[: max(0, self._free(state, key))]

    def _keys_of(self, tasks: tuple[int, ...]) -> set[int]:
        return {key for n in tasks for key in self._keys[n]}

    # What happens.

    def steps(self, state: State) -> Iterator[Step[State]]:
        for w, worker in enumerate(state.workers):
            if worker.does:
                yield from self._goes_on(state, w, worker)
            elif worker.alive:
                yield from self._begins(state, w)
            if worker.alive and state.kills:
                gone = _worker(state, w, alive=False)._replace(kills=state.kills - 1)
                yield Step(f"worker {w + 1} is killed", gone, MAYBE)
        for n, task in enumerate(state.tasks):
            yield from self._about(state, n, task)
        if self._paused and any(task.key != NOWHERE for task in state.tasks) and self._wrong != "no net":
            waiting = [n for n, task in enumerate(state.tasks) if task.at is At.PARKED and n not in state.released]
            if waiting:
                yield Step("recheck_waiting", _release(state, waiting[0]), SOON)

    def _begins(self, state: State, w: int) -> Iterator[Step[State]]:
        mine = tuple(n for n, task in enumerate(state.tasks) if task.at is At.CLAIMED and task.worker == w)
        for n, task in enumerate(state.tasks):
            if task.at is At.READY and not task.stuck:
                claimed = _task(state, n, at=At.CLAIMED, worker=w)
                yield Step(f"worker {w + 1} claims task {n + 1}", claimed, NOW)
        early = self._wrong == "early count"  # and then it waits for the locks, and has them now
        if mine and (early or self._may_lock(state, self._keys_of(mine))):
            verdict = self._admit(state, mine) if early else None
            begun = _worker(state, w, does="admit", tasks=mine, verdict=verdict)
            yield Step(f"worker {w + 1}: admit locks the keys", begun, NOW)
        left = list(state.released)
        for taken in [n for other in state.workers for n in other.released]:
            left.remove(taken)
        early = self._wrong == "early look"
        if left and (early or self._may_lock(state, self._keys_of(tuple(left)))):
            grants = tuple(n for key in sorted(self._keys_of(tuple(left))) for n in self._fill(state, key))
            begun = _worker(
                state,
                w,
                does="release_waiters",
                tasks=tuple(left),
                released=tuple(left),
                grants=grants if early else None,
            )
            yield Step(f"worker {w + 1}: release_waiters locks the keys", begun, NOW)

    def _may_lock(self, state: State, keys: set[int]) -> bool:
        if self._wrong == "no lock":
            return True
        return not any(worker.does and self._keys_of(worker.tasks) & keys for worker in state.workers)

    def _goes_on(self, state: State, w: int, worker: Worker) -> Iterator[Step[State]]:
        name = f"worker {w + 1}: {worker.does}"
        yield Step(f"{name} is rolled back", self._over(state, w), MAYBE)
        if worker.does == "admit" and worker.verdict is None:
            yield Step(f"{name} counts", _worker(state, w, verdict=self._admit(state, worker.tasks)), NOW)
        elif worker.grants is None:
            written = self._written(state, worker)
            keys = set() if self._wrong == "no refill" and worker.does == "admit" else self._keys_of(worker.tasks)
            grants = tuple(n for key in sorted(keys) for n in self._fill(written, key))
            yield Step(f"{name} grants slots", _worker(state, w, grants=grants), NOW)
        else:
            after = self._written(self._over(state, w), worker)
            for n in worker.grants:
                if after.tasks[n].at is At.PARKED:
                    after = _task(after, n, at=At.READY)
            rows = list(after.released)
            for n in worker.released:
                rows.remove(n)
            yield Step(f"{name} commits", after._replace(released=tuple(rows)), NOW)

    def _over(self, state: State, w: int) -> State:
        return _worker(state, w, does="", tasks=(), released=(), verdict=None, grants=None)

    def _written(self, state: State, worker: Worker) -> State:
        """The state with its own writes, as it sees them itself."""
        for n, key in worker.verdict or ():
            if key == NOWHERE:
                state = _task(state, n, at=At.RUNS, key=NOWHERE)
            else:
                state = _task(state, n, at=At.PARKED, key=key, worker=NOBODY)
        return state

    def _about(self, state: State, n: int, task: Task) -> Iterator[Step[State]]:
        if any(worker.does == "admit" and n in worker.tasks for worker in state.workers):
            return  # it has locked the row
        if task.at is At.RUNS and state.workers[task.worker].alive:
            ended = _release(_task(state, n, at=At.OVER, worker=NOBODY), n)
            yield Step(f"task {n + 1} ends", ended, MAYBE if self._paused else SOON)
        lost = _task(state, n, at=At.READY, worker=NOBODY)
        if self._wrong != "silent loss":
            lost = _release(lost, n)
        if task.at in {At.CLAIMED, At.RUNS} and not state.workers[task.worker].alive:
            yield Step(f"task {n + 1} is rescued", lost, SOON)
        if state.others:
            left = state.others - 1
            if task.at is At.RUNS:
                yield Step(f"task {n + 1} is handed back", lost._replace(others=left), MAYBE)
                later = _task(lost, n, at=At.LATER)
                yield Step(f"task {n + 1} fails, and is scheduled", later._replace(others=left), MAYBE)
            if task.at is not At.OVER:
                gone = _release(_task(state, n, at=At.OVER, worker=NOBODY, key=NOWHERE), n)
                yield Step(f"task {n + 1} is cancelled", gone._replace(others=left), MAYBE)
        if task.at is At.LATER:
            yield Step(f"task {n + 1} is due", _task(state, n, at=At.READY), SOON)
        if task.at is At.READY and task.key != NOWHERE:
            stale = _task(state, n, key=NOWHERE)
            yield Step(f"task {n + 1} isn't claimed for 2 s", stale, SOON if task.stuck else MAYBE)
            if self._paused and not any(other.stuck for other in state.tasks):
                yield Step(f"task {n + 1}'s queue is paused", _task(state, n, stuck=True), MAYBE)


def _task(state: State, n: int, **changes: object) -> State:
    tasks = list(state.tasks)
    tasks[n] = tasks[n]._replace(**changes)  # type: ignore[arg-type]
    return state._replace(tasks=tuple(tasks))


def _worker(state: State, w: int, **changes: object) -> State:
    workers = list(state.workers)
    workers[w] = workers[w]._replace(**changes)  # type: ignore[arg-type]
    return state._replace(workers=tuple(workers))


def _release(state: State, n: int) -> State:
    return state._replace(released=tuple(sorted((*state.released, n))))
