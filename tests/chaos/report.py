"""What people read: the table of faults, and a task's story."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable

from .checker import Breach, taken
from .history import History
from .timing import LATE_SECONDS, rounds, starts

HEAD = ("fault", "times", "tasks", "run again", "lost", "settled twice", "other", "worst wake-up", "worst heal")


def table(history: History, breaches: list[Breach]) -> list[str]:
    """A line for each fault: tasks that lived through it, what broke, how late a start was after it at worst; and how
    long after it the last lease of a dead worker was taken back, or the last late start came."""
    lives = {id: (rows[0].at, rows[-1].at) for id, rows in history.rows_of.items()}
    births, deaths = sorted(life[0] for life in lives.values()), sorted(life[1] for life in lives.values())
    again = list(taken(history))
    ordered, begun = rounds(history), [start for start in starts(history) if not start.excuse]
    lines: dict[str, list[float]] = {}
    for window in history.windows:
        line = lines.setdefault(window.name, [0.0] * 8)
        one = next(one for one in ordered if one.since <= window.since <= one.until)
        line[0] += 1
        line[1] += bisect_right(births, one.until) - bisect_left(deaths, window.since)
        for lease in again:
            ended = lease.end.at if lease.end else 0.0
            if (window.who is None or lease.who in window.who) and window.since < ended < window.until + window.heal:
                line[2] += 1
                line[7] = max(line[7], ended - window.until)
        for breach in breaches:
            first, last = lives.get(breach.id, (breach.at, breach.at))
            if first <= one.next and window.since <= last:
                line[3 + _column(breach)] += 1
        for start in begun:
            if one.until < start.run.started < one.next:
                line[6] = max(line[6], start.late)
                if start.late > LATE_SECONDS:
                    line[7] = max(line[7], start.run.started - one.until)
    cells: list[tuple[str, ...]] = [HEAD]
    for name in sorted(lines):
        counts, wake, heal = lines[name][:6], lines[name][6], lines[name][7]
        cells.append((name, *(f"{count:,.0f}" for count in counts), f"{wake:.3f} s", f"{heal:.1f} s"))
    return _aligned(cells)


def _column(breach: Breach) -> int:
    if breach.promise == "P1":
        return 0
    return 1 if breach.what.startswith("settled") else 2


def _aligned(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for line in cells
        if (pairs := list(zip(line, widths, strict=True)))
    ]


def summary(history: History) -> str:
    excuses = Counter(start.excuse for start in starts(history) if start.excuse)
    late = ", ".join(f"{count} ({why})" for why, count in excuses.items()) or "none"
    ready = [start.late for start in starts(history) if not start.excuse]
    median = statistics.median(ready) * 1000 if ready else 0
    return (
        f"{len(history.rows_of):,} tasks, {len(history.runs):,} runs, {len(history.processes)} worker processes, "
        f"{len(history.rows):,} transitions; start p50 {median:.1f} ms after commit, late with an excuse: {late}; "
        f"the machine itself late for {sum(lag.seconds for lag in history.lags):.1f} s, "
        f"and {statistics.fmean([lag.slow for lag in history.lags if lag.slow] or [1.0]):.1f} times slower than alone"
    )


def story(history: History, id: int) -> list[str]:
    """All that is known of a task, in order."""
    events: list[tuple[float, str]] = []
    for row in history.rows_of.get(id, []):
        events.append(
            (row.at, _transition(row.op, row.was_worker, row.worker, row.attempts, row.who, row.app, row.note))
        )
        if row.committed - row.at > 0.05:
            events.append((row.committed, "... committed"))
    for run in history.runs_of.get(id, []):
        events.append((run.started, f"run {run.run} of attempt {run.attempt} begins in {run.who}"))
        if run.ended is not None:
            events.append((run.ended, f"run {run.run} ends: {run.how}"))
    events += [(at, f"{who} logs: {message}") for at, who, message, ids in history.logs if id in ids]
    if not events:
        return []
    first, last = min(events)[0] - 8, max(events)[0]
    owners = {who for lease in history.leases_of.get(id, []) if (who := lease.who)}
    for window in history.windows:
        if window.until >= first and window.since <= last:
            whom = "all" if window.who is None else ", ".join(sorted(window.who & owners)) or "none of its workers"
            events.append((window.since, f"-- {window.name} begins (touches {whom})"))
            events.append((window.until, f"-- {window.name} is over"))
    return [f"    {_clock(at)}  {what}" for at, what in sorted(events)]


def _transition(op: str, was: int | None, worker: int | None, attempts: int, who: str, app: str, note: str) -> str:
    what = {"I": "inserted", "D": "gone from task", "F": "finished", "X": "gone from finished"}.get(op)
    if what is None:
        what = f"worker {was} -> {worker}" if was != worker else "changed"
    return f"{what}, attempt {attempts}, by {who} ({app}) {note[:100]}".rstrip()


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f"{at % 1:.4f}"[1:]


def told(history: History, breaches: Iterable[Breach], most: int = 5) -> list[str]:
    """The breaches, the first ones with their stories."""
    lines: list[str] = []
    for number, breach in enumerate(sorted(breaches, key=lambda breach: (breach.promise, breach.at))):
        task = f"task {breach.id}: " if breach.id else ""
        lines.append(f"{breach.promise} broken at {_clock(breach.at)}: {task}{breach.what}")
        if number < most:
            lines += story(history, breach.id)
    return lines
