"""The promises on time, proven from a history.

P3  a task starts within LATE_SECONDS of its commit, or of when it is due, while a slot is free: in quiet at once, and
    after a fault as soon as that had its time to heal
P4  what a killed worker held is taken back within RESCUE_SECONDS; a worker that is told to stop ends in its time
P5  no worker ends by itself
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec

from .checker import Breach, lease_of
from .fleet import SHUTDOWN_SECONDS
from .history import History, Lease, Process, Run

LATE_SECONDS = 0.25
LAG_TIMES = 5  # a wake-up is some hops long, and each may find the machine busy
RESCUE_SECONDS = 5.0
EXIT_SECONDS = SHUTDOWN_SECONDS + 7.0  # cancelling, writing and good-byes: 5 s, and a Python to end


class Start(msgspec.Struct):
    """A wake-up: when it could begin, when it did."""

    run: Run
    lease: Lease
    late: float
    excuse: str = ""  # why it may have been late


class Round(msgspec.Struct):
    """A fault or two, and the time after them until the next."""

    names: list[str]
    since: float
    until: float
    heal: float
    next: float = float("inf")


def rounds(history: History) -> list[Round]:
    found: dict[int, Round] = {}
    for window in sorted(history.windows, key=lambda window: (window.round, window.since)):
        if window.round not in found:
            found[window.round] = Round([window.name], window.since, window.until, window.heal)
            continue
        known = found[window.round]
        known.names.append(window.name)
        known.until, known.heal = max(known.until, window.until), max(known.heal, window.heal)
    ordered = sorted(found.values(), key=lambda one: one.since)
    for one, following in itertools.pairwise(ordered):
        one.next = following.since
    return ordered


def starts(history: History) -> list[Start]:
    """The first start of each claim."""
    found: list[Start] = []
    seen: set[int] = set()
    for run in sorted(history.runs, key=lambda run: run.started):
        lease = lease_of(history, run)
        if lease is None or lease.claim.seq in seen:
            continue
        seen.add(lease.claim.seq)
        start = Start(run, lease, run.started - lease.ready)
        if start.late > LATE_SECONDS:
            start.excuse = _excuse(history, start)
        found.append(start)
    return found


def _excuse(history: History, start: Start) -> str:
    ready, begun = start.lease.ready, start.run.started
    if start.late < LATE_SECONDS + LAG_TIMES * history.lag(ready, begun):
        return "the machine was busy"
    if not slot_free(history, start.lease.claim.queue, ready, begun - LATE_SECONDS):
        return "no free slot"
    return ""


def slot_free(history: History, queue: str, since: float, until: float) -> bool:
    """Whether at each moment in between some worker had a slot for that queue, as far as the database knows."""
    near = [lease for lease in history.leases if lease.claim.at <= until and _ends(lease) >= since]
    moments = {since, until, *(lease.claim.at for lease in near), *(_ends(lease) for lease in near)}
    for moment in sorted(moment for moment in moments if since <= moment <= until):
        held = [lease for lease in near if lease.claim.at <= moment <= _ends(lease)]
        if not any(_room(process, held, queue, moment) for process in history.processes):
            return False
    return True


def _room(process: Process, held: list[Lease], queue: str, moment: float) -> bool:
    ended = min(process.told or moment + 1, process.killed or moment + 1, process.ended or moment + 1)
    # A Python takes its time to start.
    if queue not in process.queues or not process.started + 3 <= moment <= ended:
        return False
    mine = [lease for lease in held if lease.who == process.who]
    limit = process.queues[queue]
    full = limit is not None and sum(lease.claim.queue == queue for lease in mine) >= limit
    return len(mine) < process.concurrency and not full


def _ends(lease: Lease) -> float:
    return lease.end.committed if lease.end else float("inf")


def late(history: History) -> Iterator[Breach]:
    ordered = rounds(history)
    for start in starts(history):
        if start.late <= LATE_SECONDS or start.excuse:
            continue
        begun = start.run.started
        one = next((one for one in ordered if one.since <= begun < one.next), None)
        if one is None or begun > one.until + one.heal + LATE_SECONDS:
            where = f"{begun - one.until:.1f} s after {' + '.join(one.names)}" if one else "before any fault"
            yield Breach("P3", f"started {start.late:.3f} s after its time, {where}", start.run.id, begun)


def rescued(history: History) -> Iterator[Breach]:
    for process in history.processes:
        died = process.killed or (process.ended if process.code == -9 else None)
        if died is None:
            continue
        # Whoever would rescue gives others time to come back if it was itself cut off.
        busy = any(
            (window.who is None or len(window.who) > 2 or "locked" in window.name)
            and window.since <= died + RESCUE_SECONDS
            and died - RESCUE_SECONDS <= window.until
            for window in history.windows
        )
        allowed = RESCUE_SECONDS + LAG_TIMES * history.lag(died, died + RESCUE_SECONDS)
        for lease in history.leases:
            held = lease.who == process.who and lease.claim.at < died < _ends(lease)
            if held and not busy and _ends(lease) > died + allowed:
                what = f"its worker {process.who} was killed, and {_ends(lease) - died:.1f} s later it was rescued"
                yield Breach("P4", what, lease.id, died)


def exits(history: History) -> Iterator[Breach]:
    for process in history.processes:
        who, ended = process.who, process.ended
        if process.told is not None and process.killed is None:
            frozen = sum(
                window.until - window.since
                for window in history.windows
                if window.who and who in window.who and "frozen" in window.name
            )
            allowed = EXIT_SECONDS + frozen + LAG_TIMES * history.lag(process.told, process.told + EXIT_SECONDS)
            if ended is None or ended - process.told > allowed:
                took = "never" if ended is None else f"after {ended - process.told:.1f} s"
                yield Breach("P4", f"worker {who} was told to stop, and ended {took}", at=process.told)
        elif ended is not None and process.killed is None and process.code != 3:
            deadly = any(run.type == "Kamikaze" and run.who == who and run.ended is None for run in history.runs)
            if not deadly:
                yield Breach("P5", f"worker {who} ended by itself, with {process.code}", at=ended)


CHECKS = (late, rescued, exits)
