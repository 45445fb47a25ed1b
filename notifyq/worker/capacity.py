"""Capacity: how many tasks may be claimed now.

As many as there are free slots, and up to 10 ms of work ahead, by the rate that the worker measures. So a worker with
slow handlers claims nothing ahead that another worker could run now, and a worker with empty handlers claims by the
hundreds.

A plain handler needs a thread, and there are fewer threads than slots. A claim for no more tasks than fit into the free
threads, whatever their types are, is an ordinary one. It is mostly enough: few tasks are ready at the same time. If it
comes back full, the next one asks for twice as many, as long as no plain handler's task is among them. Such a claim may
meet more plain tasks than there are threads. So its statement (claim_fitting.sql) counts them, and leaves those that
don't fit. It costs 20 % more than an ordinary claim.

So no plain task is claimed without a thread for it and then handed back. When one is left in a queue, nothing more is
claimed from that queue until a thread is free, since tasks start in their order. Still the queue is tried now and then:
another worker may have taken that task, and an async task may come next.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from ..config import WorkerConfig
from .job import Job, Threads
from .settle import Settler
from .slots import Slots

AHEAD_SECONDS = 0.010  # of work to claim ahead of the slots
AHEAD_MOST = 500  # tasks of it
ASKED_LEAST = 8  # tasks asked for in a queue while no thread is free
TRUST_MOST = 1_000_000
LOOK_LEAST, LOOK_MOST = 0.1, 5.0  # seconds until a queue that was left for want of a thread is tried again; doubles


class Free(NamedTuple):
    """How many tasks may be claimed."""

    by_queue: dict[str, int]
    # Not 0 though by_queue is empty: all queues are paused, and the claimer must hear when one is resumed.
    total: int
    is_idle: bool = False  # as Capacity.is_idle


NOTHING = Free({}, 0)  # while something runs or waits to be written


class Rate:
    """How many attempts end in a second."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._since, self._finished = 0.0, 0

    def ahead(self, now: float, finished: int) -> int:
        """How many attempts end in AHEAD_SECONDS. `finished`: how many have ended since the worker began."""
        if now - self._since > AHEAD_SECONDS:
            rate = (finished - self._finished) / (now - self._since)
            self._rate = rate if rate < self._rate / 4 else (self._rate + rate) / 2
            self._since, self._finished = now, finished
        return min(AHEAD_MOST, int(self._rate * AHEAD_SECONDS))


