"""Room: how much may be claimed now.

Free slots, and up to 10 ms of work ahead, as measured by itself; so slow handlers have nothing claimed ahead that
another worker could run now, and empty ones are claimed by the hundreds.

Plain handlers need a thread each, of which there are fewer than slots. A claim for no more tasks than fit into the free
threads, whatever their types are, is an ordinary one. It mostly is enough: few tasks are ready at the same time. If it
comes full, the next one asks for twice as many, as long as no plain handler's task is among them. Such a claim may meet
more plain tasks than there are threads. So its statement (claim_fitting.sql) counts them, and leaves those that don't
fit. It costs 20 % more than an ordinary claim.

So no plain task is claimed for want of a thread and handed back. When one is left, nothing more is claimed from its
queue until a thread is free, as tasks start in their order; but for a look now and then, since another worker may have
taken the task, and async tasks may come next.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence, Set

from ..config import WorkerConfig
from .job import Job, Threads
from .slots import Slots

AHEAD_SECONDS = 0.010  # of work to claim ahead of the slots
AHEAD_MOST = 500  # tasks of it
ASKED_LEAST = 8  # tasks of a queue, where no thread is free
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

    def __init__(self, config: WorkerConfig, slots: Slots) -> None:
        self._config = config
        self._slots = slots
        self._rate = Rate()
        self._plain_rate = Rate()
        self._plain_ahead = 0  # tasks of plain handlers that may wait for a thread
        self._trust = dict.fromkeys(config.queues, 1)  # how many may be asked for even without a free thread
        # Queues whose next task seems to need a thread, while none is free: how long to leave each alone, until when.
        self._no_thread: dict[str, tuple[float, float]] = {}
        self.queues = list(config.queues)  # each in turn is the first to be served

    def now(self, now: float, paused: Set[str], unsettled: int) -> tuple[dict[str, int], int]:
        """By queue, and in all. None in a paused queue, but some in all, if that is all that keeps it from claiming: to
        hear of it when one is resumed."""
        slots = self._slots
        ahead = self._rate.ahead(now, slots.ended)
        held = len(slots.held)
        room = self._config.concurrency + ahead - held
        if room <= 0 or (len(slots.waiting) > ahead // 2 and slots.waiting) or unsettled > 4 * (held + room):
            return {}, 0
        plain_room = 0
        if slots.plain:
            self._plain_ahead = self._plain_rate.ahead(now, slots.plain_ended)
            spare = self._spare(slots.plain_held)
            plain_room = spare * max(slots.plain.values()) + slots.seats
            if spare > 0:
                self._no_thread.clear()
        rooms: dict[str, int] = {}
        for queue in self.queues:
            if queue in paused or self.left_alone(queue, now):
                continue
            limit = self._config.queues[queue]
            free = room if limit is None else min(room, limit - slots.by_queue[queue])
            if slots.plain:
                free = min(free, max(plain_room or ASKED_LEAST, self._trust[queue]))
            if free > 0:
                rooms[queue] = free
        if len(rooms) > 1:
            self.queues.append(self.queues.pop(0))
        if not rooms and any(queue in paused for queue in self.queues):
            return {}, room
        if slots.plain and all(free <= plain_room for free in rooms.values()):
            room = min(room, plain_room)
        return rooms, min(room, sum(rooms.values()))

    def is_bounded(self, queue: str) -> bool:
        """Whether a claim may leave tasks in it although there are slots."""
        return bool(self._slots.plain) or self._config.queues[queue] is not None

    # Threads.

    def _held(self, jobs: Sequence[Job]) -> Counter[str]:
        """How many tasks of each plain handler are held, with `jobs`, which aren't fed yet."""
        held = self._slots.plain_held.copy()
        for job in jobs:
            if job.type in self._slots.plain:
                held[job.type] += 1
        return held

    def _spare(self, held: Mapping[str, int]) -> int:
        """How many threads are free, or will be when the tasks that may wait for one get to it."""
        ahead = self._plain_ahead // max(self._slots.plain.values())
        return max(0, self._config.most_threads + ahead - self._slots.threads_for(held))

    def fitting(self, jobs: Sequence[Job] = ()) -> int:
        """How many more tasks fit beside `jobs`, whatever their types are."""
        plain = self._slots.plain
        if not plain:
            return TRUST_MOST
        held = self._held(jobs)
        spare = self._spare(held)
        if max(plain.values()) == 1:
            return spare
        # One more thread than is free would be opened by that many tasks at least: the first of a type after those that
        # fit into its last thread, the next one after as many as share a thread.
        opens = (cost for type, share in plain.items() for cost in (-held[type] % share + 1, *[share] * spare))
        return sum(heapq.nsmallest(spare + 1, opens)) - 1

    def fits(self, type: str) -> bool:
        """Whether one more task of that type does."""
        share, held = self._slots.plain.get(type), self._slots.plain_held
        return share is None or held[type] % share > 0 or self._spare(held) > 0

    def threads(self, asked: int) -> Threads | None:
        """What a claim for so many has to count. None: nothing, as they fit, whatever their types are."""
        plain, held = self._slots.plain, self._slots.plain_held
        if asked <= self.fitting():
            return None
        return Threads(list(plain), list(plain.values()), [held[type] for type in plain], self._spare(held))

    def adoptable(self, types: Sequence[str], jobs: Sequence[Job], asked: int) -> list[tuple[list[str], int]]:
        """For which of these types, and how many tasks of them, there is room besides `jobs`."""
        plain = self._slots.plain
        if asked <= (fitting := self.fitting(jobs)):
            return [(list(types), asked)]
        parts = [([type for type in types if type not in plain], asked), (list(plain), fitting)]
        return [(types, most) for types, most in parts if types and most > 0]

    # Queues that are left alone.

    def left_alone(self, queue: str, now: float) -> float:
        """For how many seconds nothing more is claimed from it, as its next task seems to need a thread; 0: it is."""
        return max(0.0, self._no_thread.get(queue, (0.0, 0.0))[1] - now)

    def leave_alone(self, queue: str, now: float) -> None:
        wait, until = self._no_thread.get(queue, (0.0, 0.0))
        self._trust[queue] = 1
        if until <= now:
            wait = min(LOOK_MOST, max(LOOK_LEAST, 2 * wait))
            self._no_thread[queue] = wait, now + wait

    def go_on(self, queue: str) -> None:
        """Its next task needs no thread, or it has none."""
        self._no_thread.pop(queue, None)

    def claimed(
        self, jobs: Sequence[Job], rooms: Mapping[str, int], room: int, threads: Threads | None, now: float
    ) -> list[str]:
        """`jobs` came, and are fed. Returns the queues in which tasks may be left that didn't fit into `threads`."""
        plain = self._slots.plain
        if not plain:
            return []
        taken = Counter(job.queue for job in jobs)
        mixed = {job.queue for job in jobs if job.type in plain}
        for queue, asked in rooms.items():
            if queue in mixed:
                self._trust[queue] = 1
                if taken[queue] >= asked and not self.fitting():
                    self.leave_alone(queue, now)  # its next task is probably another
            elif taken[queue] >= asked:
                self._trust[queue] = min(TRUST_MOST, 2 * asked)
            elif len(jobs) < room:
                self._trust[queue] = 1
        unfit: list[str] = []
        if threads is not None and threads.opened(jobs) >= threads.spare:
            unfit = [queue for queue, asked in rooms.items() if taken[queue] < asked]
        for queue in rooms.keys() - mixed - {*unfit}:
            self.go_on(queue)
        return unfit
