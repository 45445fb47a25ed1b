"""What must hold in the end: each claim of the summary, checked against what the demo's parts saw themselves.

    the producers      counted what they enqueued, each only once it was acknowledged
    the mail server    counted each mail that it took, and each that it refused
    the database       has each task's row, with the times its own clock gave
    the parent         knows when it killed a worker, and how the others ended

A worker is asked nothing: what it believes of itself proves nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import NamedTuple

import msgspec

# Far from what is usual, as the machine may be busy; and far from the 2.5 s of polling without a bell.
WAKE_P50_MS, WAKE_P99_MS = 100.0, 1000.0
LATE_P50_MS = 100.0
RESCUE_SECONDS = 5.0

COPIED = "DRAW_AVATAR"  # the type of the tasks that come by COPY


class Row(msgspec.Struct, kw_only=True, frozen=True):
    """A task, as notifyq.all_tasks has it in the end."""

    id: int
    type: str
    state: str
    attempts: int
    created_at: datetime
    run_at: datetime
    processing_at: datetime | None = None
    error: str | None = None
    key: str | None = None  # of the mail that the task sends
    user: str | None = None  # who signed up


class Killed(msgspec.Struct, kw_only=True, frozen=True):
    """The worker that got SIGKILL, when, and the attempt it was at with each task that it held."""

    name: str
    pid: int
    at: datetime
    held: dict[int, int]


class Drained(msgspec.Struct, kw_only=True, frozen=True):
    """A worker that got SIGTERM, how many tasks it held then, and its exit code, None if it stayed."""

    name: str
    held: int
    exit_code: int | None


class Facts(msgspec.Struct, kw_only=True):
    """What the parts saw."""

    enqueued: Counter[str] = msgspec.field(default_factory=Counter[str])  # by type
    malformed: set[int] = msgspec.field(default_factory=set[int])  # ids, counted in `enqueued` too
    scheduled: set[int] = msgspec.field(default_factory=set[int])  # ids
    copied_at: datetime | None = None  # just before the COPY
    signed_up: set[str] = msgspec.field(default_factory=set[str])  # users whose signup was answered with 201
    turned_away: int = 0  # signups answered with 409, after their task had been enqueued: rolled back
    users: set[str] = msgspec.field(default_factory=set[str])  # in the table
    received: Counter[str] = msgspec.field(default_factory=Counter[str])  # mails by key
    refused: Counter[str] = msgspec.field(default_factory=Counter[str])
    killed: Killed | None = None
    drained: list[Drained] = msgspec.field(default_factory=list[Drained])
    rows: list[Row] = msgspec.field(default_factory=list[Row])


class Finding(NamedTuple):
    ok: bool
    text: str


def findings(facts: Facts) -> list[Finding]:
    """One line each, in the order to print them."""
    checks: list[Callable[[Facts], Finding]] = [
        ended, dead, together, mailed, twice, attempts, woken, on_time, rescued, drained,
    ]  # fmt: skip
    return [check(facts) for check in checks]


def by_type(facts: Facts) -> list[tuple[str, int, int, int, int]]:
    """(type, enqueued, done, dead, run more than once) for each."""
    states = Counter((row.type, row.state) for row in facts.rows)
    again = Counter(row.type for row in facts.rows if row.attempts > 1)
    types = sorted(facts.enqueued | Counter(row.type for row in facts.rows))
    return [(type, facts.enqueued[type], states[type, "done"], states[type, "dead"], again[type]) for type in types]


def ended(facts: Facts) -> Finding:
    counts = by_type(facts)
    wrong = [
        f"{type}: {enqueued} enqueued, {done} done + {dead} dead"
        for type, enqueued, done, dead, _ in counts
        if enqueued != done + dead
    ]
    other = Counter(row.state for row in facts.rows if row.state not in ("done", "dead"))
    wrong += [f"{count} {state}" for state, count in other.items()]
    total, done, dead = (sum(column) for column in list(zip(*counts, strict=True))[1:4] or [(), (), ()])
    return _finding(f"{total:,} enqueued = {done:,} done + {dead} dead, and so for each type", wrong)


def dead(facts: Facts) -> Finding:
    """A malformed row is dead after one look at it, with a reason; nothing else is."""
    gone = {row.id: row for row in facts.rows if row.state == "dead"}
    wrong = [f"task {id} is malformed and not dead" for id in facts.malformed - gone.keys()]
    wrong += [f"task {id} is dead: {gone[id].error}" for id in gone.keys() - facts.malformed]
    wrong += [f"task {row.id} died without a reason" for row in gone.values() if not row.error]
    wrong += [f"task {row.id} died after {row.attempts} attempts" for row in gone.values() if row.attempts != 1]
    return _finding(f"dead are the {len(facts.malformed)} malformed rows alone, each with its reason", wrong)


def together(facts: Facts) -> Finding:
    """A user and their task are written in one transaction: both are there, or neither."""
    mailed = {row.user for row in _done(facts) if row.user}
    wrong = [f"user {user} signed up and is not in the table" for user in facts.signed_up - facts.users]
    wrong += [f"user {user} is in the table without having signed up" for user in facts.users - facts.signed_up]
    wrong += [f"user {user} got no task" for user in facts.users - mailed]
    wrong += [f"a task is for user {user}, who was rolled back" for user in mailed - facts.users]
    text = (
        f"{len(facts.users)} users, each with a task of the same transaction; "
        f"of {facts.turned_away} rolled back neither is left"
    )
    return _finding(text, wrong)


def mailed(facts: Facts) -> Finding:
    keys = {row.key for row in _done(facts) if row.key}
    wrong = [f"task with key {key} is done, and there is no mail" for key in keys - facts.received.keys()]
    wrong += [f"mail with key {key}, and no task for it is done" for key in facts.received.keys() - keys]
    return _finding(f"{len(facts.received)} mails received = {len(keys)} mail tasks done", wrong)


def twice(facts: Facts) -> Finding:
    """At least once: a mail may come twice if its worker was killed between the mail and the outcome."""
    held = _held(facts)
    doubles = {key: count for key, count in facts.received.items() if count > 1}
    excused = {row.key for row in facts.rows if row.id in held}
    wrong = [
        f"mail {key} came {count} times, and nobody was killed over it"
        for key, count in doubles.items()
        if key not in excused
    ]
    wrong += [f"mail {key} came {count} times for one kill" for key, count in doubles.items() if count > 2]
    return _finding(f"{len(doubles)} of them came twice, each from a task that ran again after the kill", wrong)


def attempts(facts: Facts) -> Finding:
    """Nothing but a refusal or the kill costs an attempt; each costs one, and both at once may cost one."""
    held = _held(facts)
    wrong = [
        f"task {row.id} took {row.attempts} attempts with {refused} refusals"
        for row in _done(facts)
        if row.attempts - 1 - (refused := facts.refused[row.key or ""]) not in ((0, 1) if row.id in held else (0,))
    ]
    refusals = facts.refused.total()
    return _finding(f"{refusals} refusals and {len(held)} tasks killed, and nothing else cost an attempt", wrong)


def woken(facts: Facts) -> Finding:
    """From a row's INSERT (its commit follows) to its claim (its handler follows), by the database's clock.

    Of the mail tasks, which come singly, and only of those that ran once, as the next attempt overwrites the
    time of the first. Not of those that came while the COPY's tasks were worked off: they waited in line, and
    not for a wake-up.
    """
    busy = _busy(facts)
    waits = [
        (row.processing_at - row.created_at).total_seconds() * 1000
        for row in _done(facts)
        if row.key and row.attempts == 1 and row.processing_at and not busy(row.created_at)
    ]
    p50, p99 = quantile(waits, 0.5), quantile(waits, 0.99)
    wrong = [] if p50 < WAKE_P50_MS and p99 < WAKE_P99_MS else [f"expected {WAKE_P50_MS:g} and {WAKE_P99_MS:g} ms"]
    text = f"wake-up p50 {p50:.1f} ms, p99 {p99:.1f} ms: INSERT to claim, of {len(waits)} enqueued singly"
    return _finding(text, wrong)


def on_time(facts: Facts) -> Finding:
    """From run_at to the claim. None may be early; those that were due during the COPY may be late."""
    busy = _busy(facts)
    starts = [
        (row, (row.processing_at - row.run_at).total_seconds() * 1000)
        for row in _done(facts)
        if row.id in facts.scheduled and row.attempts == 1 and row.processing_at
    ]
    wrong = [f"task {row.id} started {-ms:.1f} ms early" for row, ms in starts if ms < 0]
    late = [ms for row, ms in starts if not busy(row.run_at)]
    if not late:
        return _finding(f"{len(starts)} scheduled tasks came while the COPY's were worked off", wrong)
    p50, p99 = quantile(late, 0.5), quantile(late, 0.99)
    wrong += [] if p50 < LATE_P50_MS else [f"expected {LATE_P50_MS:g} ms"]
    text = f"scheduled late p50 {p50:.1f} ms, p99 {p99:.1f} ms: run_at to claim, of {len(late)}"
    return _finding(text, wrong)


def rescued(facts: Facts) -> Finding:
    """From SIGKILL to its tasks' next claim, if that was the only one since: each overwrites the time."""
    held = _held(facts)
    if facts.killed is None or not held:
        return Finding(False, "no worker was killed with a task in its hands")
    name, at = facts.killed.name, facts.killed.at
    rows = {row.id: row for row in facts.rows if row.id in held}
    wrong = [f"task {id} was lost" for id in held.keys() - rows.keys()]
    wrong += [f"task {row.id} is {row.state}" for row in rows.values() if row.state != "done"]
    after = [
        (row.processing_at - at).total_seconds()
        for row in rows.values()
        if row.processing_at and row.attempts == held[row.id] + 1
    ]
    first, last = min(after, default=math.nan), max(after, default=math.nan)
    if not (first > 0 and last < RESCUE_SECONDS):
        wrong.append(f"expected {RESCUE_SECONDS:g} s")
    again = f"the first ran again after {first:.1f} s, the last after {last:.1f} s"
    return _finding(f"{name} killed with {len(held)} tasks: {again}", wrong)


