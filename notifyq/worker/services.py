"""What running attempts use of the database, each on connections of its own."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, NamedTuple, Protocol

from .calls import no_results
from .job import Job
from .large_payloads import LargePayloads
from .transaction import State, Transactions


class ReadsResults(Protocol):
    """Reads the results of the tasks that a task has waited for: Predecessors, or what a test has made up."""

    def results(self, task: int) -> Awaitable[list[Any]]: ...
    def close(self) -> None: ...


class Services(NamedTuple):
    """What an attempt may need of the database. None: it isn't there, in a test without a worker."""

    transactions: Transactions | None = None
    predecessors: ReadsResults | None = None
    large_payloads: LargePayloads | None = None

    def results(self, task: int) -> Awaitable[list[Any]]:
        return self.predecessors.results(task) if self.predecessors is not None else no_results(task)

    @property
    def transaction_states(self) -> dict[Job, State]:
        """The states of the transactions that handlers have begun for their jobs."""
        return self.transactions.states if self.transactions is not None else {}

    async def close(self) -> None:
        if self.transactions is not None:
            await self.transactions.close()
        if self.predecessors is not None:
            self.predecessors.close()
        if self.large_payloads is not None:
            self.large_payloads.close()
