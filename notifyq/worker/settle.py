"""Write outcomes, in fenced batches, each exactly as decided, as often as it takes.

What comes in while a batch is on its way is the next batch: a lone outcome is written at once, and under load
batches grow by themselves. A batch has BATCH outcomes and STATEMENT_BYTES at most, or one outcome, and its time grows
with its bytes. Only the write is tried again, never the handler.

    PostgreSQL refuses a batch     it is tried again with half as many, down to one. The others are written at once
    it refuses that one            it is written in a smaller form: outcome.smaller
    it refuses all of these        it is put off, and its lease stays held. After a pause, which doubles each time, it
                                   is tried again, as it was decided: what was in its way may be gone. If that fails
                                   and a smaller form would be taken, what was in its way may have gone just between
                                   the two, so it starts again with the form that was decided
    it takes one, and its row      a trigger has returned NULL. It is put off at once, as above
    stays as it was
    a batch isn't written in time  half as many, down to one; that one with twice the time, and then as above
    a lock is in its way           after LOCK_SECONDS. The outcomes of the tasks whose rows somebody has locked are put
                                   off, and looked at each second. The others are written at once
    an id is in the history        the older row gives way: somebody has set the sequence of ids back
    the connection fails           all of it is tried again, on a new one
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import assert_never

import asyncpg

from .. import log
from ..codec import first_line
from ..database import schema
from ..database.connection import (
    SQL,
    STATEMENT_BYTES,
    TRANSIENT,
    Connection,
    connect_worker,
    is_pooled,
    prove_alive,
    seconds_for,
)
from .job import Job
from .outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled, smaller
from .pipe import Ends, Recovery

logger = log.logger("notifyq.settle")

BATCH = 1000
FULL_BYTES = 64 * 1024 * 1024  # of what isn't written; then nothing more is claimed
MOST_PUT_OFF = 10_000  # outcomes that PostgreSQL refuses; then nothing more is claimed
KEPT_BYTES = 64 * 1024  # one that is put off is kept as it was decided if it is no larger, else in its smallest form
TRIES = 2  # alone, until one that isn't written in time waits for later
MOST_TRIES = 6  # each has twice the time of the one before
PAUSE_LEAST, PAUSE_MOST = 1.0, 300.0  # seconds for which one is put off
LOCK_SECONDS = 0.5  # to wait for somebody's lock with a whole batch

# What says little about the row: a server that has no memory left, or is broken.
DISORDER = (asyncpg.OutOfMemoryError, asyncpg.InternalServerError)

WRITTEN = "outcomes that could not be written are written now"
LESS = "PostgreSQL can't store these outcomes: less of them is written"
REFUSED = (
    "these outcomes can't be written in any form: they are kept here and tried again, and their tasks stay running "
    "until then; is there a constraint, a trigger or a lock on notifyq.task or notifyq.finished?"
)

KEPT = (
    "a trigger on notifyq.task keeps the row, though it raises nothing: a BEFORE trigger must return NEW, or OLD on "
    "DELETE (or a policy of row level security hides it)"
)

LOCKED = (
    "another session has locked the rows of these tasks, so their outcomes can't be written: they are kept here until "
    "it lets go; is a transaction left open? SELECT pid, usename, xact_start, query FROM pg_stat_activity WHERE state "
    "LIKE 'idle in transaction%'"
)


class PutOff:
    """An outcome that PostgreSQL refuses in every form, or whose task's row is locked; and when to try again."""

    __slots__ = ("due", "locked", "outcome", "pause", "storable")

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.pause = PAUSE_LEAST
        self.due = time.monotonic() + self.pause
        self.storable = False  # PostgreSQL has just shown that it would take a form of it
        self.locked = False

    def again(self) -> None:
        self.storable = self.locked = False
        self.pause = min(PAUSE_MOST, self.pause * 2)
        self.due = time.monotonic() + self.pause

    def wait_for_lock(self) -> None:
        self.locked = True
        self.due = time.monotonic() + PAUSE_LEAST


