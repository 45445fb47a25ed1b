"""An explicit-state explorer: every state that a model can reach, breadth first, so counter-examples are the shortest.

A model says where it starts, what can happen next, what must never be, and what must come about. The last needs care:
no single state shows that a task will be claimed. So each step says how soon it comes if nothing else happens. A
promise is kept if from *every* state reached, the steps that come by themselves can lead to a state where it is kept.
A step that may as well not be taken (a commit, a kill, a wait of seconds that runs out) doesn't count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Comes(IntEnum):
    """When a step is taken."""

    NOW = 0  # as fast as the machine goes
    SOON = 1  # a timer of milliseconds
    MAYBE = 2  # an outside decision, or a timer of seconds, which no task should have to wait for


class Step(NamedTuple, Generic[S]):
    label: str
    state: S
    comes: Comes


class Promise(NamedTuple, Generic[S]):
    """Wherever things stand, steps that come no later than `by` can lead to a state where `kept` holds."""

    text: str
    by: Comes
    kept: Callable[[S], bool]


class Model(Protocol[S]):
    start: S
    promises: list[Promise[S]]

    def steps(self, state: S) -> Iterable[Step[S]]: ...

    def wrong(self, state: S) -> str | None:
        """What is wrong with a state, in words; None if nothing is."""

    def same(self, state: S) -> Hashable:
        """A value that is equal for states that differ only in the numbers of workers, tasks and so on."""


@dataclass
class Explored(Generic[S]):
    states: int = 0
    steps: int = 0
    seconds: float = 0.0
    problem: str = ""  # the first found; empty: none
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = "".join(f"\n  {n:2}. {label}" for n, label in enumerate(self.trace, 1))
        return f"{self.problem}{lines}" if self.problem else f"{self.states:,} states, {self.steps:,} steps"


def explore(model: Model[S], seen: Callable[[S, Step[S]], None] | None = None) -> Explored[S]:
    """All of `model`, or until something is wrong. `seen` is called with each step and where it started."""
    began = time.perf_counter()
    numbers = {model.same(model.start): 0}
    states = [model.start]  # by number: one for all that are the same, so that a trace keeps its names
    came: list[tuple[int, str]] = [(0, "")]
    back: list[list[tuple[int, Comes]]] = [[]]
    found: Explored[S] = Explored()

    def stop(number: int, problem: str) -> Explored[S]:
        found.problem = problem
        while number:
            number, label = came[number]
            found.trace.insert(0, label)
        return finished()

    def finished() -> Explored[S]:
        found.states, found.seconds = len(states), time.perf_counter() - began
        return found

    todo = deque([0])
    while todo:
        here = todo.popleft()
        if problem := model.wrong(states[here]):
            return stop(here, problem)
        for step in model.steps(states[here]):
            key = model.same(step.state)
            there = numbers.setdefault(key, len(states))
            if there == here:
                continue
            found.steps += 1
            if seen is not None:
                seen(states[here], step)
            if there == len(states):
                states.append(step.state)
                came.append((here, step.label))
                back.append([])
                todo.append(there)
            if step.comes is not Comes.MAYBE:
                back[there].append((here, step.comes))
    for promise in model.promises:
        can = bytearray(promise.kept(state) for state in states)
        todo.extend(number for number, kept in enumerate(can) if kept)
        while todo:
            for before, comes in back[todo.popleft()]:
                if comes <= promise.by and not can[before]:
                    can[before] = True
                    todo.append(before)
        if not all(can):
            # Of all the states it can't be kept in, the nearest where nothing moves any more; if all move, the nearest.
            moves = {before for befores in back for before, comes in befores if comes <= promise.by}
            broken = [number for number, kept in enumerate(can) if not kept]
            return stop(next((number for number in broken if number not in moves), broken[0]), promise.text)
    return finished()
