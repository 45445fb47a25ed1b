"""The promises on what happens to tasks, proven from a history. Each check returns what it found broken.

P1  what committed has ended or is there; what was rolled back never was; who promised to end it, ended it
P2  each transition follows from the one before; only the holder of the lease settles; a handler runs under a lease, and
    again only after a fault that touched its process, or because it failed; two at once only if the first one's
    lease was lost; it is given its own task's payload, and its result is stored whole
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

import msgspec

from .history import PLAIN, RUN, History, Lease, Row, Run

ENDS = {
    "Quick": "done", "Only": "done", "Slow": "done", "Fail": "done", "Thread": "done", "Leak": "done", "Block": "done",
    "Forks": "done", "Bystander": "done", "Big": "done",
    "Doomed": "dead", "TimedOut": "dead", "Kamikaze": "dead", "Rude": "dead", "Huge": "dead",
}  # fmt: skip
ALLOWED = {"Bystander": 2, "Kamikaze": 2}  # attempts; of others as many as by default
ALONE = 3  # crashes of a task that ran alone: then it is dead
BYTES = re.compile(r"run \S+-\d+, (\d+) bytes")
CONDUCTOR = "notifyq"  # the role of enqueuers, and of the people who cancel and retry by SQL


class Breach(msgspec.Struct, frozen=True):
    promise: str
    what: str
    id: int = 0
    at: float = 0.0


def check(history: History) -> list[Breach]:
    from . import flow, once, timing  # which need Breach

    more = (*flow.CHECKS, *once.CHECKS, *timing.CHECKS)
    checks = (enqueued, ended, transitions, settled, leased, given, again, overlapping, *more)
    return [breach for check in checks for breach in check(history)]


def enqueued(history: History) -> Iterator[Breach]:
    born = Counter(row.n for rows in history.rows_of.values() if (row := rows[0]).op == "I")
    for batch in history.batches:
        there = [n for n in batch.numbers if born[str(n)]]
        if batch.outcome == "committed" and len(there) < len(batch.numbers):
            gone = sorted({*batch.numbers} - {*there})
            yield Breach("P1", f"lost: numbers {gone} by {batch.by} were committed, and are nowhere", at=batch.at)
        if batch.outcome == "rolled back" and there:
            yield Breach("P1", f"numbers {there} by {batch.by} were rolled back, and are there", at=batch.at)
        if batch.outcome == "unknown" and there and len(there) < len(batch.numbers):
            yield Breach("P1", f"of numbers {batch.numbers} by {batch.by} only {there} are there", at=batch.at)
    for n, count in born.items():
        if n is not None and n.isdecimal() and n != "0" and count > 1:
            yield Breach("P1", f"number {n} was enqueued once, and is there {count} times")


def ended(history: History) -> Iterator[Breach]:
    for id, rows in history.rows_of.items():
        last = rows[-1]
        if id in history.left:
            if history.left[id] != "Unknown":
                yield Breach("P1", f"a {last.type} has not ended, with workers at work", id, last.at)
            continue
        finish = next((row for row in reversed(rows) if row.op in "FX"), None)
        if finish is None or finish.op == "X":
            yield Breach("P1", "lost: it is gone without an outcome", id, last.at)
            continue
        state = finish.note.split(" ", 1)[0]
        want = ENDS.get(finish.type)
        poison = rows[0].n is None or not rows[0].n.isdecimal()
        # An attempt that a rescuer has ended is a crash, and no failure of a task that others ran beside.
        crashes = [
            lease for lease in history.leases_of[id] if lease.end and lease.end.app.startswith("notifyq heartbeat")
        ]
        alone = sum(_alone(history, lease) for lease in crashes)
        failures = finish.attempts - len(crashes) + alone
        spent = state == "dead" and (failures >= ALLOWED.get(finish.type, 10) or alone >= ALONE)
        if want and not poison and state not in (want, "cancelled") and not spent:
            yield Breach("P1", f"a {finish.type} ends {want}, and this one is {state}", id, finish.at)


def _alone(history: History, crash: Lease) -> bool:
    """Whether its worker held no other task when it was taken back."""
    assert crash.end is not None
    return not any(
        lease.id != crash.id
        and lease.claim.at < crash.end.at
        and (lease.end is None or lease.end.committed >= crash.end.committed)
        for lease in history.leases_by[crash.worker]
    )


def transitions(history: History) -> Iterator[Breach]:
    for id, rows in history.rows_of.items():
        alive, finished, worker, attempts = False, False, None, 0
        for row in rows:
            wrong = ""
            if row.op == "I":
                wrong = "inserted twice" if alive or finished else ""
                alive, worker, attempts = True, None, row.attempts
            elif row.op == "F":
                wrong = "settled twice" if finished else ""
                finished = True
            elif row.op == "X":
                finished = False
            else:
                if not alive or (row.was_worker, row.was_attempts) != (worker, attempts):
                    wrong = "it isn't what it was before"
                elif row.op == "U" and None not in (worker, row.worker) and worker != row.worker:
                    wrong = f"claimed by {row.worker} under the lease of {worker}"
                elif row.op == "U" and worker is None and row.worker is not None and row.attempts != attempts + 1:
                    wrong = "a claim that isn't the next attempt"
                alive, worker, attempts = row.op == "U", row.worker, row.attempts
            if wrong:
                yield Breach("P2", wrong, id, row.at)


def settled(history: History) -> Iterator[Breach]:
    """The process that wrote an outcome held the lease, and it was that lease's run."""
    for id, leases in history.leases_of.items():
        for lease in leases:
            if lease.claim.who != lease.who:
                yield Breach("P2", f"claimed by {lease.claim.who} in the name of {lease.who}", id, lease.claim.at)
            if (end := lease.end) is None or end.who in (lease.who, CONDUCTOR):
                continue
            if not end.app.startswith("notifyq heartbeat"):
                yield Breach("P2", f"settled by {end.who}, which didn't hold the lease: {lease.who} did", id, end.at)
        for row in history.rows_of[id]:
            if row.op not in "UF" or not (named := RUN.search(row.note)):
                continue
            run = history.run_by_name.get(named[1])
            fits = run and run.id == id and run.attempt == row.attempts and run.who == row.who
            if not fits and row.who != CONDUCTOR:
                yield Breach("P2", f"settled with the outcome of {named[0]}, which had no such lease", id, row.at)


