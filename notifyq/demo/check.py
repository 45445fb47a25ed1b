"""The ten checks of the summary. Each compares what the parts of the demo recorded independently of each other.

    the clients      count the tasks that they enqueued, once these were confirmed to them
    the mail server  counts the mails that it received, and those that it refused
    the database     has a row for each task, with times by its own clock
    the story        knows when it killed a worker, and with which exit code the other one ended

No worker is asked: what a worker reports about itself proves nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

# These are far above the usual figures, as the machine may be busy. They are far below 2.5 s, the mean of polling
# without the bell.
WAKE_P50_MS, WAKE_P99_MS = 100.0, 1000.0
LATE_P50_MS = 100.0
RESCUE_SECONDS = 5.0

COPIED = "DRAW_AVATAR"  # the type of the tasks that COPY writes
NEVER = datetime.max.replace(tzinfo=UTC)


class Row(NamedTuple):
    """A task as notifyq.all_tasks has it at the end."""

    id: int
    type: str
    state: str
    attempts: int
    created_at: datetime
    run_at: datetime
    processing_at: datetime | None = None
    error: str | None = None
    key: str | None = None  # of the mail that the task sends
    user: str | None = None  # the id of the user who signed up

    def __str__(self) -> str:
        return f"task {self.id} is {self.state} after {self.attempts} attempts, error: {self.error}"

    def ms_since(self, then: datetime) -> float:
        """Milliseconds from then to the latest claim. The row has no times of the claims before it."""
        return (self.processing_at - then).total_seconds() * 1000 if self.processing_at else math.nan


class Stopped(NamedTuple):
    """A worker that got a signal."""

    name: str
    at: datetime  # when it got the signal
    held: dict[int, int]  # the tasks that it ran, and the attempt that each was at
    exit_code: int | None  # None: it didn't end


@dataclass
class Facts:
    """What the parts of the demo recorded."""

    enqueued: Counter[str] = field(default_factory=Counter[str])  # by type
    malformed: set[int] = field(default_factory=set[int])  # ids; `enqueued` counts them too
    scheduled: set[int] = field(default_factory=set[int])  # ids
    copied_at: datetime = NEVER  # just before the COPY
    signed_up: set[str] = field(default_factory=set[str])  # users whose signup was answered with 201
    turned_away: int = 0  # signups answered with 409: their tasks had been enqueued, and were rolled back
    users: set[str] = field(default_factory=set[str])  # in the table
    received: Counter[str] = field(default_factory=Counter[str])  # mails by key
    refused: Counter[str] = field(default_factory=Counter[str])
    killed: Stopped | None = None
    drained: Stopped | None = None
    rows: list[Row] = field(default_factory=list[Row])

    def done(self) -> list[Row]:
        return [row for row in self.rows if row.state == "done"]

    def interrupted(self) -> dict[int, int]:
        """The attempts that the kill interrupted, by task.

        A task isn't among them if its outcome was on its way to the database, which wrote it after the kill.
        """
        settled = {row.id: row.attempts for row in self.done()}
        held = self.killed.held if self.killed else {}
        return {id: attempt for id, attempt in held.items() if settled.get(id) != attempt}

    def copy_window(self) -> tuple[datetime, datetime]:
        """From the COPY to the last claim of its tasks. Other tasks waited behind those then, and not for a wake-up."""
        claims = [row.processing_at for row in self.done() if row.type == COPIED and row.processing_at]
        return self.copied_at, max(claims, default=self.copied_at)

    def totals(self) -> list[tuple[str, int, int, int, int]]:
        """For each type: how many tasks were enqueued, are done, are dead, and ran more than once."""
        states = Counter((row.type, row.state) for row in self.rows)
        again = Counter(row.type for row in self.rows if row.attempts > 1)
        types = sorted({*self.enqueued, *(row.type for row in self.rows)})
        return [(type, self.enqueued[type], states[type, "done"], states[type, "dead"], again[type]) for type in types]


class Finding(NamedTuple):
    """A check's statement, and what contradicts it: nothing, if the check holds."""

    statement: str
    wrong: Sequence[object]

    def __str__(self) -> str:
        return "; ".join(map(str, [self.statement, *self.wrong][:4])) + ("; ..." if len(self.wrong) > 3 else "")


def every_task_ended(facts: Facts) -> Finding:
    wrong: list[object] = [row for row in facts.rows if row.state not in ("done", "dead")]
    wrong += [
        f"{type}: {enqueued} enqueued, {done} done + {dead} dead"
        for type, enqueued, done, dead, _ in facts.totals()
        if enqueued != done + dead
    ]
    done, dead = len(facts.done()), sum(row.state == "dead" for row in facts.rows)
    return Finding(f"{facts.enqueued.total():,} enqueued = {done:,} done + {dead} dead, and so for each type", wrong)


def only_malformed_rows_are_dead(facts: Facts) -> Finding:
    dead = {row.id: row for row in facts.rows if row.state == "dead"}
    wrong: list[object] = [dead.get(id, f"task {id} isn't dead") for id in facts.malformed ^ dead.keys()]
    wrong += [row for row in dead.values() if row.attempts != 1 or not row.error]
    return Finding(f"only the {len(facts.malformed)} malformed rows are dead, each at once, with its reason", wrong)


