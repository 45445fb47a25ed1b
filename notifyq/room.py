"""Room: how much may be claimed now.

Free slots, and up to 10 ms of work ahead, as measured by itself; so slow handlers have nothing claimed ahead that
another worker could run now, and empty ones are claimed by the hundreds.
"""

from __future__ import annotations

from collections.abc import Set

from .config import WorkerConfig
from .run import Runners

AHEAD_SECONDS = 0.010  # of work to claim ahead of the slots
AHEAD_MOST = 500  # tasks of it


class Room:
    """A worker's, as its runners have it."""

    def __init__(self, config: WorkerConfig, runners: Runners) -> None:
        self._config = config
        self._runners = runners
        self._rate = 0.0  # attempts ended in a second
        self._rated: tuple[float, int] = (0.0, 0)
        self.queues = list(config.queues)  # each in turn is the first to be served

    def now(self, now: float, paused: Set[str], unsettled: int) -> tuple[dict[str, int], int]:
        """By queue, and in all. None in a paused queue, but some in all, if that is all that keeps it from claiming: to
        hear of it when one is resumed."""
        runners = self._runners
        since, finished = self._rated
        if now - since > AHEAD_SECONDS:
            rate = (runners.finished - finished) / (now - since)
            self._rate = rate if rate < self._rate / 4 else (self._rate + rate) / 2
            self._rated = (now, runners.finished)
        ahead = min(AHEAD_MOST, int(self._rate * AHEAD_SECONDS))
        held = len(runners.held)
        room = self._config.concurrency + ahead - held
        if room <= 0 or (runners.waiting > ahead // 2 and runners.waiting > 0) or unsettled > 4 * (held + room):
            return {}, 0
        rooms: dict[str, int] = {}
        for queue in self.queues:
            if queue in paused:
                continue
            limit = self._config.queues[queue]
            free = room if limit is None else min(room, limit - runners.by_queue[queue])
            if free > 0:
                rooms[queue] = free
        if len(rooms) > 1:
            self.queues.append(self.queues.pop(0))
        if not rooms and any(queue in paused for queue in self.queues):
            return {}, room
        return rooms, min(room, sum(rooms.values()))
