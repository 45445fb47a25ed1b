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


class _Written:
    """What one transaction has done. The worker and the log are told of it once it is committed."""

    def __init__(self) -> None:
        self.kept: dict[Job, Outcome] = {}  # accepted, though the rows of their tasks didn't change
        self.released = False  # other tasks may have waited for one of these
        self.older: list[int] = []  # ids of older tasks that were deleted from the history
        self.cancelled: list[int] = []  # ids of tasks that were cancelled while they ran
        self.lost: list[int] = []  # ids of tasks whose lease was lost otherwise
        self.unhandled: list[Unhandled] = []


class OutcomeWriter:
    """Writes batches, and tells the worker which of its stages must act on them."""

    def __init__(self, keeps_history: bool, worker: Ends) -> None:
        self._keeps_history = keeps_history  # done and cancelled tasks go to notifyq.finished
        self._worker = worker

    async def write(self, conn: Connection, batch: Sequence[Outcome], seconds: float) -> dict[Job, Outcome]:
        """Write a batch, a transaction for each worker. Raises one of TRANSIENT.

        Returns the outcomes that PostgreSQL accepted without changing the rows of their tasks: see KEPT.
        """
        kept: dict[Job, Outcome] = {}
        for worker in {outcome.job.worker for outcome in batch}:  # one, unless it was given up and registered again
            own = [outcome for outcome in batch if outcome.job.worker == worker]
            own.sort(key=attrgetter("job.id"))  # every statement locks rows in this order
            written = await self._write_own(conn, worker, own, seconds)
            self._tell(written)
            kept |= written.kept
        return kept

    async def rehearse(self, conn: Connection, outcome: Outcome, seconds: float) -> bool:
        """Write an outcome, and roll that back. Returns whether the row changed. Raises what `write` raises."""
        transaction = conn.transaction()
        await transaction.start()
        try:
            written = await self._write_own(conn, outcome.job.worker, [outcome], seconds)
        except asyncpg.PostgresError:
            await transaction.rollback()
            raise
        await transaction.rollback()
        return not written.kept

    async def _write_own(self, conn: Connection, worker: int, own: list[Outcome], seconds: float) -> _Written:
        """Write the outcomes of one worker, in one transaction, or in a savepoint of the caller's."""
        try:
            if len({type(outcome) for outcome in own}) == 1 and not conn.is_in_transaction():
                return await self._write_kinds(conn, worker, own, seconds)
            async with conn.transaction():
                return await self._write_kinds(conn, worker, own, seconds)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != "finished_pkey":
                raise
        # The history has an id of these already: the sequence of ids was set back. The older row is deleted.
        async with conn.transaction():
            older = await conn.fetch(SQL["forget_older_outcomes"], worker, *_keys(own), timeout=seconds)
            written = await self._write_kinds(conn, worker, own, seconds)
        written.older = sorted(row[0] for row in older)
        return written

    async def _write_kinds(
        self, conn: Connection, worker: int, outcomes: Sequence[Outcome], seconds: float
    ) -> _Written:
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
        written = _Written()

        async def write(statement: str, outcomes: Sequence[Outcome], *args: object) -> None:
            rows = await conn.fetch(SQL[statement], worker, *_keys(outcomes), *args, timeout=seconds)
            await _check(conn, outcomes, rows, written)

        if finished:
            results, errors = [o.result for o in finished], [o.error for o in finished]
            states = [o.state for o in finished]
            args = states, results if any(results) else [], errors if any(errors) else [], self._keeps_history
            await write("finish", finished, *args)
        if later:
            await write("retry_later", later, [o.delay for o in later], [o.error for o in later])
        if back:
            await write("hand_back", back)
        if unhandled:
            written.unhandled = unhandled
            await write("release_unhandled", unhandled)
        return written

    def _tell(self, written: _Written) -> None:
        if written.older:
            logger.warning(
                "ids were given out a second time: the older tasks with these ids were deleted from the history",
                extra={"fields": _fields(written.older)},
            )
            self._worker.on_ids_reused()
        if written.unhandled:
            types = sorted({o.job.type[:100] for o in written.unhandled})
            logger.warning(
                "no handler here for these types, leaving their tasks to other workers",
                extra={"fields": {"types": types[:20], "tasks": len(written.unhandled)}},
            )
        if written.cancelled:
            logger.info(
                "cancelled while they ran: what their handlers returned doesn't count",
                extra={"fields": _fields(sorted(written.cancelled))},
            )
        if written.lost:
            logger.warning(
                "settled nothing for tasks whose lease was lost, or whose outcome was written by an earlier try",
                extra={"fields": _fields(written.lost)},
            )
        if written.released:
            self._worker.on_released()


async def _check(
    conn: Connection, outcomes: Sequence[Outcome], rows: Sequence[asyncpg.Record], written: _Written
) -> None:
    """Compare the rows that a statement returned with the outcomes that it was to write.

    A missing row is mostly a lost lease. Or the outcome was written before, and only the answer was lost: that looks
    the same, and is harmless. Two outcomes of one attempt have one row together: a crash of the server undid the claim,
    and this worker has claimed and run the same attempt once more.
    """
    if any(map(itemgetter(1), rows)):
        written.released = True
    if len(rows) == len(outcomes):
        return
    applied = {row[0] for row in rows}
    missed = [outcome for outcome in outcomes if outcome.job.id not in applied]
    if not missed:
        return
    kept = {row[0] for row in await conn.fetch(SQL["list_still_leased"], missed[0].job.worker, *_keys(missed))}
    written.kept |= {outcome.job: outcome for outcome in missed if outcome.job.id in kept}
    lost = [outcome.job.id for outcome in missed if outcome.job.id not in kept]
    if not lost:
        return
    cancelled = {id for id, state in await conn.fetch(SQL["read_final_states"], lost) if state == "cancelled"}
    written.cancelled += cancelled
    written.lost += [id for id in lost if id not in cancelled]


def _fields(ids: list[int]) -> dict[str, object]:
    return {"ids": ids[:20], "tasks": len(ids)}


def _keys(outcomes: Iterable[Outcome]) -> tuple[list[int], list[int]]:
    return [o.job.id for o in outcomes], [o.job.attempt for o in outcomes]
