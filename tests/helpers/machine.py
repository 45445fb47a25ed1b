"""The machine that the tests run on, and how a test with a time in it stays right on a busy one.

* What a test waits for has a limit that only a failing test reaches: `limit()`. The busier the machine, the longer.
* A promise with a bound in time is checked beside a `Probe`: it repeats a bare wake-up, without notifyq, and how late
  that was in the same moments is added to the bound.
* All else is checked by order and by counts, never by a clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio

from notifyq.database import connection

LIMIT_SECONDS = 60.0
MOST_TIMES_BUSY = 10.0  # so that a limit ends a test before pytest's own does, which ends the whole process
PAUSE_SECONDS = 0.02
STEPS = 5  # of a task's way: insert, notify, claim, start, settle
STEPS_PROBED = 3  # of a bare wake-up: pause, notify, work


def times_busy() -> float:
    """How many processes want each processor, in the last minute or in this moment; at least 1."""
    try:
        wanted = os.getloadavg()[0]
    except OSError:
        return 1.0
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            wanted = max(wanted, float(file.read().split()[3].partition("/")[0]))
    except OSError:
        pass  # not Linux
    return min(max(wanted / (os.cpu_count() or 1), 1.0), MOST_TIMES_BUSY)


def limit(seconds: float = LIMIT_SECONDS) -> float:
    """How many seconds something that comes at once, or never, may take: on an idle machine as many as given."""
    return seconds * times_busy()


class Probe:
    """How late bare wake-ups are: a pause, and a NOTIFY to a connection of this process, which then works a little."""

    def __init__(self) -> None:
        self._rounds: list[tuple[float, float]] = []  # when each ended, and how late that was
        self._begun = time.monotonic()  # the round under way

    def late(self, since: float = 0.0) -> float:
        """What the machine may have added to a task's way. `since` is a time of time.monotonic()."""
        under_way = time.monotonic() - self._begun - PAUSE_SECONDS
        return STEPS * max([0.0, under_way, *(late for ended, late in self._rounds if ended >= since)])

    def lost(self, since: float) -> float:
        """The same for many tasks, each of which waits for the one before it: all delays add up."""
        return sum(late for ended, late in self._rounds if ended >= since) * STEPS / STEPS_PROBED + self.late(since)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """The block takes less than `seconds`, and what the machine may have added."""
        began = time.monotonic()
        with anyio.fail_after(limit()):
            yield
        took, late = time.monotonic() - began, self.late(began)
        assert took < seconds + late, f"it took {took:.3f} s, not {seconds} s; of the machine are {late:.3f} s"

    async def run(self, teller: Any, listener: Any) -> None:
        heard = anyio.Event()
        await listener.add_listener("probe", lambda *_: heard.set())
        while True:
            self._begun = time.monotonic()
            await anyio.sleep(PAUSE_SECONDS)
            heard = anyio.Event()
            await teller.execute("NOTIFY probe")
            await heard.wait()
            await listener.fetchval("SELECT count(*) FROM generate_series(1, 20000)")
            ended = time.monotonic()
            self._rounds.append((ended, ended - self._begun - PAUSE_SECONDS))


@asynccontextmanager
async def probing(dsn: str) -> AsyncIterator[Probe]:
    """A probe that runs inside the block, in this process and on this server."""
    teller, listener = [await connection.connect(dsn, role="probe") for _ in range(2)]
    probe = Probe()
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(probe.run, teller, listener)
            yield probe
            group.cancel_scope.cancel()
    finally:
        teller.terminate()
        listener.terminate()
