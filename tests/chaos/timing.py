"""The promises on time, proven from a history.

P3  a task starts within LATE_SECONDS of its commit, or of when it is due, while a slot is free: in quiet at once, and
    after a fault as soon as that had its time to heal
P4  what a killed worker held is taken back within RESCUE_SECONDS; a worker that is told to stop ends in its time
P5  no worker ends by itself
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import msgspec

from .checker import Breach, lease_of
from .fleet import SHUTDOWN_SECONDS
from .history import PLAIN, History, Lease, Process, Run

THREADS = "(threads)"  # beside the names of queues
LATE_SECONDS = 0.25
LIMITED_SECONDS = (
    1.0  # more, in a queue with limits: a worker that has the turn and is full there passes it on once a second
)
LAG_TIMES = 5  # a wake-up is some steps long, and each may find the machine busy
START_SECONDS = 3.0  # for a Python to start, if it never says so
RESCUE_SECONDS = 5.0
EXIT_SECONDS = SHUTDOWN_SECONDS + 7.0  # cancelling, writing and good-byes: 5 s, and a Python to end


class Start(msgspec.Struct):
    """A wake-up: when the task could begin, and when it did."""

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


@functools.cache
def starts(history: History) -> list[Start]:
    """The first start of each claim."""
    found: list[Start] = []
    seen: set[int] = set()
    full = crowded(history)
    for run in sorted(history.runs, key=lambda run: run.started):
        lease = lease_of(history, run)
        if lease is None or lease.claim.seq in seen:
            continue
        seen.add(lease.claim.seq)
        start = Start(run, lease, run.started - lease.ready)
        if start.late > LATE_SECONDS:
            start.excuse = _excuse(history, start, full)
        found.append(start)
    return found


def _excuse(history: History, start: Start, full: dict[str, list[tuple[float, float]]]) -> str:
    ready, begun = start.lease.ready, start.run.started
    queue = start.lease.claim.queue
    allowed = LATE_SECONDS + LAG_TIMES * history.lag(ready, begun)
    if start.late < allowed:
        return "the machine was busy"
    if start.late < allowed + LIMITED_SECONDS and any(process.queues.get(queue) for process in history.processes):
        return "a queue with a limit"
    if start.lease.claim.limit_key or start.lease.claim.order_key:
        return "it waits for others"
    if sum(lease.end is not None and lease.end.app.startswith("notifyq heartbeat")
           for lease in history.leases_of[start.run.id]) >= 2:  # fmt: skip
        return "its workers vanished, so it waits to run isolated"
    # What is in an enqueuer's way doesn't begin before he has ended; then its worker is rung.
    if any(
        start.run.id in batch.existed and batch.began < begun and begun - LATE_SECONDS < batch.at
        for batch in history.batches
    ):
        return "it prevented an enqueue that isn't committed"
    crowds = full.get(queue)
    if crowds is None:
        return "no worker serves that queue"
    last = bisect_left(crowds, (begun - LATE_SECONDS,)) - 1  # of those that began before; they don't overlap
    return "no free slot" if last >= 0 and crowds[last][1] >= ready else ""


def crowded(history: History) -> dict[str, list[tuple[float, float]]]:
    """For each queue when no worker had a slot for it, as far as the database knows: since, until; in order."""
    moments: list[tuple[float, int, Process, str]] = []
    process_of = {process.who: process for process in history.processes}
    registered = {row.who: row.committed for row in reversed(history.rows) if row.op == "W"}  # for the first time
    for process in history.processes:
        ends = [end for end in (process.told, process.killed, process.ended) if end is not None]
        begun = registered.get(process.who, process.started + START_SECONDS)
        moments.append((begun, 0, process, "begins"))
        moments.append((min(ends, default=float("inf")), 0, process, "ends"))
    for lease in history.leases:
        if lease.who in process_of:
            whose = process_of[lease.who], lease.claim.queue
            moments += [(lease.claim.at, 1, *whose), (_ends(lease), -1, *whose)]
            if lease.claim.type in PLAIN:
                whose = process_of[lease.who], THREADS
                moments += [(lease.claim.at, 1, *whose), (_ends(lease), -1, *whose)]
    queues = {queue for process in history.processes for queue in process.queues}
    found: dict[str, list[tuple[float, float]]] = {queue: [] for queue in queues}
    since = dict.fromkeys(queues, 0.0)  # crowded since then; no worker is there at first
    held: Counter[tuple[str, str]] = Counter()
    alive: set[str] = set()
    for at, change, process, what in sorted(moments, key=lambda moment: moment[0]):
        if change:
            held[process.who, what] += change
            if what != THREADS:
                held[process.who, ""] += change
        elif what == "begins":
            alive.add(process.who)
        else:
            alive.discard(process.who)
        for queue in queues:
            free = any(_has_capacity(process_of[who], held, queue) for who in alive)
            if free and queue in since:
                found[queue].append((since.pop(queue), at))
            elif not free:
                since.setdefault(queue, at)
    for queue, begin in since.items():
        found[queue].append((begin, float("inf")))
    return found


def _has_capacity(process: Process, held: Counter[tuple[str, str]], queue: str) -> bool:
    limit = process.queues.get(queue, 0)
    # Without a thread, the tasks of a queue wait behind one that needs it.
    if held[process.who, ""] >= process.concurrency or held[process.who, THREADS] >= process.threads:
        return False
    return limit is None or held[process.who, queue] < limit


def _ends(lease: Lease) -> float:
    return lease.end.committed if lease.end else float("inf")


def late(history: History) -> Iterator[Breach]:
    ordered = rounds(history)
    for start in starts(history):
        if start.late <= LATE_SECONDS or start.excuse:
            continue
        begun = start.run.started
        one = next((one for one in ordered if one.since <= begun < one.next), None)
        allowed = LATE_SECONDS + LAG_TIMES * history.lag(one.until, begun) if one else 0.0
        if one is None or begun > one.until + one.heal + allowed:
            where = f"{begun - one.until:.1f} s after {' + '.join(one.names)}" if one else "before any fault"
            yield Breach("P3", f"started {start.late:.3f} s after its time, {where}", start.run.id, begun)


def rescued(history: History) -> Iterator[Breach]:
    for process in history.processes:
        died = process.killed or (process.ended if process.code == -9 else None)
        if died is None:
            continue
        # A rescuer gives others time to come back if it was itself cut off.
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
