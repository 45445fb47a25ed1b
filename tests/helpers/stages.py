"""A stage of a worker, tested by itself: what it tells its worker is kept here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio

from notifyq.worker.outcome import Outcome
from notifyq.worker.settle import Settler

from .machine import limit


class Told:
    """What a stage tells its worker, by pipe.py's protocols."""

    def __init__(self, note: Callable[[Outcome], None] = lambda _: None) -> None:
        self._note = note
        self.failures: list[BaseException] = []

    def settle(self, outcome: Outcome) -> None:
        self._note(outcome)

    def on_slot_released(self) -> None: ...
    def on_released(self) -> None: ...
    def on_ids_reused(self) -> None: ...

    async def back_off(self, stage: str, error: BaseException) -> None:
        self.failures.append(error)

    def note_success(self, stage: str) -> None: ...


class Writing:
    """A settler that writes these outcomes."""

    def __init__(self, dsn: str, outcomes: list[Any]) -> None:
        self.told = Told()
        self.settler = Settler(dsn, True, self.told, self.told)
        for outcome in outcomes:
            self.settler.put(outcome)
        self.settler.finish()

    async def __aenter__(self) -> Writing:
        self.task = asyncio.create_task(self.settler.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.fail_after(limit()):
            await self.task
