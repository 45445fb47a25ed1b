"""A pause between two tries, which doubles each time. Pure but for the clock it reads."""

from __future__ import annotations

import random
import time


class Pause:
    """Seconds until the next try: `least` at first, twice as long after each further failure, up to `most`."""

    __slots__ = ("due", "least", "most", "seconds")

    def __init__(self, least: float, most: float) -> None:
        self.least = least
        self.most = most
        self.seconds = 0.0
        self.due = 0.0  # when the pause is over, by time.monotonic()

    def lengthen(self) -> float:
        """Begin the next pause. Returns its length."""
        self.seconds = min(self.most, max(self.least, 2 * self.seconds))
        self.due = time.monotonic() + self.seconds
        return self.seconds

    def jittered(self) -> float:
        """Begin the next pause. Returns 50 to 100 % of its length, so that clients don't all come back at once."""
        return random.uniform(0.5, 1.0) * self.lengthen()

    def reset(self) -> None:
        """A try has succeeded: the next pause is the shortest one."""
        self.seconds = 0.0