def users_commit_with_their_tasks(facts: Facts) -> Finding:
    mailed = {row.user for row in facts.done() if row.user}
    text = f"{len(facts.users)} users, each with the task of the same transaction"
    wrong = [f"not so for user {id}" for id in (facts.signed_up ^ facts.users) | (facts.users ^ mailed)]
    return Finding(f"{text}; of {facts.turned_away} rolled back, neither is left", wrong)


def each_mail_has_its_task(facts: Facts) -> Finding:
    keys = {row.key for row in facts.done() if row.key}
    wrong = [f"not so for key {key}" for key in keys ^ facts.received.keys()]
    return Finding(f"{len(facts.received)} mails received = {len(keys)} mail tasks done", wrong)


def only_the_kill_doubles_mails(facts: Facts) -> Finding:
    """A mail comes twice if its worker is killed after the mail was received and before the outcome is written."""
    interrupted = facts.interrupted()
    excused = {row.key for row in facts.rows if row.id in interrupted}
    doubles = {key: count for key, count in facts.received.items() if count > 1}
    wrong = [f"{key} came {count} times" for key, count in doubles.items() if key not in excused or count > 2]
    return Finding(f"{len(doubles)} of them came twice, each from a task that ran again after the kill", wrong)


def every_attempt_is_explained(facts: Facts) -> Finding:
    """A refusal costs an attempt, and so does the kill; a refusal and the kill together may cost only one."""
    interrupted = facts.interrupted()
    wrong = [
        f"{refused} refusals, and {row}"
        for row in facts.done()
        if row.attempts - 1 - (refused := facts.refused[row.key or ""])
        not in ((0, 1) if row.id in interrupted else (0,))
    ]
    text = f"{facts.refused.total()} refusals and {len(interrupted)} tasks killed"
    return Finding(f"{text}; nothing else cost an attempt", wrong)


def tasks_start_at_once(facts: Facts) -> Finding:
    """Measured from the INSERT, before its commit, to the claim, before the handler begins.

    Only mail tasks count, which are enqueued one by one, and only those that ran once: their latest claim is the first.
    """
    begin, end = facts.copy_window()
    rows = [row for row in facts.done() if row.key and row.attempts == 1 and not begin <= row.created_at <= end]
    p50, p99 = percentiles(row.ms_since(row.created_at) for row in rows)
    wrong = [] if p50 < WAKE_P50_MS and p99 < WAKE_P99_MS else [f"expected {WAKE_P50_MS:g} and {WAKE_P99_MS:g} ms"]
    text = f"wake-up p50 {p50:.1f} ms, p99 {p99:.1f} ms: INSERT to claim, of {len(rows)} enqueued singly"
    return Finding(text, wrong)


def scheduled_tasks_start_on_time(facts: Facts) -> Finding:
    """No task may be early. Those that became due while the COPY's tasks ran may be late."""
    begin, end = facts.copy_window()
    rows = [row for row in facts.done() if row.id in facts.scheduled and row.attempts == 1]
    wrong = [f"{-ms:.1f} ms early: {row}" for row in rows if (ms := row.ms_since(row.run_at)) < 0]
    late = [row.ms_since(row.run_at) for row in rows if not begin <= row.run_at <= end]
    p50, p99 = percentiles(late)
    if late and not p50 < LATE_P50_MS:
        wrong.append(f"expected {LATE_P50_MS:g} ms")
    return Finding(f"scheduled late p50 {p50:.1f} ms, p99 {p99:.1f} ms: run_at to claim, of {len(late)}", wrong)


def killed_tasks_run_again(facts: Facts) -> Finding:
    """Measured from SIGKILL to the next claim of each task. It is known if that claim is the latest one."""
    interrupted = facts.interrupted()
    if facts.killed is None or not interrupted:
        return Finding("a worker was killed", ["it ran no task then"])
    done = {row.id: row for row in facts.done()}
    wrong = [f"task {id} isn't done" for id in interrupted.keys() - done.keys()]
    again = [done[id] for id, attempt in interrupted.items() if id in done and done[id].attempts == attempt + 1]
    seconds = sorted(row.ms_since(facts.killed.at) / 1000 for row in again) or [math.nan]
    if not 0 < seconds[0] <= seconds[-1] < RESCUE_SECONDS:
        wrong.append(f"expected {RESCUE_SECONDS:g} s")
    text = f"{facts.killed.name} killed with {len(interrupted)} tasks"
    return Finding(f"{text}: the first ran again after {seconds[0]:.1f} s, the last after {seconds[-1]:.1f} s", wrong)


def a_stopped_worker_finishes_its_tasks(facts: Facts) -> Finding:
    if facts.drained is None:
        return Finding("a worker got SIGTERM", ["no worker was left for that"])
    name, _, held, code = facts.drained
    wrong = [] if code == 0 else [f"{name} didn't end" if code is None else f"{name} ended with {code}"]
    return Finding(f"SIGTERM to {name}, which ran {len(held)} tasks: it finished them, exit code 0", wrong)


def percentiles(values: Iterable[float]) -> tuple[float, float]:
    """p50 and p99: the smallest value that 50 % of all don't exceed, and 99 %. NaN if there are none."""
    ordered = sorted(values) or [math.nan]
    p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
    return p50, p99


CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    every_task_ended,
    only_malformed_rows_are_dead,
    users_commit_with_their_tasks,
    each_mail_has_its_task,
    only_the_kill_doubles_mails,
    every_attempt_is_explained,
    tasks_start_at_once,
    scheduled_tasks_start_on_time,
    killed_tasks_run_again,
    a_stopped_worker_finishes_its_tasks,
)
