"""Write outcomes, in fenced batches: each as it was decided, or in a smaller form if PostgreSQL can't store that.

The outcomes that come in while a batch is being written are the next batch: a lone outcome is written at once, and
under load batches grow by themselves. A batch has at most BATCH outcomes and STATEMENT_BYTES, or one outcome. The time
it is given grows with its bytes. Only the write is tried again, never the handler.

    PostgreSQL refuses a batch     try half as many, down to one; the others are written at once
    it refuses that one            write a smaller form of it: outcome.smaller
    it refuses all forms           postpone it, and keep its lease. After a pause, which doubles each time, try it again
                                   as it was decided. If PostgreSQL refuses that, but would now take a smaller form, the
                                   cause may have gone between the two tries: try the decided form once more before a
                                   smaller one is written
    it accepts one, and its row    a trigger has returned NULL: postpone it at once, as above
    stays as it was
    a batch isn't written in time  try half as many, down to one; that one with twice the time, and then as above
    a lock is in the way           after LOCK_SECONDS, postpone the outcomes of the tasks whose rows another session has
                                   locked, and look at them each second; the others are written at once
    an id is in the history        delete the older row: the sequence of ids was set back
    the connection fails           try all of it again, on a new one
"""

from __future__ import annotations

import asyncio

import asyncpg

from ..codec import first_line
from ..database.connection import SQL, Connection, connect_worker, is_pooled, prove_alive, seconds_for
from ..database.errors import TRANSIENT, is_refusal
from .job import Job
from .outcome import Finished, Outcome
from .outcome_writer import KEPT, OutcomeWriter
from .pipe import Ends, Recovery
from .unwritten import BATCH, KEPT_BYTES, Unwritten, sent_bytes

TRIES = 2  # an outcome alone that isn't written in time so often is postponed, or made smaller
LOCK_SECONDS = 0.5  # how long each wait for another session's lock lasts; a batch may have several such waits

# These say little about the row: the server may have no memory left, or be broken. So they make an outcome no smaller,
# unless it is larger than KEPT_BYTES: then its own size may be the cause.
DISORDER = (asyncpg.OutOfMemoryError, asyncpg.InternalServerError)


