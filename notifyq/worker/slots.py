"""The tasks that a worker holds, and their counts by queue and by plain handler.

A job is held from its claim until its attempt has ended: it waits for a runner, or it runs. The counts decide how much
may be claimed (capacity.py). The worker's loop writes everything here; the comments name what other threads touch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

from ..registry import Registry
from ..task import Progress
from .job import Job


class Slots:
    """The jobs held, and what is known about each of them."""

    __slots__ = (
        "by_queue", "ended", "held", "lost", "plain", "plain_ended", "plain_held", "reports", "waiting",
    )  # fmt: skip

    def __init__(self, registry: Registry) -> None:
        self.held: dict[int, Job] = {}  # by the task's id
        self.waiting: deque[Job] = deque()  # of these, the ones that no runner has begun, in the order to run them
        self.lost: set[Job] = set()  # of these, the ones whose lease is lost: their handlers are being cancelled
        # Progress that isn't written yet. Handlers' threads write here, and the heartbeat's thread takes it.
        self.reports: dict[Job, Progress] = {}
        self.by_queue: Counter[str] = Counter()  # of those held
        self.ended = 0  # attempts, since the worker started
        # By type of plain handlers: how many tasks share a thread (for a batch handler, more than one), and how many
        # are held. And how many attempts of all of them have ended.
        self.plain = {handler.type: handler.batch or 1 for handler in registry.handlers if handler.is_plain}
        self.plain_held: Counter[str] = Counter()
        self.plain_ended = 0

    def add(self, jobs: Sequence[Job]) -> None:
        """Hold these jobs. They wait for a runner, in their order."""
        for job in jobs:
            self.held[job.id] = job
            self.by_queue[job.queue] += 1
            if self.plain and job.type in self.plain:
                self.plain_held[job.type] += 1
            self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Hold this job no more: its attempt has ended."""
        del self.held[job.id]
        if self.lost:
            self.lost.discard(job)
        if self.reports:
            self.reports.pop(job, None)
        self.by_queue[job.queue] -= 1
        if self.plain and job.type in self.plain:
            self.plain_held[job.type] -= 1
            self.plain_ended += 1
        self.ended += 1

    def take_reports(self) -> dict[Job, Progress]:
        """Take the latest progress of each job that isn't written yet. Called in the heartbeat's thread: each step is
        atomic, whatever handlers report meanwhile, and whichever jobs end."""
        taken: dict[Job, Progress] = {}
        for _ in range(len(self.reports)):
            try:
                job, progress = self.reports.popitem()
            except KeyError:  # the loop has dropped the rest, as those jobs have ended
                break
            taken[job] = progress
        return taken

    def put_back_report(self, job: Job, progress: Progress) -> None:
        """It could not be written: keep it for the next time, unless there is a newer one or the job has ended."""
        if self.held.get(job.id) is job:
            self.reports.setdefault(job, progress)

    @property
    def threads_needed(self) -> int:
        """How many threads the held tasks of plain handlers use, or wait for."""
        return self.threads_for(self.plain_held)

    def threads_for(self, held: Mapping[str, int]) -> int:
        """How many threads this many tasks of these plain handlers need."""
        return sum(-(-count // self.plain[type]) for type, count in held.items())

    @property
    def seats(self) -> int:
        """How many more tasks of plain batch handlers fit into the threads that the held tasks need."""
        return sum(-held % self.plain[type] for type, held in self.plain_held.items())