def leased(history: History) -> Iterator[Breach]:
    """A handler begins under its lease."""
    for id, runs in history.runs_of.items():
        for run in runs:
            lease = lease_of(history, run)
            if lease is None:
                # A crash of the server may have lost what was inserted, and a claim that had not reached the disk: one
                # before the run began, or just after, as a claim is there up to 0.6 s later (3 x wal_writer_delay).
                if not history.touched(run.who, run.started - 2, run.started + 1):
                    yield Breach("P2", f"run {run.run} began without a lease", id, run.started)
                continue
            if lease.end is None or run.started <= lease.end.at or lease.end.who == CONDUCTOR:
                continue
            if not history.touched(run.who, lease.claim.at, run.started):
                yield Breach("P2", f"run {run.run} began after its lease had ended", id, run.started)


def given(history: History) -> Iterator[Breach]:
    """Each run had its own task's payload; each result is as long as its run said."""
    for id, runs in history.runs_of.items():
        for run in runs:
            if run.n is None or (lease := lease_of(history, run)) is None:
                continue
            # What was in the way of an enqueue may have been given another payload before it began.
            known = [row.n for row in history.rows_of[id] if row.n is not None and row.seq <= lease.claim.seq]
            if known and known[-1].isdecimal() and str(run.n) != known[-1]:
                what = f"run {run.run} was given the payload of number {run.n}, and its task is number {known[-1]}"
                yield Breach("P2", what, id, run.started)
    for id, rows in history.rows_of.items():
        for row in rows:
            if row.op == "F" and (said := BYTES.search(row.note)) and row.bytes != int(said[1]):
                yield Breach("P2", f"its result has {row.bytes:,} bytes of {int(said[1]):,}", id, row.at)


def again(history: History) -> Iterator[Breach]:
    """A lease that ended otherwise than by its own outcome."""
    for id, leases in history.leases_of.items():
        for lease in leases:
            end = lease.end
            if end is None or end.who == CONDUCTOR or own_outcome(end, lease):
                continue
            # Its admission was refused while another worker admitted a task of its key: it is handed back, and has
            # not begun. A plain handler's task for which there is no thread isn't claimed.
            keyed = end.limit_key or end.order_key or end.after
            if end.who == lease.who and keyed and not _began(history, lease, end):
                continue
            if not history.touched(lease.who, lease.claim.at, end.at):
                yield Breach("P2", f"taken from {lease.who}, which no fault had touched, by {end.who}", id, end.at)


def _began(history: History, lease: Lease, end: Row | None) -> bool:
    until = end.at if end else float("inf")
    return any(
        run.who == lease.who and lease.claim.at <= run.started <= until for run in history.runs_of.get(lease.id, [])
    )


def overlapping(history: History) -> Iterator[Breach]:
    for id, runs in history.runs_of.items():
        for first, second in itertools.pairwise(runs):
            if second.started >= _end(history, first):
                continue
            # It was claimed, and its worker frozen before it began: the worker begins it, and then finds out.
            stale = lease_of(history, second)
            is_over = stale is not None and stale.end is not None and stale.end.at <= second.started
            if stale is not None and is_over and history.touched(second.who, stale.claim.at, second.started):
                continue
            lease = lease_of(history, first)
            if lease is None or lease.end is None:
                excused = history.touched(first.who, first.started - 2, second.started)
            else:
                # A thread can't be cancelled; a person who cancels and retries by SQL wants it so.
                excused = (
                    lease.end.who == CONDUCTOR
                    or first.type in PLAIN
                    or history.touched(first.who, first.started, second.started)
                )
                excused = excused and lease.end.at <= second.started
            if not excused:
                yield Breach("P2", f"runs {first.run} and {second.run} at once", id, second.started)


def taken(history: History) -> Iterator[Lease]:
    """Leases that were taken from their workers, or given up by them, with a handler under way."""
    for lease in history.leases:
        if lease.end is None or lease.end.who == CONDUCTOR or own_outcome(lease.end, lease):
            continue
        if any(run.attempt == lease.attempt and run.who == lease.who for run in history.runs_of[lease.id]):
            yield lease


def own_outcome(end: Row, lease: Lease) -> bool:
    """The worker itself wrote how the attempt ended, and didn't just hand it back."""
    unhandled = end.op == "U" and end.withheld
    return end.who == lease.who and (end.op == "D" or end.attempts == lease.attempt or unhandled)


def lease_of(history: History, run: Run) -> Lease | None:
    found = [
        lease
        for lease in history.leases_of.get(run.id, [])
        if lease.attempt == run.attempt and lease.who == run.who and lease.claim.at <= run.started
    ]
    return found[-1] if found else None


def _end(history: History, run: Run) -> float:
    """When it ended, by itself or with its process."""
    if run.ended is not None:
        return run.ended
    ends = [process.killed or process.ended for process in history.processes if process.who == run.who]
    return min((end for end in ends if end is not None), default=float("inf"))