class Capacity:
    """How many more tasks a worker's slots, threads and settler can take."""

    def __init__(self, config: WorkerConfig, slots: Slots, settler: Settler) -> None:
        self._config = config
        self._slots = slots
        self._settler = settler
        self._rate = Rate()
        self._plain_rate = Rate()
        self._plain_ahead = 0  # tasks of plain handlers that may wait for a thread
        self._trust = dict.fromkeys(config.queues, 1)  # how many may be asked for even without a free thread
        # Queues whose next task seems to need a thread, while none is free: how long to leave each alone, until when.
        self._no_thread: dict[str, tuple[float, float]] = {}
        self.queues = list(config.queues)  # each in turn is the first to be served

    @property
    def is_idle(self) -> bool:
        """Nothing runs, and all outcomes are written, but for those that PostgreSQL refuses and that are tried again
        later."""
        return not self._slots.held and not self._settler.pending

    def has_written(self, ids: Set[int]) -> bool:
        """None of these tasks runs, and all outcomes are written, with the same exception."""
        return not (ids & self._slots.held.keys()) and not self._settler.pending

    @property
    def concurrency(self) -> int:
        return self._config.concurrency

    @property
    def is_half_used(self) -> bool:
        slots, config = self._slots, self._config
        return len(slots.held) * 2 > config.concurrency or slots.threads_needed * 2 > config.most_threads

    def now(self, now: float, paused: Set[str]) -> Free:
        slots = self._slots
        is_idle = self.is_idle
        if self._settler.full:
            return Free({}, 0, is_idle)  # idle, if it is full of outcomes that PostgreSQL refuses
        ahead = self._rate.ahead(now, slots.ended)
        held = len(slots.held)
        free = self._config.concurrency + ahead - held
        if free <= 0 or (len(slots.waiting) > ahead // 2 and slots.waiting):
            return NOTHING
        if self._settler.pending > 4 * (held + free):
            return NOTHING
        plain_free = 0
        if slots.plain:
            self._plain_ahead = self._plain_rate.ahead(now, slots.plain_ended)
            spare = self._spare(slots.plain_held)
            plain_free = spare * max(slots.plain.values()) + slots.seats
            if spare > 0:
                self._no_thread.clear()
        by_queue: dict[str, int] = {}
        for queue in self.queues:
            if queue in paused or self.left_alone(queue, now):
                continue
            limit = self._config.queues[queue]
            most = free if limit is None else min(free, limit - slots.by_queue[queue])
            if slots.plain:
                most = min(most, max(plain_free or ASKED_LEAST, self._trust[queue]))
            if most > 0:
                by_queue[queue] = most
        if len(by_queue) > 1:
            self.queues.append(self.queues.pop(0))
        if not by_queue and any(queue in paused for queue in self.queues):
            return Free({}, free, is_idle)
        if slots.plain and all(most <= plain_free for most in by_queue.values()):
            free = min(free, plain_free)
        return Free(by_queue, min(free, sum(by_queue.values())), is_idle)

    def is_bounded(self, queue: str) -> bool:
        """Whether a claim may leave tasks in this queue although there are free slots."""
        return bool(self._slots.plain) or self._config.queues[queue] is not None

    # Threads.

    def _held(self, jobs: Sequence[Job]) -> Counter[str]:
        """How many tasks of each plain handler are held, together with `jobs`, which aren't fed to the runners yet."""
        held = self._slots.plain_held.copy()
        for job in jobs:
            if job.type in self._slots.plain:
                held[job.type] += 1
        return held

    def _spare(self, held: Mapping[str, int]) -> int:
        """How many threads are free now, or will be when tasks that are claimed ahead need them."""
        ahead = self._plain_ahead // max(self._slots.plain.values())
        return max(0, self._config.most_threads + ahead - self._slots.threads_for(held))

    def fitting(self, jobs: Sequence[Job] = ()) -> int:
        """How many more tasks fit besides `jobs`, whatever their types are."""
        plain = self._slots.plain
        if not plain:
            return TRUST_MOST
        held = self._held(jobs)
        spare = self._spare(held)
        if max(plain.values()) == 1:
            return spare
        # A type's first task that doesn't fit into its last thread opens one more. So does the first after each `share`
        # of tasks from there. The cheapest spare + 1 of these are the fewest tasks that need more than `spare` threads.
        opens = (cost for type, share in plain.items() for cost in (-held[type] % share + 1, *[share] * spare))
        return sum(heapq.nsmallest(spare + 1, opens)) - 1

    def fits(self, type: str) -> bool:
        """Whether one more task of that type fits."""
        share, held = self._slots.plain.get(type), self._slots.plain_held
        return share is None or held[type] % share > 0 or self._spare(held) > 0

    def threads(self, asked: int) -> Threads | None:
        """What a claim for `asked` tasks has to count. None: nothing, since they fit, whatever their types are."""
        plain, held = self._slots.plain, self._slots.plain_held
        if asked <= self.fitting():
            return None
        return Threads(list(plain), list(plain.values()), [held[type] for type in plain], self._spare(held))

    def by_types(self, types: Iterable[str], jobs: Sequence[Job], asked: int) -> list[tuple[list[str], int]]:
        """Which of these types may be asked for besides `jobs`, and how many tasks of them."""
        plain = self._slots.plain
        if asked <= (fitting := self.fitting(jobs)):
            return [(list(types), asked)]
        parts = [([type for type in types if type not in plain], asked), (list(plain), fitting)]
        return [(types, most) for types, most in parts if types and most > 0]

    # Queues that are left alone.

    def left_alone(self, queue: str, now: float) -> float:
        """For how many seconds this queue is left alone, since its next task seems to need a thread. 0: it isn't."""
        return max(0.0, self._no_thread.get(queue, (0.0, 0.0))[1] - now)

    def leave_alone(self, queue: str, now: float) -> None:
        """This queue's next task needs a thread, and none is free. The time to leave it alone doubles each time."""
        wait, until = self._no_thread.get(queue, (0.0, 0.0))
        self._trust[queue] = 1
        if until <= now:
            wait = min(LOOK_MOST, max(LOOK_LEAST, 2 * wait))
            self._no_thread[queue] = wait, now + wait

    def go_on(self, queue: str) -> None:
        """This queue's next task needs no thread, or the queue is empty."""
        self._no_thread.pop(queue, None)

    def claimed(
        self, jobs: Sequence[Job], free: Mapping[str, int], limit: int, threads: Threads | None, now: float
    ) -> list[str]:
        """`jobs` came, and are fed to the slots. `limit`: how many were asked for, at most `free` of each queue.
        Returns the queues in which tasks may be left that didn't fit into `threads`."""
        plain = self._slots.plain
        if not plain:
            return []
        taken = Counter(job.queue for job in jobs)
        mixed = {job.queue for job in jobs if job.type in plain}
        for queue, asked in free.items():
            if queue in mixed:
                self._trust[queue] = 1
                if taken[queue] >= asked and not self.fitting():
                    self.leave_alone(queue, now)  # its next task is probably another
            elif taken[queue] >= asked:
                self._trust[queue] = min(TRUST_MOST, 2 * asked)
            elif len(jobs) < limit:
                self._trust[queue] = 1
        unfit: list[str] = []
        if threads is not None and threads.opened(jobs) >= threads.spare:
            unfit = [queue for queue, asked in free.items() if taken[queue] < asked]
        for queue in free.keys() - mixed - {*unfit}:
            self.go_on(queue)
        return unfit
