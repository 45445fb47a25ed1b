"""The outcomes that aren't in the database yet, and what is known about those that PostgreSQL refuses. No connection.

A refused outcome is replaced by a smaller form of it (outcome.smaller), which may be refused too. When no form is left,
it is postponed: after a pause, which doubles each time, it is written again as it was decided.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from .. import log
from ..database.connection import STATEMENT_BYTES
from ..pause import Pause
from .job import Job
from .outcome import Outcome, smaller

logger = log.logger("notifyq.settle")

BATCH = 1000
FULL_BYTES = 64 * 1024 * 1024  # with more bytes of unwritten outcomes than this, nothing is claimed
MOST_POSTPONED = 10_000  # with more postponed outcomes than this, nothing is claimed
KEPT_BYTES = 64 * 1024  # a postponed outcome is kept as it was decided if it is no larger, else in its smallest form
MOST_TRIES = 6  # how often the time that a try is given doubles
PAUSE_LEAST, PAUSE_MOST = 1.0, 300.0  # seconds for which an outcome is postponed

WRITTEN = "outcomes that could not be written are written now"
LESS = "PostgreSQL can't store these outcomes: less of them is written"
REFUSED = (
    "these outcomes can't be written in any form: they are kept here and tried again, and their tasks stay running "
    "until then; is there a constraint, a trigger or a lock on notifyq.task or notifyq.finished?"
)
LOCKED = (
    "another session has locked the rows of these tasks, so their outcomes can't be written: they are kept here until "
    "it lets go; is a transaction left open? SELECT pid, usename, xact_start, query FROM pg_stat_activity WHERE state "
    "LIKE 'idle in transaction%'"
)


class Postponed:
    """An outcome that PostgreSQL refuses in every form, or whose task's row is locked; and when to try again."""

    __slots__ = ("due", "is_locked", "is_storable", "outcome", "pause")

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.pause = Pause(PAUSE_LEAST, PAUSE_MOST)
        self.is_storable = False  # PostgreSQL has just shown that it would take a form of it
        self.is_locked = False
        self.due = 0.0  # when to try again, by time.monotonic()

    def wait_longer(self) -> None:
        self.is_storable = self.is_locked = False
        self.pause.lengthen()
        self.due = self.pause.due

    def wait_for_lock(self) -> None:
        self.is_locked = True
        self.due = time.monotonic() + PAUSE_LEAST


