"""A stage of a worker, tested by itself: what it tells its worker is kept here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio

from notifyq.worker.outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled
from notifyq.worker.settle import Settler

from . import verbs
from .machine import limit
from .waiting import Seen

# An outcome of each kind for a job.
OUTCOMES: dict[str, Any] = {
    "finish": lambda job: Finished(job, "done"),
    "later": lambda job: RetryLater(job, 3600.0, verbs.ERROR),
    "hand back": HandedBack,
    "unhandled": Unhandled,
}


class Told:
    """What a stage tells its worker, by pipe.py's protocols."""

    def __init__(self, note: Callable[[Outcome], None] = lambda _: None) -> None:
        self._note = note
        self.failures: list[BaseException] = []
        self.calls = Seen()

    def settle(self, outcome: Outcome) -> None:
        self._note(outcome)

    def on_slot_released(self) -> None: ...

    def on_released(self) -> None:
        self.calls.add("on_released")

    def on_ids_reused(self) -> None:
        self.calls.add("on_ids_reused")

    async def back_off(self, stage: str, error: BaseException) -> None:
        self.failures.append(error)

    def note_success(self, stage: str) -> None: ...


class Writing:
    """A settler that writes these outcomes inside the block. At its end it stops once it has written what is new."""

    def __init__(self, dsn: str, outcomes: list[Any]) -> None:
        self.told = Told()
        self.settler = Settler(dsn, True, self.told, self.told)
        for outcome in outcomes:
            self.settler.put(outcome)

    async def __aenter__(self) -> Writing:
        self.task = asyncio.create_task(self.settler.run())
        return self

    async def __aexit__(self, error: object, *_: object) -> None:
        self.settler.finish()
        if error is not None:
            self.task.cancel()
            return
        with anyio.fail_after(limit()):
            await self.task
