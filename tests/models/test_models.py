"""The protocols hold in every state that their models can reach, and what is wrong with each wrong variant is found.

The models are in tests/models, with their stories in the docstrings. `-rP` shows the counter-examples.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest

from notifyq.worker.capacity import Free
from notifyq.worker.decide import TABLE, next_action
from notifyq.worker.state import Position

from ..chaos.mutants import breed
from . import drawing
from .doorbell import OUT_OF_REACH, POSITION, Doorbell, from_state, to_state
from .explore import Comes, Promise, Step, explore
from .runs import RUNS, WRONG, Run

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def no_gc() -> Iterator[None]:
    """A model makes no cycles, and looking for them among all its states takes a sixth of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def page() -> list[str]:
    return (DOCS / "protocol.md").read_text(encoding="utf-8").splitlines()


def marks(run: Run) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] if run.long else [pytest.mark.slow] if run.slow else []


@pytest.mark.parametrize("run", [pytest.param(run, id=run.text, marks=marks(run)) for run in RUNS])
def test_it_holds_in_every_state(run: Run, page: list[str]) -> None:
    explored = explore(run.model())
    assert not explored.problem, str(explored)
    assert drawing.row(run, explored) in page


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_found(text: str, page: list[str]) -> None:
    explored = explore(WRONG[text]())
    print(f"{text}\n{explored}\n")
    assert explored.problem
    assert drawing.wrong_row(text, explored) in page


def test_the_picture_is_what_was_explored() -> None:
    assert (DOCS / "doorbell.svg").read_text(encoding="utf-8") == drawing.draw()


def test_the_positions_are_those_of_the_code() -> None:
    assert {*POSITION.values(), Position.AWAY} == {*Position}


def test_the_code_decides_in_every_state_that_the_model_reaches() -> None:
    """The model reaches all rows of the table but those that it names. In each state in which a row held, the code
    takes that row, and changes nothing."""
    model = Doorbell(2, (0, 0), 2)
    explore(model)
    assert set(model.decided) == {row.name for row in TABLE} - OUT_OF_REACH
    rows = {row.name: row for row in TABLE}
    for name, workers in model.decided.items():
        for worker in workers:
            state, free = to_state(worker), Free({"q": 2 - worker.held}, 2 - worker.held)
            taken = {now for now in (0.0, 1.01) if next_action(state, now, free) == rows[name].action(state, now)}
            assert taken, (name, worker)
            assert from_state(worker, state) == worker


def test_a_mistake_in_the_code_is_found(tmp_path: Path) -> None:
    """The model explores the code itself: it fails with a copy of the package that has a known mistake in it."""
    explore_it = "from tests.models import doorbell, explore; print(explore.explore(doorbell.Doorbell(2, (0,), 1)))"
    folder = breed("final claim", tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", explore_it],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("a committed task is never claimed, though a worker has a free slot")


class Countdown:
    """From 3 down to 0 by ones, or up to 9 by a step that may never come."""

    def __init__(self, bottom: int = 0, forbidden: int | None = None, by: Comes = Comes.SOON) -> None:
        self.start = 3
        self.promises = [Promise[int]("it ends", by, lambda n: n == 0)]
        self._bottom = bottom
        self._forbidden = forbidden

    def steps(self, state: int) -> Iterator[Step[int]]:
        if state > self._bottom:
            yield Step(f"{state} goes down", state - 1, Comes.SOON if state == 2 else Comes.NOW)
        if state < 9:
            yield Step(f"{state} goes up", state + 1, Comes.MAYBE)

    def wrong(self, state: int) -> str | None:
        return "forbidden" if state == self._forbidden else None

    def same(self, state: int) -> Hashable:
        return state


def test_the_explorer_sees_everything() -> None:
    explored = explore(Countdown())
    assert (explored.problem, explored.states, explored.steps) == ("", 10, 18)


def test_a_counter_example_is_the_shortest() -> None:
    assert explore(Countdown(forbidden=5)).trace == ["3 goes up", "4 goes up"]


def test_what_may_happen_keeps_no_promise() -> None:
    """At 1 it stops, and only the step up would be left. The message has the state where nothing moves, not the first
    one."""
    explored = explore(Countdown(bottom=1))
    assert (explored.problem, explored.trace) == ("it ends", ["3 goes down", "2 goes down"])
    assert explore(Countdown(by=Comes.NOW)).trace == ["3 goes down"]