class Unwritten:
    """The unwritten outcomes of one worker. `put` adds outcomes, `next_batch` chooses which to write, and `note_...`,
    `shrink` and `postpone...` are told what became of them."""

    def __init__(self) -> None:
        self._pending: list[Outcome] = []
        self.batch: list[Outcome] = []  # the outcomes that are being written
        self.size = 0  # bytes of all outcomes here
        self._decided: dict[Job, tuple[Outcome, int]] = {}  # of smaller forms: the decided form, and how often shrunk
        self._tries: dict[Job, int] = {}  # how often an outcome alone wasn't written in time
        self._postponed: dict[Job, Postponed] = {}
        self._to_log: dict[int, tuple[str, str]] = {}  # by task id: a message, and why

    def put(self, outcome: Outcome) -> None:
        self._pending.append(outcome)
        self.size += outcome.size

    @property
    def pending(self) -> int:
        """How many are to be written now: all but those that are postponed until later, unless a lock is the reason."""
        count = len(self._pending) + len(self._first_tries())
        if self._postponed:
            now = time.monotonic()
            count += sum(one.is_locked or one.due <= now for one in self._postponed.values())
        return count

    @property
    def has_new(self) -> bool:
        """Whether there are outcomes that are neither postponed nor in the batch."""
        return bool(self._pending)

    @property
    def is_full(self) -> bool:
        """Whether there is too much to write to claim more."""
        return self.size > FULL_BYTES or len(self._postponed) > MOST_POSTPONED

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        locked = sum(one.is_locked for one in self._postponed.values())
        refused = len(self._postponed) - locked
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
        """The jobs whose outcomes these are, each once."""
        return [outcome.job for outcome in (*self._pending, *self._first_tries())] + list(self._postponed)

    def _first_tries(self) -> list[Outcome]:
        """The outcomes of the batch that aren't postponed."""
        if not self._postponed:
            return self.batch
        return [outcome for outcome in self.batch if outcome.job not in self._postponed]

    def hurry(self) -> None:
        """The worker stops: what is postponed is tried now, for the last time."""
        for one in self._postponed.values():
            one.due = 0.0

    def until_due(self) -> float | None:
        """Seconds until the first postponed outcome is due; None: there is none."""
        if not self._postponed:
            return None
        return max(0.0, min(one.due for one in self._postponed.values()) - time.monotonic())

    # What to write.

    def next_batch(self) -> bool:
        """Choose what to write next; False: there is nothing. Postponed outcomes that are due go by themselves, so that
        PostgreSQL doesn't refuse a batch of others because of them."""
        now = time.monotonic()
        self.batch = [one.outcome for one in self._postponed.values() if one.due <= now]
        if not self.batch:
            count = self._count_for_statement()
            self.batch, self._pending = self._pending[:count], self._pending[count:]
        return bool(self.batch)

    def _count_for_statement(self) -> int:
        if self.size <= STATEMENT_BYTES:
            return BATCH
        size = count = 0
        for outcome in self._pending[:BATCH]:
            size += outcome.size
            if count and size > STATEMENT_BYTES:
                break
            count += 1
        return count

    def put_back_batch(self) -> None:
        """The settler ends in the middle of a batch: leave it to the next run."""
        self._pending[:0] = self._first_tries()
        self.batch = []

    def tries(self, outcome: Outcome) -> int:
        return self._tries.get(outcome.job, 0)

    def is_postponed(self, outcome: Outcome) -> bool:
        return outcome.job in self._postponed

    def is_trial(self, outcome: Outcome) -> bool:
        """Whether it is a smaller form of a postponed outcome: if PostgreSQL takes it, that only says that something
        has changed."""
        postponed = self._postponed.get(outcome.job)
        return postponed is not None and not postponed.is_storable and outcome.job in self._decided

    # What became of it.

    def note_written(self, outcomes: Sequence[Outcome]) -> None:
        self.size -= sum(outcome.size for outcome in outcomes)
        if not (self._decided or self._postponed or self._tries):
            return
        for outcome in outcomes:
            self._decided.pop(outcome.job, None)
            self._tries.pop(outcome.job, None)
            if self._postponed.pop(outcome.job, None) is not None:
                self._to_log[outcome.job.id] = WRITTEN, ""

    def note_slow(self, outcome: Outcome) -> int:
        """An outcome alone wasn't written in time. Returns how often that has happened."""
        tries = self._tries[outcome.job] = min(MOST_TRIES, self.tries(outcome) + 1)
        return tries

    def note_storable(self, outcome: Outcome) -> None:
        """PostgreSQL would take this smaller form, the first of the batch: go on with the form that was decided."""
        decided, _ = self._decided.pop(outcome.job)
        self._postponed[outcome.job].is_storable = True
        self.size += decided.size - outcome.size
        self.batch[0] = decided

    def shrink(self, outcome: Outcome, why: str) -> bool:
        """Replace the first outcome of the batch by a smaller form; False: there is none."""
        job = outcome.job
        decided, step = self._decided.get(job, (outcome, 0))
        less = smaller(decided, step + 1, why)
        if less is None:
            return False
        if not step and job not in self._postponed:
            self._to_log[job.id] = LESS, why
        self._decided[job] = decided, step + 1
        self.size += less.size - outcome.size
        self.batch[0] = less
        return True

    def postpone(self, outcome: Outcome, why: str) -> None:
        """Try an outcome again after a pause, a longer one each time. It isn't in the batch any more."""
        self._set_aside(outcome, REFUSED, why).wait_longer()

    def postpone_locked(self, ids: Collection[int]) -> None:
        """Take the outcomes of these tasks out of the batch, until another session unlocks the rows."""
        for outcome in self.batch:
            if outcome.job.id in ids:
                self._set_aside(outcome, LOCKED, "").wait_for_lock()
        self.batch = [outcome for outcome in self.batch if outcome.job.id not in ids]

    def _set_aside(self, outcome: Outcome, message: str, why: str) -> Postponed:
        """Keep an outcome to try it again, as it was decided unless that is too large."""
        job = outcome.job
        decided, _ = self._decided.pop(job, (outcome, 0))
        if job not in self._postponed:
            self._postponed[job] = Postponed(decided if sent_bytes(decided) <= KEPT_BYTES else outcome)
            self._to_log[job.id] = message, why
        one = self._postponed[job]
        self.size += one.outcome.size - outcome.size
        return one

    def log(self) -> None:
        """Log what became of refused outcomes since the last time: a line for each reason, not for each task."""
        lines: dict[tuple[str, str], list[int]] = {}
        for id, line in self._to_log.items():
            lines.setdefault(line, []).append(id)
        self._to_log.clear()
        for (message, why), ids in lines.items():
            level = logging.INFO if message is WRITTEN else logging.ERROR
            fields = {"ids": ids[:20], "tasks": len(ids)} | ({"error": why} if why else {})
            logger.log(level, message, extra={"fields": fields})


def sent_bytes(outcome: Outcome) -> int:
    """How many bytes of an outcome a statement carries: all but the payload, which PostgreSQL copies."""
    return outcome.size - outcome.job.size
