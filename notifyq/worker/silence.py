"""Which other workers have stopped sending heartbeats, and for how long. Pure: it reads no clock.

A worker is silent while the time of its last heartbeat stays the same, whatever that time is. This process's own clock
measures how long, since the server's clock may be stepped. rescue.sql says what follows from silence: after 2 s a
worker without any session is dead, and after the length of its lease it is dead in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SILENT_SECONDS = 2.0  # until a rescuer checks whether the worker has a session left; rescue.sql has the same 2 s
GRACE_SECONDS = 4.0  # how long other workers may take to come back after an outage: more than their longest pause


class Silent(NamedTuple):
    """A worker that has sent no heartbeat for `seconds`; `seen` is the time of its last one, as a number."""

    worker: int
    seen: float
    seconds: float


class SilenceWatch:
    """The last heartbeats of the other workers.

    If it hasn't looked for GRACE_SECONDS, since this process was frozen or cut off, it knows nothing of that time and
    starts anew.
    """

    def __init__(self) -> None:
        # By worker: its last heartbeat, and since when that is the last.
        self._last: dict[int, tuple[float, float]] = {}
        self._looked_at = -math.inf
        self.due = math.inf  # when the first worker will have been silent for SILENT_SECONDS

    def look(self, workers: Sequence[int], seen: Sequence[float], now: float) -> list[Silent]:
        """The silent workers, longest first. `now` is a time of time.monotonic()."""
        known = self._last if now - self._looked_at <= GRACE_SECONDS else {}
        self._looked_at = now
        self._last = {}
        self.due = math.inf
        silent: list[Silent] = []
        for worker, at in zip(workers, seen, strict=True):
            before, since = known.get(worker, (math.nan, now))
            if before != at:
                since = now
            self._last[worker] = at, since
            if now - since >= SILENT_SECONDS:
                silent.append(Silent(worker, at, now - since))
            elif now > since:
                self.due = min(self.due, since + SILENT_SECONDS)
        silent.sort(key=lambda one: -one.seconds)
        return silent
