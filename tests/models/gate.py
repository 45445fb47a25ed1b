"""Admit, free and fill: a few tasks with keys that have limits, and workers that claim them, a step for each statement.

A task is judged by its keys in their order, and is parked at the first that is full. A gate is had from one step of a
transaction to its last; counting, filling and the commit are steps of their own, so that whatever needs no gate (an
end, a kill, a rescue, a cancellation) comes in between. A worker's backend goes on when its worker is gone.

What is merged or left out, and why that hides nothing:

* Priorities and attempts: who is granted a slot first is up to the order of tasks, and the fence is lease.py's matter.
* Order is a limit of one whose slots are granted by id; rates free their slots by time, which is a grant ahead.
* Two keys with the same gate row wait for each other more often than these do.
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
    CLAIMED = 1  # and not judged
    RUNS = 2
    PARKED = 3
    LATER = 4  # it failed, and is scheduled
    OVER = 5


class Task(NamedTuple):
    at: At = At.READY
    worker: int = NOBODY
    key: int = NOWHERE  # it is parked at, or granted a slot of
    stuck: bool = False  # nobody claims it any more: its queue was paused


class Worker(NamedTuple):
    alive: bool = True
    does: str = ""  # the transaction of its connection for claims: "admit", "free"
    tasks: tuple[int, ...] = ()  # that it is about
    freed: tuple[int, ...] = ()  # rows that it has taken
    verdict: tuple[tuple[int, int], ...] | None = None  # admit's, of each task: the key it is parked at, or NOWHERE
    grants: tuple[int, ...] | None = None  # whom it lets in; None: it hasn't looked yet


class State(NamedTuple):
    workers: tuple[Worker, ...]
    tasks: tuple[Task, ...]
    freed: tuple[int, ...] = ()  # whose end or loss has a row, taken or not
    kills: int = 0  # left
    others: int = 0  # cancellations and hand-backs


WRONG = {
    "no gate": "no gate is locked",
    "early count": "who runs is counted in a snapshot of before the gate was had",
    "early look": "free looks who waits before it has the gate",
    "no refill": "admit doesn't fill the keys of those it parks",
    "silent loss": "an attempt that is lost, or to be made again, leaves no row in notifyq.slot_released",
    "no net": "no key is filled again for a grant that nobody claims",
}


class Gate:
    """`keys` of each task, in the order it is judged by, and the `limits` of the keys. `paused`: a task may become
    stuck, and handlers go on for ever, so that nothing but the net frees what was granted to it."""

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
        used = "a task is parked, and stays so, though its key has a slot that nobody has or is granted"
        self.promises = [Promise(used, SOON if paused else NOW, self._used)]
        if not paused:
            self.promises.append(Promise("a task never ends, though a worker is up", SOON, self._ends))

    def _used(self, state: State) -> bool:
        waiting = {task.key for task in state.tasks if task.at is At.PARKED}
        dead = {w for w, worker in enumerate(state.workers) if not worker.alive}
        return (
            all(self._room(state, key) <= 0 for key in waiting)
            or any(task.worker in dead for task in state.tasks)  # the rescue will tell
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

    def _room(self, state: State, key: int) -> int:
        return self._limits[key] - self._holders(state, key) - self._granted(state, key)

    def _judge(self, state: State, mine: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Where each is parked; NOWHERE: it runs."""
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
        return waiting[: max(0, self._room(state, key))]

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
            waiting = [n for n, task in enumerate(state.tasks) if task.at is At.PARKED and n not in state.freed]
            if waiting:
                yield Step("stir", _freed(state, waiting[0]), SOON)

    def _begins(self, state: State, w: int) -> Iterator[Step[State]]:
        mine = tuple(n for n, task in enumerate(state.tasks) if task.at is At.CLAIMED and task.worker == w)
        for n, task in enumerate(state.tasks):
            if task.at is At.READY and not task.stuck:
                claimed = _task(state, n, at=At.CLAIMED, worker=w)
                yield Step(f"worker {w + 1} claims task {n + 1}", claimed, NOW)
        early = self._wrong == "early count"  # and whoever has waited for the gate has it now
        if mine and (early or self._may_lock(state, self._keys_of(mine))):
            verdict = self._judge(state, mine) if early else None
            begun = _worker(state, w, does="admit", tasks=mine, verdict=verdict)
            yield Step(f"worker {w + 1}: admit has the gates", begun, NOW)
        left = list(state.freed)
        for taken in [n for other in state.workers for n in other.freed]:
            left.remove(taken)
        early = self._wrong == "early look"
        if left and (early or self._may_lock(state, self._keys_of(tuple(left)))):
            grants = tuple(n for key in sorted(self._keys_of(tuple(left))) for n in self._fill(state, key))
            begun = _worker(
                state, w, does="free", tasks=tuple(left), freed=tuple(left), grants=grants if early else None
            )
            yield Step(f"worker {w + 1}: free has the gates", begun, NOW)

    def _may_lock(self, state: State, keys: set[int]) -> bool:
        if self._wrong == "no gate":
            return True
        return not any(worker.does and self._keys_of(worker.tasks) & keys for worker in state.workers)

    def _goes_on(self, state: State, w: int, worker: Worker) -> Iterator[Step[State]]:
        name = f"worker {w + 1}: {worker.does}"
        yield Step(f"{name} is rolled back", self._over(state, w), MAYBE)
        if worker.does == "admit" and worker.verdict is None:
            yield Step(f"{name} counts", _worker(state, w, verdict=self._judge(state, worker.tasks)), NOW)
        elif worker.grants is None:
            written = self._written(state, worker)
            keys = set() if self._wrong == "no refill" and worker.does == "admit" else self._keys_of(worker.tasks)
            grants = tuple(n for key in sorted(keys) for n in self._fill(written, key))
            yield Step(f"{name} fills", _worker(state, w, grants=grants), NOW)
        else:
            after = self._written(self._over(state, w), worker)
            for n in worker.grants:
                if after.tasks[n].at is At.PARKED:
                    after = _task(after, n, at=At.READY)
            rows = list(after.freed)
            for n in worker.freed:
                rows.remove(n)
            yield Step(f"{name} commits", after._replace(freed=tuple(rows)), NOW)

    def _over(self, state: State, w: int) -> State:
        return _worker(state, w, does="", tasks=(), freed=(), verdict=None, grants=None)

    def _written(self, state: State, worker: Worker) -> State:
        """What it sees itself of what it has written."""
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
            ended = _freed(_task(state, n, at=At.OVER, worker=NOBODY), n)
            yield Step(f"task {n + 1} ends", ended, MAYBE if self._paused else SOON)
        lost = _task(state, n, at=At.READY, worker=NOBODY)
        if self._wrong != "silent loss":
            lost = _freed(lost, n)
        if task.at in {At.CLAIMED, At.RUNS} and not state.workers[task.worker].alive:
            yield Step(f"task {n + 1} is rescued", lost, SOON)
        if state.others:
            left = state.others - 1
            if task.at is At.RUNS:
                yield Step(f"task {n + 1} is handed back", lost._replace(others=left), MAYBE)
                later = _task(lost, n, at=At.LATER)
                yield Step(f"task {n + 1} fails, and is scheduled", later._replace(others=left), MAYBE)
            if task.at is not At.OVER:
                gone = _freed(_task(state, n, at=At.OVER, worker=NOBODY, key=NOWHERE), n)
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


def _freed(state: State, n: int) -> State:
    return state._replace(freed=tuple(sorted((*state.freed, n))))
