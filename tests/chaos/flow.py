"""The promises on tasks that wait for others, proven from a history.

P6  of a limit_key never more run at once than their limit; of an order_key one, in the order of ids

What counts is a run under its lease: a handler that goes on after it lost that is fenced, and nobody can stop it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from .checker import Breach, lease_of
from .history import History

SEEN_SECONDS = 1.0  # a commit's time is from before it was flushed; later than that, all see it


class Turn(msgspec.Struct):
    """A run, as long as its lease stood."""

    id: int
    run: str
    since: float
    until: float
    most: int


def limited(history: History) -> Iterator[Breach]:
    for key, turns in _turns(history, "limit_key").items():
        moments = [(turn.since, 1, turn) for turn in turns] + [(turn.until, -1, turn) for turn in turns]
        count = 0
        for at, change, turn in sorted(moments, key=lambda moment: moment[:2]):
            count += change
            if change > 0 and count > turn.most:
                yield Breach(
                    "P6", f"run {turn.run} is number {count} of {key}, which has a limit of {turn.most}", turn.id, at
                )


def ordered(history: History) -> Iterator[Breach]:
    for key, turns in _turns(history, "order_key").items():
        for first, second in itertools.pairwise(turns):
            if second.since < first.until:
                yield Breach("P6", f"runs {first.run} and {second.run} of {key} at once", second.id, second.since)
        for turn in turns:
            for other in {other.id for other in turns if other.id < turn.id}:
                if _in_front(history, other, turn.since):
                    yield Breach("P6", f"run {turn.run} of {key} before task {other}", turn.id, turn.since)


def _in_front(history: History, id: int, at: float) -> bool:
    """Whether it was there, had begun or could, and didn't end before that time."""
    ready: float | None = None
    for row in history.rows_of[id]:
        if row.op == "D" and row.at < at:
            ready = None
        elif row.op == "I":
            ready = row.committed if row.run_at <= row.committed else None
        elif row.op == "U" and ready is None and row.worker is not None:
            ready = row.committed  # begun, for which it was due
        if row.at >= at:
            break
    return ready is not None and ready + SEEN_SECONDS < at


def _turns(history: History, what: str) -> dict[str, list[Turn]]:
    """By key, in the order in which they began."""
    found: dict[str, list[Turn]] = defaultdict(list)
    for id, runs in history.runs_of.items():
        key: str | None = getattr(history.rows_of[id][0], what) if id in history.rows_of else None
        if key is None:
            continue
        for run in runs:
            lease = lease_of(history, run)
            if lease is None:
                continue  # lost with a crash of the server, and claimed anew
            ends = [run.ended, lease.end.at if lease.end else None]
            until = min((end for end in ends if end is not None), default=float("inf"))
            if run.started < until:
                found[key].append(Turn(id, run.run, run.started, until, history.rows_of[id][0].most or 1))
    for turns in found.values():
        turns.sort(key=lambda turn: turn.since)
    return found


CHECKS = (limited, ordered)
