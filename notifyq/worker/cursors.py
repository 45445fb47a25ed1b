"""Cursors: where a claim begins to read, so that it steps over no dead index entries. Pure: it asks no clock.

While a session holds an old snapshot (a backup, an analytics query), vacuum can't remove the index entries of tasks
that are gone. A claim that begins at the head of its index steps over all of them, at 60 ns each: after 300,000 tasks
18 ms, five times what the claim itself takes. So a worker remembers, by queue and priority, the highest id that it has
claimed a moment ago, and begins there.

A claim doesn't see the tasks before a cursor: those whose transactions stayed open for long, those that are ready
again, and those of a priority that wasn't there before. Claims from the head, which see all tasks, find them:

    * Under a backlog, one claim in 0.1 s is from the head, or one so rarely that they take 3 % of the time. No slot
      waits for what they find.
    * Without a backlog, every claim is from the head, unless the last one was slow and a cursor helps. Then a claim
      from the cursors answers first. One from the head follows, after 8 times as long as the last one took.

So a cursor is a hint: it decides what is found first, and no task is found by cursors alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

LAG_SECONDS = 0.025  # a cursor is 1 to 2 of these old, since ids become visible in nearly their order, but not quite
# From one claim from the head to the next, under a backlog: seconds, or times as long as one takes; the longer of both.
BUSY_SECONDS, BUSY_TIMES = 0.1, 32
HEAD_SCAN_TIMES = 8  # the same without a backlog: times as long as one takes
SLOW_SECONDS, SLOW_EACH = 0.003, 0.000_02  # a claim is slow if it takes longer than this, plus this for each task
PATIENCE_SECONDS = 5.0  # until cursors that didn't help may be tried again
LEVELS = 100  # pairs of queue and priority; with more of them, all claims are from the head

Level = tuple[str, int]  # queue, priority


class Claimed(Protocol):
    """What a cursor needs to know of a claimed task."""

    @property
    def id(self) -> int: ...
    @property
    def queue(self) -> str: ...
    @property
    def priority(self) -> int: ...


class FromCursor(NamedTuple):
    """Where a claim begins to read, as claim_from_cursor.sql wants it: parallel lists; the highest priority first."""

    queues: list[str]
    priorities: list[int]
    ids: list[int]


class Usual:
    """How long something usually takes: the shorter of its last two times. A time that includes waiting for a lock, or
    for a server that was frozen, says nothing about the next."""

    def __init__(self) -> None:
        self._last = 0.0

    def note(self, seconds: float) -> float:
        """Note that it took `seconds` now. Returns how long it usually takes."""
        usual, self._last = min(seconds, self._last), seconds
        return usual


class Cursors:
    """Asked before each claim where to begin, and told after it which tasks came."""

    def __init__(self) -> None:
        self._highest: dict[Level, int] = {}  # ids of the current LAG_SECONDS
        self._recent: dict[Level, int] = {}  # of the one before
        self._ids: dict[Level, int] = {}  # of all before that
        self._turned = -math.inf  # when ids were last moved from `_highest` to `_recent` to `_ids`
        self._from_cursor: FromCursor | None = None
        self._from_head_at = -math.inf  # when the last claim from the head was made
        self._usual = Usual()
        self._head_seconds = 0.0  # how long a claim from the head takes
        self._slow = False  # whether that is long, and a cursor helps
        self._not_before = -math.inf  # when `_slow` may be set again
        self.head_scan_at = math.inf  # when to claim from the head even if nothing happens

    def from_cursor(self, now: float, backlog: bool) -> FromCursor | None:
        """Where to begin; None: at the head."""
        if backlog:
            rest = max(BUSY_SECONDS, BUSY_TIMES * self._head_seconds)
        else:
            rest = HEAD_SCAN_TIMES * self._head_seconds if self._slow else 0.0
        return self._from_cursor if now < self._from_head_at + rest else None

    def claimed(self, tasks: Sequence[Claimed], from_cursor: bool, seconds: float, now: float) -> None:
        """`tasks` came at `now`, by a claim that took `seconds`."""
        for task in tasks:  # as `claim` sorts them: the last one of a level has its highest id
            self._highest[task.queue, task.priority] = task.id
        if not from_cursor:
            self._from_head_at, self._head_seconds = now, self._usual.note(seconds)
            self._slow = self._head_seconds > SLOW_SECONDS + SLOW_EACH * len(tasks) and now >= self._not_before
            self.head_scan_at = math.inf
        else:
            if self._slow and seconds * 2 > self._head_seconds:
                self._slow = False  # something else takes the time
                self._not_before = now + PATIENCE_SECONDS
            self.head_scan_at = self._from_head_at + HEAD_SCAN_TIMES * self._head_seconds if self._slow else now
        if now - self._turned >= LAG_SECONDS:
            self._turned = now
            self._ids = _merge_highest(self._ids, self._recent)
            self._recent, self._highest = self._highest, {}
            self._from_cursor = _in_parallel(self._ids) if 0 < len(self._ids) <= LEVELS else None
            if len(self._ids) > LEVELS:
                self._ids = {}


def _merge_highest(old: Mapping[Level, int], new: Mapping[Level, int]) -> dict[Level, int]:
    return {level: max(new.get(level, 0), old.get(level, 0)) for level in {*old, *new}}


def _in_parallel(ids: Mapping[Level, int]) -> FromCursor:
    levels = sorted(ids, key=lambda level: -level[1])
    return FromCursor(
        [queue for queue, _ in levels], [priority for _, priority in levels], [ids[level] for level in levels]
    )
