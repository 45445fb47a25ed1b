"""Write outcomes, in fenced batches, each exactly as decided, as often as it takes.

What comes in while a batch is on its way is the next batch: a lone outcome is written at once, and under load
batches grow by themselves. Only the write is tried again, never the handler. A batch that PostgreSQL refuses for
what is in it is written one by one, and the one it refuses ends dead with what PostgreSQL said.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import assert_never

import asyncpg

from .codec import describe, encode_error
from .outcome import Aside, Finish, HandBack, Later, Outcome
from .store import REFUSED, SQL, TRANSIENT, Connection, Job, connect_worker, is_pooled, prove_alive

logger = logging.getLogger("notifyq.settle")

BATCH = 1000


class Settler:
    """`put` outcomes in, `run` writes them, `pending` tells how many are not written yet."""

    def __init__(
        self, dsn: str | None, keep: bool, settled: Callable[[], None], freed: Callable[[], None] = lambda: None
    ) -> None:
        self._dsn = dsn
        self._keep = keep  # done and cancelled tasks in notifyq.finished
        self._settled = settled
        self._freed = freed  # something ended that others may wait for
        self._pending: list[Outcome] = []
        self._writing: list[Outcome] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._conn: Connection | None = None
        self._worker: int | None = None
        self._proven: int | None = None  # the worker that the connection proves to be alive

    @property
    def pending(self) -> int:
        """Outcomes that aren't in the database yet."""
        return len(self._pending) + len(self._writing)

    @property
    def leases(self) -> list[Job]:
        """What they are the outcomes of."""
        return [outcome.job for outcome in (*self._pending, *self._writing)]

    def put(self, outcome: Outcome) -> None:
        self._pending.append(outcome)
        self._wake.set()

    def work_as(self, worker: int) -> None:
        """From now on the connection proves that this worker lives. What an older one has run, it still writes."""
        self._worker = worker
        self._wake.set()

    def finish(self) -> None:
        """`run` returns once everything is written."""
        self._stopping = True
        self._wake.set()

    async def run(self, back_off: Callable[[str, BaseException], Awaitable[None]], well: Callable[[str], None]) -> None:
        """Write until `finish`. `back_off` is awaited after each failure, `well` called after a success.

        Cancelled in the middle of a batch, it keeps it for the next `run`. If it was written after all, the fence
        refuses the second time.
        """
        try:
            while self._pending or not self._stopping:
                if not self._pending:
                    self._wake.clear()
                    if self._worker is not None:
                        try:
                            await self._prove()
                        except TRANSIENT as error:
                            self._disconnect()
                            await back_off("settle", error)
                            continue
                        well("settle")
                    await self._wake.wait()
                    continue
                self._writing, self._pending = self._pending[:BATCH], self._pending[BATCH:]
                while self._writing:
                    try:
                        self._writing = await self._write(self._writing)
                        well("settle")
                    except TRANSIENT as error:
                        self._disconnect()
                        await back_off("settle", error)
                self._settled()
        finally:
            self._pending[:0] = self._writing
            self._writing = []
            self._disconnect()

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.terminate()
            self._conn = None
            self._proven = None

    async def _prove(self) -> None:
        """Have a connection though there is nothing to write: any of the worker's sessions may be the last one."""
        if self._conn is not None and self._conn.is_closed():
            raise ConnectionError("the server closed the connection")
        await self._connect()

    async def _connect(self) -> Connection:
        if self._conn is None:
            self._conn = await connect_worker(self._dsn, "settle", worker=self._worker)
            self._conn.add_termination_listener(lambda _: self._wake.set())
        elif self._proven != self._worker and self._worker is not None and not is_pooled(self._conn):
            await self._conn.execute("SELECT pg_advisory_unlock_all()")
            await prove_alive(self._conn, self._worker)
        self._proven = self._worker
        return self._conn

    async def _write(self, batch: list[Outcome]) -> list[Outcome]:
        """Write a batch; return what is still to be written. Raises TRANSIENT: all of it."""
        conn = await self._connect()
        try:
            for worker in {outcome.job.worker for outcome in batch}:  # one, unless it was given up and came back
                mine = [outcome for outcome in batch if outcome.job.worker == worker]
                mine.sort(key=lambda outcome: outcome.job.id)  # everybody locks rows in this order
                if len({type(outcome) for outcome in mine}) == 1:
                    await self._write_kinds(conn, worker, mine)
                else:
                    async with conn.transaction():
                        await self._write_kinds(conn, worker, mine)
        except REFUSED as error:
            if len(batch) == 1:
                return [_refused(batch[0], error)]
            logger.debug("a batch was refused, writing its %d outcomes one by one", len(batch))
            while batch:
                rest = await self._write(batch[-1:])
                batch.pop()
                batch += rest
            return batch
        return []

    async def _write_kinds(self, conn: Connection, worker: int, outcomes: list[Outcome]) -> None:
        finish: list[Finish] = []
        later: list[Later] = []
        back: list[HandBack] = []
        aside: list[Aside] = []
        for outcome in outcomes:
            match outcome:
                case Finish():
                    finish.append(outcome)
                case Later():
                    later.append(outcome)
                case HandBack():
                    back.append(outcome)
                case Aside():
                    aside.append(outcome)
                case _:
                    assert_never(outcome)
        if finish:
            results = [o.result for o in finish] if any(o.result is not None for o in finish) else []
            errors = [o.error for o in finish] if any(o.error is not None for o in finish) else []
            states = [o.state for o in finish]
            rows = await conn.fetch(SQL["finish"], worker, *_keys(finish), states, results, errors, self._keep)
            self._tell(finish, rows)
        if later:
            args = [o.delay for o in later], [o.error for o in later]
            self._tell(later, await conn.fetch(SQL["retry_later"], worker, *_keys(later), *args))
        if back:
            self._tell(back, await conn.fetch(SQL["hand_back"], worker, *_keys(back)))
        if aside:
            types = sorted({o.job.type[:100] for o in aside})
            logger.warning(
                "no handler here for these types, leaving their tasks to other workers",
                extra={"fields": {"types": types[:20], "tasks": len(aside)}},
            )
            self._tell(aside, await conn.fetch(SQL["set_aside"], worker, *_keys(aside)))

    def _tell(
        self,
        outcomes: list[Finish] | list[Later] | list[HandBack] | list[Aside],
        rows: Sequence[asyncpg.Record],
    ) -> None:
        if any(row[1] for row in rows):
            self._freed()
        if len(rows) == len(outcomes):
            return
        applied = {row[0] for row in rows}
        # After a hiccup some of these were written, and only the answer was lost: indistinguishable, and harmless.
        lost = [o.job.id for o in outcomes if o.job.id not in applied]
        logger.warning(
            "settled nothing for tasks whose lease was lost",
            extra={"fields": {"ids": lost[:20], "tasks": len(lost)}},
        )


def _keys(outcomes: Iterable[Outcome]) -> tuple[list[int], list[int]]:
    return [o.job.id for o in outcomes], [o.job.attempt for o in outcomes]


def _refused(outcome: Outcome, error: BaseException) -> Outcome:
    why = encode_error(outcome.job.attempt, f"PostgreSQL can't store its outcome: {describe(error)}")
    if isinstance(outcome, Finish) and outcome.state == "dead":
        return Later(outcome.job, 3600.0, why)  # not even that: something is wrong with notifyq.finished
    return Finish(outcome.job, "dead", error=why)
