"""Marks: where a claim may begin to read, so that it doesn't step over the dead. Pure: told times, keeps none.

While anybody holds an old snapshot (a backup, an analytics query) vacuum can't remove the index entries of tasks that
are gone, and a claim that begins at the front of its index steps over all of them, 60 ns each: after 300,000 tasks
18 ms, five times what the claim itself takes. So a worker remembers, by queue and priority, the highest id it has
claimed a moment ago, and begins there.

What lies before a mark isn't seen: tasks whose transactions stayed open for long, that are ready again, or of a
priority that wasn't there before. That is for claims from the front, which look at everything:

    * under a backlog one every 0.1 s, or so rarely that they take 3 % of the time: no slot waits for what they find;
    * without a backlog every claim is one, unless the last was slow and a mark helps. Then the marks answer first, and
      a claim from the front is owed, after 8 times as long as the last one took.

So a mark is a hint: it decides what is found first, and nothing is found by marks alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .job import Job, Onward

LAG_SECONDS = 0.025  # a mark is from 1 to 2 of these old: ids become visible in about their order, not quite
BUSY_SECONDS, BUSY_TIMES = 0.1, 32  # from one claim from the front to the next, under a backlog: so long, and so many
OWED_TIMES = 8  # times as long as it took; and this many when there is none
SLOW_SECONDS, SLOW_EACH = 0.003, 0.000_02  # a claim that takes longer, and as much for each task, is slow
PATIENCE_SECONDS = 5.0  # until marks that didn't help may be tried again
LEVELS = 100  # more priorities and queues than that aren't kept apart: claims are from the front

Level = tuple[str, int]  # queue, priority


class Usual:
    """How long something takes: the shorter time of the last two. One that waited for somebody's lock, or for a server
    that was frozen, says nothing of the next."""

    def __init__(self) -> None:
        self._last = 0.0

    def of(self, seconds: float) -> float:
        """Now that it took so long."""
        usual, self._last = min(seconds, self._last), seconds
        return usual


class Marks:
    """Asked before each claim where to begin, and told after it what came."""

    def __init__(self) -> None:
        self._highest: dict[Level, int] = {}  # of this LAG_SECONDS
        self._recent: dict[Level, int] = {}  # of the one before
        self._marks: dict[Level, int] = {}  # of all before that
        self._turned = -math.inf
        self._onward: Onward | None = None
        self._front_at = -math.inf  # when the last claim from the front was made,
        self._front_usual = Usual()
        self._front_seconds = 0.0  # how long it takes,
        self._slow = False  # and whether that is long
        self._not_before = -math.inf
        self.owed_at = math.inf  # when to claim from the front even if nothing happens

    def onward(self, now: float, backlog: bool) -> Onward | None:
        """Where to begin; None: at the front."""
        if backlog:
            rest = max(BUSY_SECONDS, BUSY_TIMES * self._front_seconds)
        else:
            rest = OWED_TIMES * self._front_seconds if self._slow else 0.0
        return self._onward if now < self._front_at + rest else None

    def claimed(self, jobs: Sequence[Job], onward: bool, seconds: float, now: float) -> None:
        """`jobs` came at `now`, of a claim that took so long."""
        for job in jobs:  # as `claim` sorts them: the last one of a level has its highest id
            self._highest[job.queue, job.priority] = job.id
        if not onward:
            self._front_at, self._front_seconds = now, self._front_usual.of(seconds)
            self._slow = self._front_seconds > SLOW_SECONDS + SLOW_EACH * len(jobs) and now >= self._not_before
            self.owed_at = math.inf
        else:
            if self._slow and seconds * 2 > self._front_seconds:
                self._slow = False  # something else takes the time
                self._not_before = now + PATIENCE_SECONDS
            self.owed_at = self._front_at + OWED_TIMES * self._front_seconds if self._slow else now
        if now - self._turned >= LAG_SECONDS:
            self._turned = now
            self._marks = _later(self._marks, self._recent)
            self._recent, self._highest = self._highest, {}
            self._onward = _beside(self._marks) if 0 < len(self._marks) <= LEVELS else None
            if len(self._marks) > LEVELS:
                self._marks = {}


def _later(old: Mapping[Level, int], new: Mapping[Level, int]) -> dict[Level, int]:
    return {level: max(new.get(level, 0), old.get(level, 0)) for level in {*old, *new}}


def _beside(marks: Mapping[Level, int]) -> Onward:
    levels = sorted(marks, key=lambda level: -level[1])
    return Onward(
        [queue for queue, _ in levels], [priority for _, priority in levels], [marks[level] for level in levels]
    )
