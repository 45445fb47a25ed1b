"""What a handler's Context asks of the call that it belongs to, whether that is of one task or of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any

import anyio

from ..task import Context, Isolation, Progress, Transaction
from .job import Job
from .services import Services
from .slots import Slots


class HandlerRun(ABC):
    """A runner, or a batch. The handler's Contexts talk to it, as their Run (task.py)."""

    __slots__ = ("_services", "_slots", "limit", "scope")

    def __init__(self, slots: Slots, services: Services) -> None:
        self._slots = slots
        self._services = services
        self.scope = anyio.CancelScope()
        self.limit: anyio.CancelScope | None = None  # inside of `scope`, while a handler with a timeout runs

    @abstractmethod
    def begin_transaction(self, context: Context, isolation: Isolation | None) -> Transaction: ...

    @abstractmethod
    def job_of(self, context: Context) -> Job | None:
        """The job that the Context is of; None if it doesn't run here any more."""

    def is_cancelled(self, context: Context) -> bool:
        if self.scope.cancel_called or (self.limit is not None and self.limit.cancel_called):
            return True
        return self.job_of(context) is None

    def report(self, context: Context, progress: Progress) -> None:
        job = self.job_of(context)
        if job is not None and not self.is_cancelled(context):
            self._slots.reports[job] = progress

    def results(self, context: Context) -> Awaitable[list[Any]]:
        return self._services.results(context.id)
