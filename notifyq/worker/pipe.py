"""What each stage tells the worker that it belongs to, one small protocol a stage. Worker implements them all."""

from __future__ import annotations

from typing import Protocol

from .job import Job
from .outcome import Outcome


class Sink(Protocol):
    """The runners tell it how each attempt ended."""

    def settle(self, outcome: Outcome, /) -> None: ...
    def on_slot_released(self) -> None:
        """A slot is free, or outcomes were written: there may be capacity for another claim."""


class Waiters(Protocol):
    """Told by a handler's own transaction when it has settled its task."""

    def on_released(self) -> None:
        """A task has ended that others may wait for: by an order key, a limit, or `after`."""


class Ends(Waiters, Protocol):
    """The settler tells it what it has written."""

    def on_slot_released(self) -> None: ...
    def on_ids_reused(self) -> None:
        """An id was given to a second task."""


class Recovery(Protocol):
    """A stage tells it that its connection has failed, and that it works again."""

    async def back_off(self, stage: str, error: BaseException) -> None:
        """Log the failure, once, and return when the stage may try again."""

    def note_success(self, stage: str) -> None: ...


class Host(Protocol):
    """What Outages asks of the worker, and tells it."""

    @property
    def is_stopping(self) -> bool: ...
    @property
    def loop_was_blocked(self) -> bool: ...
    def on_failure(self, error: BaseException) -> None:
        """The worker can't go on: it ends with this error."""


class Alive(Protocol):
    """The heartbeat tells it what it hears about the worker. Called on the worker's event loop."""

    name: str  # host:pid

    @property
    def trouble(self) -> str: ...  # what is degraded, in words

    def on_leases_lost(self, jobs: list[Job], cancelled: set[int]) -> None:
        """The leases of these jobs are lost; those of `cancelled` since the tasks were cancelled."""

    def on_new_id(self, id: int) -> None:
        """Others took this worker for dead; it has registered again, under this id."""

    def on_failure(self, error: BaseException) -> None: ...