def drained(facts: Facts) -> Finding:
    if not facts.drained:
        return Finding(False, "no worker was left to drain")
    wrong = [
        f"{it.name} {'stayed' if it.exit_code is None else f'ended with {it.exit_code}'}"
        for it in facts.drained
        if it.exit_code != 0
    ]
    held = ", ".join(f"{it.name} with {it.held} tasks in its hands" for it in facts.drained)
    return _finding(f"SIGTERM to {held}: finished them, exit code 0", wrong)


def quantile(values: Iterable[float], q: float) -> float:
    """The smallest value that at least the share `q` of all are not above; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def _done(facts: Facts) -> list[Row]:
    return [row for row in facts.rows if row.state == "done"]


def _held(facts: Facts) -> dict[int, int]:
    """What died with the worker: not the tasks whose outcome it had sent, and the database wrote after the kill."""
    if facts.killed is None:
        return {}
    settled = {row.id: row.attempts for row in _done(facts)}
    return {id: attempt for id, attempt in facts.killed.held.items() if settled.get(id) != attempt}


def _busy(facts: Facts) -> Callable[[datetime], bool]:
    """Whether at that time the COPY's tasks were being worked off."""
    begin = facts.copied_at
    if begin is None:
        return lambda _: False
    end = max((row.processing_at for row in facts.rows if row.type == COPIED and row.processing_at), default=begin)
    return lambda at: begin <= at <= end


def _finding(text: str, wrong: list[str]) -> Finding:
    more = [f"and {len(wrong) - 3} more"] if len(wrong) > 3 else []
    return Finding(not wrong, "; ".join([text, *wrong[:3], *more]))
