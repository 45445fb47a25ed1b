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
        one.wait_longer()
        assert before + one.pause.seconds <= one.due <= time.monotonic() + one.pause.seconds
        pauses.append(one.pause.seconds)
        before = time.monotonic()
    assert pauses[:9] == [2.0**n for n in range(9)]
    assert pauses[9:] == [unwritten.PAUSE_MOST] * 3


def test_a_locked_outcome_is_kept_as_it_was_decided() -> None:
    """PostgreSQL refused it, and then its row was locked, as a smaller form was to be written. `size` stays right."""
    kept, outcome = unwritten.Unwritten(), returned(job(), None, "x" * 1000)  # type: ignore[arg-type]
    kept.put(outcome)
    assert kept.next_batch()
    assert kept.shrink(outcome, "why")
    assert kept.size == kept.batch[0].size < outcome.size
    kept.postpone_locked({outcome.job.id})
    assert kept.size == outcome.size
    kept.hurry()
    assert kept.next_batch()
    assert kept.batch == [outcome]
    assert not kept.is_trial(outcome)
    kept.note_written(kept.batch)
    assert kept.size == 0


def test_each_outcome_counts_once() -> None:
    """New, or postponed and tried again, or put back as the settler ends in the middle of a batch."""
    kept, outcomes = unwritten.Unwritten(), [HandedBack(job()) for _ in range(3)]

    def counts() -> tuple[int, int]:
        return kept.pending, len(kept.leases)

    for outcome in outcomes:
        kept.put(outcome)
    assert counts() == (3, 3)
    assert kept.next_batch()
    assert counts() == (3, 3)
    refused = kept.batch.pop()
    kept.postpone(refused, "why")
    assert counts() == (2, 3)
    kept.put_back_batch()
    kept.hurry()
    assert kept.next_batch()
    assert kept.batch == [refused]
    assert counts() == (3, 3)
    kept.put_back_batch()
    assert counts() == (3, 3)


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
