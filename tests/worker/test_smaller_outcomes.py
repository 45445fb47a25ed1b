"""What is written instead of an outcome that PostgreSQL refuses: smaller forms, later tries."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

import notifyq
from notifyq.worker import unwritten
from notifyq.worker.job import Job
from notifyq.worker.outcome import HandedBack, RetryLater, returned, smaller

from ..helpers.running import working
from ..helpers.waiting import eventually
from .test_refusals import insert, states

pytestmark = pytest.mark.slow


def job(size: int = 0) -> Job:
    made = Job(1, (7, 2, "T", "default", 0, None, None, b"{}", False, None))  # type: ignore[arg-type]
    made.size = size
    return made


def test_every_outcome_gets_smaller_and_ends() -> None:
    """It gets smaller at each step, until there is no smaller form."""
    for first, kinds in (
        (returned(job(), None, {"a": 1}), ["dead", "dead"]),  # type: ignore[arg-type]
        (RetryLater(job(), 5.0, '{"attempt":2,"error":"e\U0001f40d\\nmore"}'.encode()), [5.0, "dead"]),
        (HandedBack(job()), []),
    ):
        forms = []
        step = 1
        while (form := smaller(first, step, "why")) is not None:
            forms.append(form)
            step += 1
        assert [getattr(form, "state", None) or form.delay for form in forms] == kinds  # type: ignore[union-attr]
        for form in forms:
            said = json.loads(form.error or b"{}")["error"]  # type: ignore[union-attr]
            assert said.endswith(
                "PostgreSQL can't store its outcome: why" + (")" if isinstance(first, RetryLater) else "")
            )
            assert "more" not in said
            assert said.isascii(), "every database's encoding has it"


def test_the_pauses_of_postponed_outcomes() -> None:
    """Each is twice as long as the one before, up to a longest one; there is a pause before the second try too."""
    before = time.monotonic()
    one = unwritten.Postponed(HandedBack(job()))
    pauses = []
    for _ in range(12):
        assert before + one.pause.seconds <= one.due <= time.monotonic() + one.pause.seconds
        pauses.append(one.pause.seconds)
        before = time.monotonic()
        one.wait_longer()
    assert pauses[:9] == [2.0**n for n in range(9)]
    assert pauses[9:] == [unwritten.PAUSE_MOST] * 3


async def test_a_result_that_is_too_large(db: Any, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is dead with a clear message; a result that fits is kept."""
    monkeypatch.setattr("notifyq.worker.outcome.RESULT_LIMIT", 1000)
    app = notifyq.App()

    class Make(notifyq.Task):
        size: int

    @app.handler
    async def make(task: Make) -> str:
        return "x" * task.size

    fits, over = [(await insert(db, "Make", size=size))[0] for size in (998, 999)]
    async with working(app, dsn):
        await eventually(lambda: states(db), {("Make", "done"): 1, ("Make", "dead"): 1})
    rows = {row["id"]: row for row in await db.fetch("SELECT id, state, error FROM notifyq.all_tasks")}
    assert rows[fits]["state"] == "done"
    assert rows[over]["error"].startswith("its result is 1,001 bytes of JSON, the limit is 1,000; ")
