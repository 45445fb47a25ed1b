"""A stage of a worker, tested by itself: what it tells its worker is kept here."""

from __future__ import annotations

from collections.abc import Callable

from notifyq.worker.outcome import Outcome


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
