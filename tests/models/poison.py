"""Tasks whose worker vanished: a culprit kills each worker that runs it, and those beside it are innocent.

The rules are schema.sql's, under "Tasks whose worker vanished"; the statements are rescue.sql, list_crashed.sql and
claim_by_id.sql.

What is merged or left out, and why that hides nothing:

* A worker that vanishes is rescued, and another started in its place, in the same step: lease.py has what may come in
  between. A claim takes one task; to claim many is to make many such steps.
* A group is two of those that have crashed twice, then one. The code has 16 and 4: larger ones crash no more often.
* Crashes beside others are counted up to the first number that makes a group of one. Beyond it nothing changes.
* `kills` of workers from outside, which nothing can tell from a culprit's: as many as leave an innocent below three.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import IntEnum
from typing import NamedTuple

from .explore import Comes, Promise, Step

CULPRIT = 0
ALONE_MOST = 3
AT_ONCE = {2: 2}
CRASHES_MOST = 4


class Place(IntEnum):
    __hash__ = int.__hash__  # an Enum's own is slow

    READY = 0
    PARKED = 1
    RUNNING = 2
    DONE = 3
    DEAD = 4


class Task(NamedTuple):
    place: Place = Place.READY
    worker: int = -1
    crashes: int = 0
    alone: int = 0


class State(NamedTuple):
    tasks: tuple[Task, ...]
    kills: int


WRONG = {
    "charged": "a crash counts against each task that the worker held",
    "free": "a crash doesn't count either against the one task that the worker held",
}


class Poison:
    def __init__(self, innocents: int, workers: int, kills: int = 0, wrong: str = "") -> None:
        self._workers = workers
        self._wrong = wrong
        self.start = State((Task(),) * (innocents + 1), kills)
        self.promises: list[Promise[State]] = [
            Promise("the culprit is never found, or an innocent never ends", Comes.SOON, self._ends)
        ]

    def _ends(self, state: State) -> bool:
        culprit, *innocents = state.tasks
        return culprit.place is Place.DEAD and all(task.place is Place.DONE for task in innocents)

    def wrong(self, state: State) -> str | None:
        return "an innocent is dead" if any(t.place is Place.DEAD for t in state.tasks[CULPRIT + 1 :]) else None

    def same(self, state: State) -> Hashable:
        return (state.tasks[CULPRIT], tuple(sorted(state.tasks[CULPRIT + 1 :])), state.kills)

    def steps(self, state: State) -> Iterator[Step[State]]:
        held = [[n for n, task in enumerate(state.tasks) if task.worker == w] for w in range(self._workers)]
        for n, task in enumerate(state.tasks):
            if task.place is Place.READY:
                for w in range(self._workers):
                    yield Step(f"worker {w + 1} claims task {n}", _run(state, [n], w), Comes.NOW)
            elif task.place is Place.RUNNING and n != CULPRIT:
                yield Step(f"task {n} is done", _put(state, n, Task(Place.DONE)), Comes.NOW)
        parked = [n for n, task in enumerate(state.tasks) if task.place is Place.PARKED]
        for w in range(self._workers):
            if CULPRIT in held[w]:
                yield Step(f"the culprit kills worker {w + 1}", self._rescued(state, held[w]), Comes.NOW)
            if state.kills and held[w]:
                killed = self._rescued(state, held[w])._replace(kills=state.kills - 1)
                yield Step(f"worker {w + 1} is killed from outside", killed, Comes.MAYBE)
            if parked:
                least = min(state.tasks[n].crashes + state.tasks[n].alone for n in parked)
                group = [n for n in parked if state.tasks[n].crashes + state.tasks[n].alone == least]
                text = f"worker {w + 1} runs what has crashed {least} times"
                if not held[w]:
                    yield Step(f"{text}, isolated", _run(state, group[: AT_ONCE.get(least, 1)], w), Comes.NOW)
                else:
                    yield Step(f"{text}, beside others: it was never empty", _run(state, group[:1], w), Comes.MAYBE)

    def _rescued(self, state: State, held: list[int]) -> State:
        for n in held:
            task = state.tasks[n]
            alone = (len(held) == 1 and self._wrong != "free") or self._wrong == "charged"
            if alone and task.alone + 1 == ALONE_MOST:
                after = Task(Place.DEAD)
            else:
                place = Place.PARKED if task.crashes + task.alone else Place.READY
                crashes = task.crashes if alone else min(task.crashes + 1, CRASHES_MOST)
                after = Task(place, -1, crashes, task.alone + alone)
            state = _put(state, n, after)
        return state


def _put(state: State, n: int, task: Task) -> State:
    return state._replace(tasks=(*state.tasks[:n], task, *state.tasks[n + 1 :]))


def _run(state: State, numbers: list[int], worker: int) -> State:
    for n in numbers:
        state = _put(state, n, state.tasks[n]._replace(place=Place.RUNNING, worker=worker))
    return state
