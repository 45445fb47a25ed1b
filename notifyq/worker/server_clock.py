"""What time it is by the server's clock, as far as that can be trusted: it may be stepped by hours."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

from .. import log

logger = log.logger("notifyq.maintenance")

STEP_SECONDS = 60.0  # two clocks that are further apart were not set at the same time


class ServerClock:
    """The server's time when the worker started, and the time that has passed since by the worker's own clock."""

    def __init__(self) -> None:
        self._then: datetime | None = None  # the server's time,
        self._read_at = 0.0  # and the time.monotonic() at which it was read
        self._is_ahead = False  # it was stepped ahead since, and that was logged

    def start(self, said: datetime) -> None:
        self._then, self._read_at = said, time.monotonic()

    def at_most(self, said: datetime) -> datetime:
        """The latest time that it can be, if the server's clock says `said`.

        A step ahead isn't trusted, as history would be pruned too early. A step back is.
        """
        if self._then is None:
            self.start(said)
            return said
        trusted = self._then + timedelta(seconds=time.monotonic() - self._read_at)
        step = (said - trusted).total_seconds()
        if step < -STEP_SECONDS:
            self.start(said)
            logger.warning("the server's clock was set back by %.0f s", -step)
            trusted = said
        elif step > STEP_SECONDS and not self._is_ahead:
            logger.warning(
                "the server's clock went ahead by %.0f s: history is pruned by the time that passed here, until this "
                "worker is restarted", step,
            )  # fmt: skip
        self._is_ahead = step > STEP_SECONDS
        return trusted + timedelta(seconds=STEP_SECONDS)