class Settler:
    """Takes outcomes by `put`, and `run` writes them. `pending` says how many aren't written yet."""

    def __init__(self, dsn: str | None, keeps_history: bool, worker: Ends, recovery: Recovery) -> None:
        self._dsn = dsn
        self._host = worker
        self._recovery = recovery
        self._unwritten = Unwritten()
        self._writer = OutcomeWriter(keeps_history, worker)
        self._wake = asyncio.Event()
        self._stopping = False
        self._conn: Connection | None = None
        self._worker: int | None = None
        self._proven: int | None = None  # the worker that the connection proves to be alive
        self._most = BATCH  # outcomes in a statement: fewer, after one that failed because of its rows
        self._was_locked_out = False  # a lock was in the way of this batch: look for locked rows before the next try
        self._lock_seconds = LOCK_SECONDS  # how long to wait for a lock; 0: as long as for anything else
        self._set_lock_seconds = LOCK_SECONDS  # what the connection is set to

    @property
    def pending(self) -> int:
        """Outcomes that aren't in the database yet. One that PostgreSQL refuses counts only while it is tried again."""
        return self._unwritten.pending

    @property
    def full(self) -> bool:
        return self._unwritten.is_full

    @property
    def trouble(self) -> str:
        return self._unwritten.trouble

    @property
    def leases(self) -> list[Job]:
        """The jobs whose outcomes aren't in the database yet, postponed or not."""
        return self._unwritten.leases

    def put(self, outcome: Outcome) -> None:
        self._unwritten.put(outcome)
        self._wake.set()

    def hurry(self) -> None:
        """The worker stops: what is postponed is tried now, for the last time."""
        self._unwritten.hurry()
        self._wake.set()

    def work_as(self, worker: int) -> None:
        """From now on the connection proves that this worker lives. It still writes outcomes of an earlier id."""
        self._worker = worker
        self._wake.set()

    def finish(self) -> None:
        """`run` returns once everything is written."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Write until `finish`.

        Cancelled in the middle of a batch, it keeps the batch for the next `run`. If the batch was written after all,
        the fence refuses the second time.
        """
        unwritten = self._unwritten
        try:
            while unwritten.has_new or not self._stopping:
                self._wake.clear()
                if unwritten.next_batch():
                    while unwritten.batch:
                        await self._write_some()
                    unwritten.log()
                    self._host.on_slot_released()
                elif await self._prove():
                    await self._wait()
        finally:
            unwritten.put_back_batch()
            self._disconnect()

    async def _prove(self) -> bool:
        """Have a connection though there is nothing to write: any of the worker's sessions may be the last one left.
        Returns False if that failed, and is to be tried again now."""
        if self._worker is None:
            return True
        try:
            if self._conn is not None and self._conn.is_closed():
                raise ConnectionError("the server closed the connection")
            await self._connect()
        except TRANSIENT as error:
            self._disconnect()
            await self._recovery.back_off("settle", error)
            return False
        self._recovery.note_success("settle")
        return True

    async def _wait(self) -> None:
        """Wait for more outcomes, or until a postponed one is due."""
        timer = None
        if (seconds := self._unwritten.until_due()) is not None:
            timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def _write_some(self) -> None:
        """Write as many outcomes of the batch as one statement may have, and take them out of it; or find out which one
        hinders the others."""
        unwritten = self._unwritten
        batch = unwritten.batch[: self._most]
        seconds = 0.0
        try:
            conn = await self._connect()
        except TRANSIENT as error:
            self._disconnect()
            await self._recovery.back_off("settle", error)
            return
        try:
            size = sum(outcome.size for outcome in batch) if unwritten.size else 0  # mostly 0: nothing to add up
            seconds = seconds_for(size) * 2 ** unwritten.tries(batch[0])
            if self._was_locked_out or unwritten.is_postponed(batch[0]):
                batch = await self._without_locked(conn, batch, seconds)
                if not batch:
                    return
            if unwritten.is_trial(batch[0]):
                await self._try_smaller(conn, batch[0], seconds)
                return
            kept = await self._writer.write(conn, batch, seconds)
        except TimeoutError as error:
            self._disconnect()
            if len(batch) > 1:
                self._most = len(batch) // 2
            else:
                await self._note_too_slow(batch[0], seconds)
            await self._recovery.back_off("settle", error)
        except asyncpg.LockNotAvailableError:
            if self._was_locked_out:  # and no task's row was locked: it is a lock of another kind, on a table say
                self._lock_seconds = 0.0
            self._was_locked_out = True
        except TRANSIENT as error:
            if not is_refusal(error):
                self._disconnect()
                await self._recovery.back_off("settle", error)
            elif len(batch) > 1:
                self._most = len(batch) // 2
            else:
                shrink = not isinstance(error, DISORDER) or sent_bytes(batch[0]) > KEPT_BYTES
                self._shrink_or_postpone(batch[0], first_line(error), shrink=shrink)
        else:
            del unwritten.batch[: len(batch)]
            self._most = min(BATCH, self._most * 2)
            self._was_locked_out = False
            self._lock_seconds = LOCK_SECONDS
            unwritten.note_written([outcome for outcome in batch if outcome.job not in kept] if kept else batch)
            for outcome in kept.values():
                unwritten.postpone(outcome, KEPT)
            self._recovery.note_success("settle")

    async def _without_locked(self, conn: Connection, batch: list[Outcome], seconds: float) -> list[Outcome]:
        """Postpone the outcomes whose tasks' rows another session has locked. Returns the others."""
        rows = await conn.fetch(SQL["list_locked"], [outcome.job.id for outcome in batch], timeout=seconds)
        ids = {row[0] for row in rows}
        if ids:
            self._unwritten.postpone_locked(ids)
        return [outcome for outcome in batch if outcome.job.id not in ids]

    async def _try_smaller(self, conn: Connection, outcome: Outcome, seconds: float) -> None:
        """Write a smaller form, and roll that back. If PostgreSQL takes it, go on with the form that was decided."""
        if await self._writer.rehearse(conn, outcome, seconds):
            self._unwritten.note_storable(outcome)
        else:
            del self._unwritten.batch[0]
            self._unwritten.postpone(outcome, KEPT)

    async def _note_too_slow(self, outcome: Outcome, seconds: float) -> None:
        """An outcome alone wasn't written in `seconds`. The next try has twice the time. After that it is postponed, so
        that others can be written. Or it is made smaller, if a test shows that its bytes take too long, and not a lock.
        """
        if self._unwritten.note_slow(outcome) < TRIES:
            return
        slow = False
        if isinstance(outcome, Finished) and outcome.result is not None and sent_bytes(outcome) > KEPT_BYTES:
            try:
                conn = await self._connect()
                await conn.fetchval("SELECT pg_column_size($1::jsonb)", outcome.result, timeout=seconds)
            except TimeoutError:
                self._disconnect()
                slow = True
            except TRANSIENT:
                self._disconnect()
                return
        self._shrink_or_postpone(
            outcome, f"its {sent_bytes(outcome):,} bytes were not written within {seconds:.0f} s", shrink=slow
        )

    def _shrink_or_postpone(self, outcome: Outcome, why: str, *, shrink: bool) -> None:
        """Replace the first outcome of the batch by a smaller form, or postpone it."""
        if not (shrink and self._unwritten.shrink(outcome, why)):
            del self._unwritten.batch[0]
            self._unwritten.postpone(outcome, why)

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.terminate()
            self._conn = None
            self._proven = None

    async def _connect(self) -> Connection:
        """The connection, with the lock_timeout and the proof that it must have now."""
        if self._conn is None:
            self._conn = await connect_worker(self._dsn, "settle", lock_seconds=LOCK_SECONDS)
            self._lock_seconds = self._set_lock_seconds = LOCK_SECONDS
            self._conn.add_termination_listener(lambda _: self._wake.set())
        if is_pooled(self._conn):
            return self._conn
        if self._worker is not None and self._proven != self._worker:
            if self._proven is not None:
                await self._conn.execute("SELECT pg_advisory_unlock_all()")
            # If another session has the lock, the next batch tries again.
            self._proven = self._worker if await prove_alive(self._conn, self._worker) else None
        if self._set_lock_seconds != self._lock_seconds:
            milliseconds = f"{self._lock_seconds * 1000:.0f}"
            await self._conn.execute("SELECT set_config('lock_timeout', $1, false)", milliseconds)
            self._set_lock_seconds = self._lock_seconds
        return self._conn
