"""The promises on tasks that wait for others, proven from a history.

P6  of a limit_key never more run at once than their limit, nor start in a time than their rate; of an order_key one,
    in the order of ids
P8  a task that comes after others begins when all have ended, and soon hears of that; it is cancelled if one is dead,
    unless its on_dead is "run"

What counts is a run under its lease: a handler that goes on after it lost that is fenced, and no code can stop it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from .checker import CONDUCTOR, Breach, lease_of
from .history import History, Row
from .timing import LAG_TIMES

SEEN_SECONDS = 1.0  # a commit's time is from before it was flushed; later than that, all see it
TOLD_SECONDS = 2.0  # at the latest by a heartbeat, if a session has locked its row


class Turn(msgspec.Struct):
    """A run, as long as its lease stood."""

    id: int
    run: str
    who: str
    claimed: float
    since: float
    until: float
    row: Row  # as it was inserted


def limited(history: History) -> Iterator[Breach]:
    for key, turns in _turns(history, "limit_key").items():
        moments = [(turn.since, 1, turn) for turn in turns] + [(turn.until, -1, turn) for turn in turns]
        count = 0
        for at, change, turn in sorted(moments, key=lambda moment: moment[:2]):
            count += change
            if change > 0 and turn.row.most and count > turn.row.most:
                what = f"run {turn.run} is number {count} of {key}, which has a limit of {turn.row.most}"
                yield Breach("P6", what, turn.id, at)


def rated(history: History) -> Iterator[Breach]:
    """No more than the rate in half of its time: between the admission of a run and its start some time passes."""
    for key, turns in _turns(history, "limit_key").items():
        for first, turn in zip(turns, turns[turns[0].row.rate or len(turns) :], strict=False):
            row, since = turn.row, first.since
            if not row.rate or not row.seconds or turn.since - since > row.seconds / 2:
                continue
            late = history.lag(since, turn.since) + turn.since - turn.claimed
            if turn.since - since + late < row.seconds / 2 and not history.touched(turn.who, since, turn.since):
                yield Breach("P6", f"run {turn.run} is one more of {key} than its rate allows", turn.id, turn.since)


def ordered(history: History) -> Iterator[Breach]:
    for key, turns in _turns(history, "order_key").items():
        for first, second in itertools.pairwise(turns):
            if second.since < first.until:
                yield Breach("P6", f"runs {first.run} and {second.run} of {key} at once", second.id, second.since)
        for turn in turns:
            for other in {other.id for other in turns if other.id < turn.id}:
                if _in_front(history, other, turn.since):
                    yield Breach("P6", f"run {turn.run} of {key} before task {other}", turn.id, turn.since)


def after(history: History) -> Iterator[Breach]:
    for id, life in _lives(history):
        ends = {needed: _end_of(history, needed, life[0].seq) for needed in life[0].after if needed in history.rows_of}
        # What was retried may have been looked at before that, or after.
        retried = any(row.op == "X" for needed in ends for row in history.rows_of[needed])
        bad = [needed for needed, (_, state) in ends.items() if state not in ("", "done")]
        for run in history.runs_of[id]:
            lease = lease_of(history, run)
            if lease is None or lease.claim not in life:
                continue
            for needed, (end, _) in ends.items():
                if end is None or end.committed > run.started:
                    yield Breach("P8", f"run {run.run} began before task {needed} had ended", id, run.started)
            if bad and life[0].on_dead != "run" and not retried:
                yield Breach("P8", f"run {run.run} began, though task {bad[0]} wasn't done", id, run.started)
        last = life[-1]
        if last.op == "F" and last.note.startswith("cancelled") and last.who != CONDUCTOR:
            if life[0].on_dead == "run":
                yield Breach("P8", "cancelled, and was to run all the same", id, last.at)
            elif not bad and not retried:
                yield Breach("P8", "cancelled, and all that it came after are done", id, last.at)
        told = max((end.committed if end else float("inf") for end, _ in ends.values()), default=0.0)
        for row, following in itertools.pairwise(life):
            late = following.committed - told
            if retried or not row.withheld or not row.at < told < following.at - TOLD_SECONDS:
                continue
            allowed = TOLD_SECONDS + LAG_TIMES * history.lag(told, following.at)
            if late > allowed and told > history.healed(following.at):
                yield Breach("P8", f"told {late:.1f} s after the last one's end", id, told)


def _lives(history: History) -> Iterator[tuple[int, list[Row]]]:
    """When tasks that come after others lived: from their insertion until they have ended, and again if they were
    retried."""
    for id, rows in history.rows_of.items():
        births = [n for n, row in enumerate(rows) if row.op == "I"]
        for birth, following in itertools.pairwise([*births, len(rows)]):
            if rows[birth].after:
                yield id, [row for row in rows[birth:following] if row.op != "X"]


def _end_of(history: History, id: int, seq: int) -> tuple[Row | None, str]:
    """The first end, and its state, that counts for a task that was inserted then: the last one before, if it hadn't
    been retried by then, or else the next."""
    end, state = None, ""
    for row in history.rows_of[id]:
        if row.seq > seq and end is not None and row.op != "F":
            break
        if row.op in "ID":
            end, state = (row, "") if row.op == "D" else (None, "")
        elif row.op == "F":
            state = row.note.split(" ", 1)[0]
    return end, state


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
                row = history.rows_of[id][0]
                found[key].append(Turn(id, run.run, run.who, lease.claim.at, run.started, until, row))
    for turns in found.values():
        turns.sort(key=lambda turn: turn.since)
    return found


CHECKS = (limited, rated, ordered, after)
