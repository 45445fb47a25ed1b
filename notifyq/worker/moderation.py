"""Moderation: when a worker stays awake and polls instead of sleeping at the bell. Pure: it reads no clock.

A network driver switches from interrupts to polling under load, and so does a worker. A ring costs an enqueuer a commit
of its own, since a transaction that notifies doesn't share its flush. So under a burst the worker stays awake and
polls, and no enqueuer rings. To fall asleep at each quiet moment would gain nothing: a fast worker has one after each
task."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 0.020  # two arrivals within it may be the beginning of a burst
BURST = 5  # so many arrivals within the window keep the worker awake: 250 a second
PATIENCE_SECONDS = 1.0  # after two arrivals that weren't a burst, until two wake the worker up again


class Moderation:
    """Decides it by the arrivals of tasks in the last 20 ms.

    A lone arrival is no burst: the worker stays asleep, so that the next one rings too.

    Two arrivals within the window may begin a burst, so the worker wakes up and polls. If ringing held the enqueuers
    up, tasks now come in numbers, and it stays awake for as long as they do. If not, it goes back to sleep and doesn't
    try again for a second: at 100 tasks a second, ringing is cheaper than polling.
    """

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()
        self._in_window = 0
        self._awake_since: float | None = None
        self._not_before = 0.0

    def arrived(self, count: int, now: float) -> None:
        """`count` tasks were claimed at `now` (seconds)."""
        if count:
            self._arrivals.append((now, count))
            self._in_window += count
        self._forget(now)

    def is_awake(self, now: float) -> bool:
        """Whether the worker should poll now. Changes nothing."""
        count = self._in_window
        for at, arrived in self._arrivals:
            if at >= now - WINDOW_SECONDS:
                break
            count -= arrived
        if self._awake_since is None:
            return count >= 2 and (now >= self._not_before or count >= 2 * BURST)
        return now - self._awake_since < WINDOW_SECONDS or count >= BURST

    def update(self, now: float) -> bool:
        """Wake up or fall asleep, as `is_awake` says, which it returns."""
        self._forget(now)
        awake = self.is_awake(now)
        if not awake and self._awake_since is not None:
            if now - self._awake_since < 2 * WINDOW_SECONDS:
                self._not_before = now + PATIENCE_SECONDS
            self._awake_since = None
        elif awake and self._awake_since is None:
            self._awake_since = now
        return awake

    def gap(self) -> float:
        """Seconds until the next claim, while awake."""
        return 0.001 if self._in_window >= 4 * BURST else 0.002

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] < now - WINDOW_SECONDS:
            self._in_window -= self._arrivals.popleft()[1]
