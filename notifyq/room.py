"""Room: how much may be claimed now, and how much of a claim may stay.

Free slots, and up to 10 ms of work ahead, as measured by itself; so slow handlers have nothing claimed ahead that
another worker could run now, and empty ones are claimed by the hundreds.

Plain handlers need a thread each, of which there are fewer than slots. But a claim doesn't know types: that would
cost each claim, and each row that it steps over. So what a claim has taken beyond the threads goes back at once, to
other workers. Until a thread is free nothing more is claimed from its queue, as its tasks start in their order; but for
a look now and then, since another worker may have taken what needs a thread, and async tasks may come next.
How many may be claimed beyond the threads grows with each claim from the queue that had no plain handler's task in
it, from 1 up, and is 1 again after one that had. So little goes back, and a queue without such tasks has all the room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from .config import WorkerConfig
from .run import Runners
from .store import Job

AHEAD_SECONDS = 0.010  # of work to claim ahead of the slots
AHEAD_MOST = 500  # tasks of it
TRUST_MOST = 1_000_000
LOOK_LEAST, LOOK_MOST = 0.1, 5.0  # seconds until a queue whose next task seems to need a thread is tried; doubles


class Rate:
    """How much ends in a second."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._since, self._finished = 0.0, 0

    def ahead(self, now: float, finished: int) -> int:
        """As much as ends in AHEAD_SECONDS. `finished`: since the beginning."""
        if now - self._since > AHEAD_SECONDS:
            rate = (finished - self._finished) / (now - self._since)
            self._rate = rate if rate < self._rate / 4 else (self._rate + rate) / 2
            self._since, self._finished = now, finished
        return min(AHEAD_MOST, int(self._rate * AHEAD_SECONDS))


class Room:
    """A worker's, as its runners have it."""

    def __init__(self, config: WorkerConfig, runners: Runners) -> None:
        self._config = config
        self._runners = runners
        self._rate = Rate()
        self._plain_rate = Rate()
        self._plain_ahead = 0  # tasks of plain handlers that may wait for a thread
        self._trust = dict.fromkeys(config.queues, 1)  # how many may be claimed even without a spare thread
        # Queues whose next task seems to need a thread, while none is free: how long to leave each alone, until when.
        self._no_thread: dict[str, tuple[float, float]] = {}
        self.queues = list(config.queues)  # each in turn is the first to be served

    def now(self, now: float, paused: Set[str], unsettled: int) -> tuple[dict[str, int], int]:
        """By queue, and in all. None in a paused queue, but some in all, if that is all that keeps it from claiming: to
        hear of it when one is resumed."""
        runners = self._runners
        ahead = self._rate.ahead(now, runners.finished)
        held = len(runners.held)
        room = self._config.concurrency + ahead - held
        if room <= 0 or (runners.waiting > ahead // 2 and runners.waiting > 0) or unsettled > 4 * (held + room):
            return {}, 0
        plain_room = 0
        if runners.plain:
            self._plain_ahead = self._plain_rate.ahead(now, runners.plain_finished)
            spare = self._spare()
            plain_room = spare * max(runners.plain.values()) + runners.seats
            if spare > 0:
                self._no_thread.clear()
        rooms: dict[str, int] = {}
        for queue in self.queues:
            if queue in paused or self.left_alone(queue, now):
                continue
            limit = self._config.queues[queue]
            free = room if limit is None else min(room, limit - runners.by_queue[queue])
            if runners.plain:
                free = min(free, max(plain_room, self._trust[queue]))
            if free > 0:
                rooms[queue] = free
        if len(rooms) > 1:
            self.queues.append(self.queues.pop(0))
        if not rooms and any(queue in paused for queue in self.queues):
            return {}, room
        return rooms, min(room, sum(rooms.values()))

    def _spare(self) -> int:
        """How many threads are free now, or will be when what may wait for one gets to it."""
        runners = self._runners
        share = max(runners.plain.values())
        return self._config.most_threads + self._plain_ahead // share - runners.threads_needed

    def is_bounded(self, queue: str) -> bool:
        """Whether a claim may leave tasks in it although there are slots."""
        return bool(self._runners.plain) or self._config.queues[queue] is not None

    def left_alone(self, queue: str, now: float) -> float:
        """For how many seconds nothing more is claimed from it, as its next task seems to need a thread; 0: it is."""
        return max(0.0, self._no_thread.get(queue, (0.0, 0.0))[1] - now)

    def _leave_alone(self, queue: str, now: float) -> None:
        wait, until = self._no_thread.get(queue, (0.0, 0.0))
        if until <= now:
            wait = min(LOOK_MOST, max(LOOK_LEAST, 2 * wait))
            self._no_thread[queue] = wait, now + wait

    def divide(self, jobs: Sequence[Job], rooms: Mapping[str, int], now: float) -> tuple[list[Job], list[Job]]:
        """What of a claim stays, and what is more than there are threads for. `rooms` is what was asked for."""
        plain = self._runners.plain
        if not plain:
            return list(jobs), []
        stay: list[Job] = []
        surplus: list[Job] = []
        # Asked anew: threads may have become free while the claim was under way.
        spare, held = self._spare(), self._runners.plain_held.copy()
        taken = Counter(job.queue for job in jobs)
        mixed: set[str] = set()  # queues that had such tasks
        for job in jobs:
            if (share := plain.get(job.type)) is not None:
                mixed.add(job.queue)
                if held[job.type] % share == 0:  # it needs another thread
                    if spare <= 0:
                        surplus.append(job)
                        self._leave_alone(job.queue, now)
                        continue
                    spare -= 1
                held[job.type] += 1
            stay.append(job)
        for queue in rooms.keys() - mixed:
            self._no_thread.pop(queue, None)
        full = spare <= 0 and not any(count % plain[type] for type, count in held.items())
        for queue, count in taken.items():
            if queue not in mixed:
                self._trust[queue] = min(TRUST_MOST, 2 * self._trust[queue])
                continue
            self._trust[queue] = 1
            if full and count >= rooms.get(queue, 0):
                self._leave_alone(queue, now)  # what comes next in it is probably another
        return stay, surplus