class Settler:
    """`put` outcomes in, `run` writes them, `pending` tells how many are not written yet."""

    def __init__(
        self,
        dsn: str | None,
        keep: bool,
        worker: Ends,
        recovery: Recovery,
    ) -> None:
        self._dsn = dsn
        self._keep = keep  # done and cancelled tasks in notifyq.finished
        self._tells = worker
        self._recovery = recovery
        self._pending: list[Outcome] = []
        self._writing: list[Outcome] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._conn: Connection | None = None
        self._worker: int | None = None
        self._proven: int | None = None  # the worker that the connection proves to be alive
        self._most = BATCH  # outcomes in a statement: fewer, after one that failed for what is in it
        self._bytes = 0  # of those that are not written yet
        self._first: dict[Job, tuple[Outcome, int]] = {}  # what was decided, and how often it was made smaller since
        self._tries: dict[Job, int] = {}  # of those that were not written in time, alone
        self._put_off: dict[Job, PutOff] = {}
        self._kept: dict[Job, Outcome] = {}  # of the last write: PostgreSQL took them, and left their rows as they were
        self._held_up = False  # a lock is in the way of this batch
        self._patient = False  # it isn't the lock of a task's row: the connection waits for it as long as for anything
        self._told: dict[int, tuple[str, str]] = {}  # what to log of this batch, by id: a message, and why

    @property
    def pending(self) -> int:
        """Outcomes that aren't in the database yet; what PostgreSQL refuses counts only when it is tried again."""
        known = len(self._pending) + len(self._writing)
        if self._put_off:
            now = time.monotonic()
            known += sum(one.locked or one.due <= now for one in self._put_off.values())
        return known

    @property
    def put_off(self) -> int:
        """Outcomes that PostgreSQL refuses, or that wait for a lock."""
        return len(self._put_off)

    @property
    def full(self) -> bool:
        """There is too much to write to claim more."""
        return self._bytes > FULL_BYTES or len(self._put_off) > MOST_PUT_OFF

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        locked = sum(one.locked for one in self._put_off.values())
        refused = len(self._put_off) - locked
        return "; ".join(
            text.format(count)
            for text, count in (
                ("PostgreSQL refuses the outcomes of {} tasks", refused),
                ("another session has locked {} tasks that have ended", locked),
            )
            if count
        )

    @property
    def leases(self) -> list[Job]:
        """What they are the outcomes of."""
        return [outcome.job for outcome in (*self._pending, *self._writing)] + list(self._put_off)

    def put(self, outcome: Outcome) -> None:
        self._pending.append(outcome)
        self._bytes += outcome.size
        self._wake.set()

    def hurry(self) -> None:
        """The worker stops: what was put off is tried now, for the last time."""
        for one in self._put_off.values():
            one.due = 0.0
        self._wake.set()

    def work_as(self, worker: int) -> None:
        """From now on the connection proves that this worker lives. What an older one has run, it still writes."""
        self._worker = worker
        self._wake.set()

    def finish(self) -> None:
        """`run` returns once everything is written."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Write until `finish`.

        Cancelled in the middle of a batch, it keeps it for the next `run`. If it was written after all, the fence
        refuses the second time.
        """
        try:
            while self._pending or not self._stopping:
                self._wake.clear()
                self._writing = self._due() or self._take()
                if not self._writing:
                    if self._worker is not None:
                        try:
                            await self._prove()
                        except TRANSIENT as error:
                            self._disconnect()
                            await self._recovery.back_off("settle", error)
                            continue
                        self._recovery.note_success("settle")
                    await self._wait()
                    continue
                while self._writing:
                    await self._write_some()
                self._log()
                self._tells.on_slot_released()
        finally:
            self._pending[:0] = [outcome for outcome in self._writing if outcome.job not in self._put_off]
            self._writing = []
            self._disconnect()

    async def _wait(self) -> None:
        """For more, or until something that was put off is due."""
        timer = None
        if self._put_off:
            seconds = min(one.due for one in self._put_off.values()) - time.monotonic()
            timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _due(self) -> list[Outcome]:
        """What was put off until now. By itself, so that the others' batches aren't refused for it."""
        if not self._put_off:
            return []
        now = time.monotonic()
        return [one.outcome for one in self._put_off.values() if one.due <= now]

    def _take(self) -> list[Outcome]:
        """The next batch."""
        count = BATCH
        if self._bytes > STATEMENT_BYTES:
            size = count = 0
            for outcome in self._pending[:BATCH]:
                size += outcome.size
                if count and size > STATEMENT_BYTES:
                    break
                count += 1
        batch, self._pending = self._pending[:count], self._pending[count:]
        return batch

    async def _write_some(self) -> None:
        """Write as many of `_writing` as one statement may have, and take them out of it; or find out which one hinders
        the others."""
        batch = self._writing[: self._most]
        seconds = 0.0
        try:
            conn = await self._connect()
        except TRANSIENT as error:
            self._disconnect()
            await self._recovery.back_off("settle", error)
            return
        try:
            size = _size(batch) if self._bytes else 0
            seconds = seconds_for(size) * 2 ** self._tries.get(batch[0].job, 0)
            if self._held_up or batch[0].job in self._put_off:
                batch = await self._without_locked(conn, batch, seconds)
                if not batch:
                    return
            if self._is_trial(batch[0]):
                await self._try(conn, batch[0], seconds)
                return
            await self._write(conn, batch, seconds)
        except TimeoutError as error:
            self._disconnect()
            if len(batch) > 1:
                self._most = len(batch) // 2
            else:
                await self._too_slow(batch[0], seconds)
            await self._recovery.back_off("settle", error)
        except asyncpg.LockNotAvailableError:
            if self._held_up:
                await self._wait_for_locks(conn, patient=True)
            self._held_up = True
        except TRANSIENT as error:
            if not schema.refuses(error):
                self._disconnect()
                await self._recovery.back_off("settle", error)
            elif len(batch) > 1:
                self._most = len(batch) // 2
            else:
                shrink = not isinstance(error, DISORDER) or _sent(batch[0]) > KEPT_BYTES
                self._refused(batch[0], first_line(error), shrink=shrink)
        else:
            del self._writing[: len(batch)]
            self._most = min(BATCH, self._most * 2)
            self._held_up = False
            if self._patient:
                await self._wait_for_locks(conn, patient=False)
            self._written([outcome for outcome in batch if outcome.job not in self._kept] if self._kept else batch)
            for outcome in self._kept.values():
                self._delay(outcome, KEPT)
            self._recovery.note_success("settle")

    async def _without_locked(self, conn: Connection, batch: list[Outcome], seconds: float) -> list[Outcome]:
        """Put off those whose tasks' rows somebody has locked; return the others."""
        rows = await conn.fetch(SQL["list_locked"], [outcome.job.id for outcome in batch], timeout=seconds)
        if not rows:
            return batch
        ids = {row[0] for row in rows}
        locked = {outcome.job: outcome for outcome in batch if outcome.job.id in ids}
        for job, outcome in locked.items():
            if job not in self._put_off:
                self._put_off[job] = PutOff(outcome)
                self._told[job.id] = LOCKED, ""
            self._put_off[job].wait_for_lock()
        self._writing = [outcome for outcome in self._writing if outcome.job not in locked]
        return [outcome for outcome in batch if outcome.job not in locked]

    async def _wait_for_locks(self, conn: Connection, *, patient: bool) -> None:
        self._patient = patient
        if not is_pooled(conn):
            milliseconds = 0 if patient else round(LOCK_SECONDS * 1000)
            await conn.execute("SELECT set_config('lock_timeout', $1, false)", str(milliseconds))

    def _is_trial(self, outcome: Outcome) -> bool:
        """It was put off, and is a smaller form: whether PostgreSQL takes it only says that something has changed."""
        put_off = self._put_off.get(outcome.job)
        return put_off is not None and not put_off.storable and outcome.job in self._first

    async def _try(self, conn: Connection, outcome: Outcome, seconds: float) -> None:
        """Write a smaller form, and roll that back. If PostgreSQL takes it, go on with the form that was decided."""
        transaction = conn.transaction()
        await transaction.start()
        try:
            await self._write(conn, [outcome], seconds)
        except asyncpg.PostgresError:
            await transaction.rollback()
            raise
        await transaction.rollback()
        if self._kept:
            del self._writing[0]
            self._delay(outcome, KEPT)
            return
        first, _ = self._first.pop(outcome.job)
        self._put_off[outcome.job].storable = True
        self._bytes += first.size - outcome.size
        self._writing[0] = first

    def _written(self, batch: list[Outcome]) -> None:
        if self._bytes:
            self._bytes -= _size(batch)
        if self._first or self._put_off or self._tries:
            for outcome in batch:
                self._first.pop(outcome.job, None)
                self._tries.pop(outcome.job, None)
                if self._put_off.pop(outcome.job, None) is not None:
                    self._told[outcome.job.id] = WRITTEN, ""

    async def _too_slow(self, outcome: Outcome, seconds: float) -> None:
        """It is alone, and wasn't written in `seconds`. The next try has twice the time. After that it is put off, so
        that it keeps nobody else; or made smaller, if its bytes alone take too long, and not a lock, say."""
        tries = self._tries[outcome.job] = min(MOST_TRIES, self._tries.get(outcome.job, 0) + 1)
        if tries < TRIES:
            return
        slow = False
        if isinstance(outcome, Finished) and outcome.result is not None and _sent(outcome) > KEPT_BYTES:
            try:
                conn = await self._connect()
                await conn.fetchval("SELECT pg_column_size($1::jsonb)", outcome.result, timeout=seconds)
            except TimeoutError:
                self._disconnect()
                slow = True
            except TRANSIENT:
                self._disconnect()
                return
        self._refused(outcome, f"its {_sent(outcome):,} bytes were not written within {seconds:.0f} s", shrink=slow)

    def _refused(self, outcome: Outcome, why: str, *, shrink: bool) -> None:
        """Replace it, the first that is being written, by a smaller form, or put it off."""
        job = outcome.job
        first, step = self._first.get(job, (outcome, 0))
        less = smaller(first, step + 1, why) if shrink else None
        if less is not None:
            if not step and job not in self._put_off:
                self._told[job.id] = LESS, why
            self._first[job] = first, step + 1
            self._bytes += less.size - outcome.size
            self._writing[0] = less
            return
        del self._writing[0]
        self._delay(outcome, why)

    def _delay(self, outcome: Outcome, why: str) -> None:
        """Put it off, or again. It is not among those that are being written any more."""
        job = outcome.job
        self._bytes -= outcome.size
        first, _ = self._first.pop(job, (outcome, 0))
        if job in self._put_off:
            self._put_off[job].again()
        else:
            kept = first if first.size - job.size <= KEPT_BYTES else outcome
            self._put_off[job] = PutOff(kept)
            self._told[job.id] = REFUSED, why
        self._bytes += self._put_off[job].outcome.size

    def _log(self) -> None:
        """A line for each reason, and not for each task."""
        lines: dict[tuple[str, str], list[int]] = {}
        for id, line in self._told.items():
            lines.setdefault(line, []).append(id)
        self._told.clear()
        for (message, why), ids in lines.items():
            level = logging.INFO if message is WRITTEN else logging.ERROR
            fields = {"ids": ids[:20], "tasks": len(ids)} | ({"error": why} if why else {})
            logger.log(level, message, extra={"fields": fields})

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
            self._conn = await connect_worker(self._dsn, "settle", worker=self._worker, lock_seconds=LOCK_SECONDS)
            self._patient = False
            self._conn.add_termination_listener(lambda _: self._wake.set())
        elif self._proven != self._worker and self._worker is not None and not is_pooled(self._conn):
            await self._conn.execute("SELECT pg_advisory_unlock_all()")
            await prove_alive(self._conn, self._worker)
        self._proven = self._worker
        return self._conn

    async def _write(self, conn: Connection, batch: list[Outcome], seconds: float) -> None:
        """Each worker's in a transaction. Raises TRANSIENT."""
        self._kept.clear()
        for worker in {outcome.job.worker for outcome in batch}:  # one, unless it was given up and came back
            mine = [outcome for outcome in batch if outcome.job.worker == worker]
            mine.sort(key=attrgetter("job.id"))  # everybody locks rows in this order
            try:
                if len({type(outcome) for outcome in mine}) == 1:
                    await self._write_kinds(conn, worker, mine, seconds)
                else:
                    async with conn.transaction():
                        await self._write_kinds(conn, worker, mine, seconds)
            except asyncpg.UniqueViolationError as error:
                if error.constraint_name != "finished_pkey":
                    raise
                async with conn.transaction():
                    gone = await conn.fetch(SQL["forget_older_outcomes"], worker, *_keys(mine), timeout=seconds)
                    await self._write_kinds(conn, worker, mine, seconds)
                logger.warning(
                    "ids were given a second time: what the history had of older tasks with them gave way",
                    extra={"fields": {"ids": sorted(row[0] for row in gone)[:20], "tasks": len(gone)}},
                )
                self._tells.on_ids_reused()

    async def _write_kinds(self, conn: Connection, worker: int, outcomes: list[Outcome], seconds: float) -> None:
        finish: list[Finished] = []
        later: list[RetryLater] = []
        back: list[HandedBack] = []
        aside: list[Unhandled] = []
        for outcome in outcomes:
            match outcome:
                case Finished():
                    finish.append(outcome)
                case RetryLater():
                    later.append(outcome)
                case HandedBack():
                    back.append(outcome)
                case Unhandled():
                    aside.append(outcome)
                case _:
                    assert_never(outcome)
        if finish:
            results, errors = [o.result for o in finish], [o.error for o in finish]
            states = [o.state for o in finish]
            args = states, results if any(results) else [], errors if any(errors) else [], self._keep
            await self._tell(
                conn, finish, await conn.fetch(SQL["finish"], worker, *_keys(finish), *args, timeout=seconds)
            )
        if later:
            delays, errors = [o.delay for o in later], [o.error for o in later]
            rows = await conn.fetch(SQL["retry_later"], worker, *_keys(later), delays, errors, timeout=seconds)
            await self._tell(conn, later, rows)
        if back:
            await self._tell(conn, back, await conn.fetch(SQL["hand_back"], worker, *_keys(back)))
        if aside:
            types = sorted({o.job.type[:100] for o in aside})
            logger.warning(
                "no handler here for these types, leaving their tasks to other workers",
                extra={"fields": {"types": types[:20], "tasks": len(aside)}},
            )
            await self._tell(conn, aside, await conn.fetch(SQL["release_unhandled"], worker, *_keys(aside)))

    async def _tell(
        self,
        conn: Connection,
        outcomes: list[Finished] | list[RetryLater] | list[HandedBack] | list[Unhandled],
        rows: Sequence[asyncpg.Record],
    ) -> None:
        if any(map(itemgetter(1), rows)):
            self._tells.on_released()
        if len(rows) == len(outcomes):
            return
        applied = {row[0] for row in rows}
        # After a hiccup some of these were written, and only the answer was lost: indistinguishable, and harmless.
        missed: list[Outcome] = [outcome for outcome in outcomes if outcome.job.id not in applied]
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


def _size(outcomes: list[Outcome]) -> int:
    return sum(outcome.size for outcome in outcomes)


def _sent(outcome: Outcome) -> int:
    """Bytes of it that are sent."""
    return outcome.size - outcome.job.size
