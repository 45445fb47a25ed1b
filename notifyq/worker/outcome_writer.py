"""The statements that write outcomes: a statement for each kind, in one transaction if there are several kinds.

They are fenced: a task whose lease is lost stays as it is. The fence makes it harmless to write an outcome twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import assert_never

import asyncpg

from .. import log
from ..database.connection import SQL, Connection
from .job import Job
from .outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled
from .pipe import Ends

logger = log.logger("notifyq.settle")

KEPT = (
    "a trigger on notifyq.task keeps the row, though it raises nothing: a BEFORE trigger must return NEW, or OLD on "
    "DELETE (or a policy of row level security hides it)"
)


class OutcomeWriter:
    """Writes batches, and tells the worker which of its stages must act on them."""

    def __init__(self, keeps_history: bool, worker: Ends) -> None:
        self._keeps_history = keeps_history  # done and cancelled tasks go to notifyq.finished
        self._worker = worker
        self._kept: dict[Job, Outcome] = {}

    async def write(self, conn: Connection, batch: Sequence[Outcome], seconds: float) -> dict[Job, Outcome]:
        """Write a batch, a transaction for each worker. Raises one of TRANSIENT.

        Returns the outcomes that PostgreSQL accepted without changing the rows of their tasks: see KEPT.
        """
        self._kept = {}
        for worker in {outcome.job.worker for outcome in batch}:  # one, unless it was given up and registered again
            own = [outcome for outcome in batch if outcome.job.worker == worker]
            own.sort(key=attrgetter("job.id"))  # every statement locks rows in this order
            try:
                if len({type(outcome) for outcome in own}) == 1:
                    await self._write_kinds(conn, worker, own, seconds)
                else:
                    async with conn.transaction():
                        await self._write_kinds(conn, worker, own, seconds)
            except asyncpg.UniqueViolationError as error:
                if error.constraint_name != "finished_pkey":
                    raise
                await self._write_reused_ids(conn, worker, own, seconds)
        return self._kept

    async def _write_reused_ids(self, conn: Connection, worker: int, own: list[Outcome], seconds: float) -> None:
        """The history has an id of these already: the sequence of ids was set back. The older row is deleted."""
        async with conn.transaction():
            gone = await conn.fetch(SQL["forget_older_outcomes"], worker, *_keys(own), timeout=seconds)
            await self._write_kinds(conn, worker, own, seconds)
        logger.warning(
            "ids were given out a second time: the older tasks with these ids were deleted from the history",
            extra={"fields": {"ids": sorted(row[0] for row in gone)[:20], "tasks": len(gone)}},
        )
        self._worker.on_ids_reused()

    async def _write_kinds(self, conn: Connection, worker: int, outcomes: Sequence[Outcome], seconds: float) -> None:
        finished: list[Finished] = []
        later: list[RetryLater] = []
        back: list[HandedBack] = []
        unhandled: list[Unhandled] = []
        for outcome in outcomes:
            match outcome:
                case Finished():
                    finished.append(outcome)
                case RetryLater():
                    later.append(outcome)
                case HandedBack():
                    back.append(outcome)
                case Unhandled():
                    unhandled.append(outcome)
                case _:
                    assert_never(outcome)
        if finished:
            results, errors = [o.result for o in finished], [o.error for o in finished]
            states = [o.state for o in finished]
            args = states, results if any(results) else [], errors if any(errors) else [], self._keeps_history
            rows = await conn.fetch(SQL["finish"], worker, *_keys(finished), *args, timeout=seconds)
            await self._check(conn, finished, rows)
        if later:
            delays, errors = [o.delay for o in later], [o.error for o in later]
            rows = await conn.fetch(SQL["retry_later"], worker, *_keys(later), delays, errors, timeout=seconds)
            await self._check(conn, later, rows)
        if back:
            await self._check(conn, back, await conn.fetch(SQL["hand_back"], worker, *_keys(back)))
        if unhandled:
            types = sorted({o.job.type[:100] for o in unhandled})
            logger.warning(
                "no handler here for these types, leaving their tasks to other workers",
                extra={"fields": {"types": types[:20], "tasks": len(unhandled)}},
            )
            await self._check(conn, unhandled, await conn.fetch(SQL["release_unhandled"], worker, *_keys(unhandled)))

    async def _check(self, conn: Connection, outcomes: Sequence[Outcome], rows: Sequence[asyncpg.Record]) -> None:
        """Compare the rows that a statement returned with the outcomes that it was to write.

        A missing row is mostly a lost lease. Or the outcome was written before, and only the answer was lost: that
        looks the same, and is harmless. Two outcomes of one attempt have one row together: a crash of the server undid
        the claim, and this worker has claimed and run the same attempt once more.
        """
        if any(map(itemgetter(1), rows)):
            self._worker.on_released()
        if len(rows) == len(outcomes):
            return
        applied = {row[0] for row in rows}
        missed = [outcome for outcome in outcomes if outcome.job.id not in applied]
        if not missed:
            return
        kept = {row[0] for row in await conn.fetch(SQL["list_still_leased"], missed[0].job.worker, *_keys(missed))}
        self._kept |= {outcome.job: outcome for outcome in missed if outcome.job.id in kept}
        lost = [outcome.job.id for outcome in missed if outcome.job.id not in kept]
        if not lost:
            return
        cancelled = {id for id, state in await conn.fetch(SQL["read_final_states"], lost) if state == "cancelled"}
        if cancelled:
            logger.info(
                "cancelled while they ran: what their handlers returned doesn't count",
                extra={"fields": {"ids": sorted(cancelled)[:20], "tasks": len(cancelled)}},
            )
        if lost := [id for id in lost if id not in cancelled]:
            logger.warning(
                "settled nothing for tasks whose lease was lost",
                extra={"fields": {"ids": lost[:20], "tasks": len(lost)}},
            )


def _keys(outcomes: Iterable[Outcome]) -> tuple[list[int], list[int]]:
    return [o.job.id for o in outcomes], [o.job.attempt for o in outcomes]
