"""Whether the worker's event loop still runs, and what it last said of itself. The heartbeat's thread asks it.

About every 0.4 s the thread asks, and the loop answers with a snapshot of what runs. A handler that waits or computes
without `await` keeps the loop from answering. Meanwhile the heartbeat sends what the last snapshot said.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

from .. import log
from .claim import Claimer
from .job import Job
from .pipe import Alive
from .runners import Runners

logger = log.logger("notifyq.heartbeat")

LONG_SECONDS = 0.8  # a handler that is seen in two answers so far apart runs long
BLOCKED_SECONDS = 0.8  # a loop that gives no answer for so long counts as blocked
OTHERS_COMPUTE = 0.1  # other threads computed for at least this share of the time: other processes may load the machine
AFTERMATH_SECONDS = 2.0  # how long after a block statements may still fail because of it


class LoopWatch:
    """Made on the worker's loop. The comments say which thread writes what. Each assignment is atomic."""

    def __init__(self, runners: Runners, claimer: Claimer, worker: Alive) -> None:
        self._runners = runners
        self._claimer = claimer
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        cpu_clock = getattr(time, "pthread_getcpuclockid", None)
        self._cpu_clock: int | None = cpu_clock(threading.get_ident()) if cpu_clock else None  # of the loop's thread
        # The loop writes, and reads.
        self._first_seen: dict[Job, float] = {}  # of `held`: when an answer had each for the first time
        # The loop writes, the thread reads.
        self.held: list[Job] = []
        self.ids: frozenset[int] = frozenset()  # of `held`
        self.status = ""  # what is degraded, in words
        self.asleep = False  # whether the claimer sleeps at the bell
        self.runs_long = False
        self.seen_at = time.monotonic()  # the last answer
        self._cpu = (0.0, 0.0)  # seconds that the process, and the loop's thread, had computed at the last answer
        # The thread writes, the loop reads.
        self._asked_at = 0.0  # the oldest question without an answer
        self.blocked = False
        # Both write.
        self._blocked_until = -math.inf

    # On the worker's loop.

    def _answer(self) -> None:
        self.held = held = [*self._runners.held.values()]
        self.ids = frozenset(job.id for job in held)
        now = time.monotonic()
        self._first_seen = {job: self._first_seen.get(job, now) for job in held}
        self.runs_long = bool(held) and min(self._first_seen.values()) <= now - LONG_SECONDS
        self.status = self._worker.trouble
        self.asleep = self._claimer.is_asleep
        now = time.monotonic()
        if self.seen_at < self._asked_at < now - BLOCKED_SECONDS:
            self._blocked_until = now
        self.seen_at = now
        self._cpu = time.process_time(), time.thread_time()

    @property
    def was_blocked(self) -> bool:
        """Whether what fails now may fail because the loop didn't run: a statement whose answer it didn't read in time,
        or the connection of the bell, whose backend the thread has ended."""
        now = time.monotonic()
        if self.blocked or now < self._blocked_until + AFTERMATH_SECONDS:
            return True
        return self.seen_at < self._asked_at < now - BLOCKED_SECONDS

    # In the heartbeat's thread.

    def ask(self) -> None:
        if self._asked_at <= self.seen_at:  # the last question was answered
            self._asked_at = time.monotonic()
        self.call(self._answer)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function` on the worker's loop."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the loop is closed: nothing there needs to know any more

    @property
    def is_overdue(self) -> bool:
        """Whether the loop hasn't answered for so long that it counts as blocked."""
        return time.monotonic() - self.seen_at >= BLOCKED_SECONDS

    def log_cause(self) -> None:
        """Name the handler that blocks the loop, as far as that can be seen."""
        handler = self._runners.name_handler(asyncio.current_task(self._loop))
        computing = self._runners.computing
        if computing and (handler is None or self._others_compute()):
            logger.warning(
                "the event loop gets no time: plain handlers compute in threads, which share one lock (the GIL); run"
                " fewer at once (--threads), and more processes (--processes)",
                extra={"fields": {"handlers": computing[:20]}},
            )
        else:
            logger.warning(
                "the event loop is blocked: a handler waits or computes without `await`;"
                " a wait can move to a plain def, which runs in a thread, and a computation to a process",
                extra={"fields": {"handler": handler or "unknown"}},
            )

    def note_end(self) -> None:
        """The loop isn't blocked any more, or the thread stops watching it."""
        self._blocked_until = time.monotonic()
        self.blocked = False

    def _others_compute(self) -> bool:
        """Whether other threads have used most of this process's time since the last answer. Then the task on the loop
        waits for the interpreter's lock, wherever it is, and blocks nothing itself."""
        if self._cpu_clock is None:
            return False
        process_before, loop_before = self._cpu
        process, loop = time.process_time() - process_before, time.clock_gettime(self._cpu_clock) - loop_before
        return process > OTHERS_COMPUTE * (time.monotonic() - self.seen_at) and process > 3 * loop
