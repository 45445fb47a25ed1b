"""What was recorded of a run, as plain values. The checker knows nothing else, so a test can make one up."""

from __future__ import annotations

import re
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import msgspec

RUN = re.compile(r"run (\S+-\d+)")
WORK_SECONDS = 0.05  # of a processor: what a step may take, with the tasks that are before it
CANARY_SECONDS = 0.5  # so long before and after counts as well


PLAIN = ("Thread", "Forks")  # types of plain handlers, which need threads


class Row(msgspec.Struct, kw_only=True):
    """A transition of a row, as a trigger saw it. Times are seconds since 1970, by the database's clock."""

    op: str  # I, U, D of a task; F into, X out of notifyq.finished; W a worker registers, B it goes
    id: int  # the task's, or the worker's
    seq: int = 0
    at: float = 0.0
    committed: float = 0.0
    who: str = ""  # the role that did it: the process
    app: str = ""  # its application_name: the connection
    was_worker: int | None = None
    was_attempts: int = 0
    worker: int | None = None
    attempts: int = 0
    run_at: float = 0.0
    withheld: bool = False
    queue: str = "default"
    type: str = "Quick"
    n: str | None = None  # the number that its enqueuer gave it
    note: str = ""  # the last error; of F the state, and the beginning of the result or error
    bytes: int = 0  # of F: of the result
    limit_key: str | None = None
    most: int | None = None  # of that key at once
    rate: int | None = None  # of that key in so many
    seconds: float | None = None
    order_key: str | None = None
    unique_key: str | None = None
    after: list[int] = []
    on_dead: str | None = None  # cancel


class Run(msgspec.Struct, kw_only=True):
    """A call of a handler, from its first line to its last."""

    run: str
    id: int
    attempt: int
    who: str
    started: float
    type: str = "Quick"
    ended: float | None = None
    how: str = "no end"
    n: int | None = None  # the number in the payload that it was given


class Batch(msgspec.Struct, kw_only=True):
    """What an enqueuer tried in one transaction."""

    by: str
    numbers: list[int]
    outcome: str = "unknown"  # committed, rolled back
    at: float = 0.0  # when it knew
    began: float = 0.0
    existed: list[int] = []  # the tasks that it was told are in the way
    open: tuple[float, float] = (0.0, 0.0)  # its transaction: from that answer until it sent the end


class Window(msgspec.Struct, kw_only=True):
    """A fault, while it lasted."""

    name: str
    since: float
    until: float
    who: set[str] | None  # the processes that it touched; None: all
    round: int = 0
    heal: float = 5.0  # seconds after it in which things may still be late


class Process(msgspec.Struct, kw_only=True):
    """A worker process."""

    who: str
    started: float
    queues: dict[str, int | None]
    concurrency: int
    threads: int = 10_000
    told: float | None = None  # to stop
    killed: float | None = None
    ended: float | None = None
    code: int | None = None


class Lease(msgspec.Struct, kw_only=True):
    """From a claim to whatever ended it."""

    id: int
    worker: int
    attempt: int
    claim: Row
    ready: float  # since when it could have been claimed
    end: Row | None = None
    who: str = ""  # the worker's process


class Lag(msgspec.Struct):
    """The machine itself was late or slow, as the canary saw it."""

    at: float
    seconds: float = 0.0  # by which a sleep was too long
    slow: float = 0.0  # how many times as long as alone it took to compute; 0: it slept


class History(msgspec.Struct, kw_only=True, dict=True, eq=False):
    """The whole history. What is derived from it is computed once."""

    rows: list[Row] = []
    runs: list[Run] = []
    batches: list[Batch] = []
    windows: list[Window] = []
    processes: list[Process] = []
    lags: list[Lag] = []
    logs: list[tuple[float, str, str, list[int]]] = []  # at, who, message, ids
    left: dict[int, str] = {}  # tasks that had not ended: id -> type
    cron: tuple[float, float] = (0.0, 0.0)  # workers were there to look after it: since, until

    @cached_property
    def rows_of(self) -> dict[int, list[Row]]:
        """The rows of each task, in order."""
        return _grouped(row for row in sorted(self.rows, key=lambda row: row.seq) if row.op in "IUDFX")

    @cached_property
    def runs_of(self) -> dict[int, list[Run]]:
        found: dict[int, list[Run]] = defaultdict(list)
        for run in sorted(self.runs, key=lambda run: run.started):
            found[run.id].append(run)
        return found

    @cached_property
    def run_by_name(self) -> dict[str, Run]:
        return {run.run: run for run in self.runs}

    @cached_property
    def owner(self) -> dict[int, str]:
        """The process that a worker id belongs to."""
        return {row.id: row.who for row in self.rows if row.op == "W"}

    @cached_property
    def leases_of(self) -> dict[int, list[Lease]]:
        return {id: self._leases(rows) for id, rows in self.rows_of.items()}

    def _leases(self, rows: list[Row]) -> list[Lease]:
        leases: list[Lease] = []
        ready, run_at, held = 0.0, 0.0, False
        for row in rows:
            if row.op not in "IUD":
                continue
            if held and row.worker != leases[-1].worker:
                leases[-1].end, held = row, False
            if row.op != "D" and row.worker is None:
                # A promotion changes nothing: it was due when it was due.
                if row.op == "I" or row.was_worker is not None or row.run_at != run_at:
                    ready, run_at = max(row.run_at, row.committed), row.run_at
            elif row.op == "U" and row.was_worker != row.worker and row.worker is not None:
                who = self.owner.get(row.worker, "?")
                leases.append(
                    Lease(id=row.id, worker=row.worker, attempt=row.attempts, claim=row, ready=ready, who=who)
                )
                held = True
        return leases

    @cached_property
    def leases(self) -> list[Lease]:
        return [lease for leases in self.leases_of.values() for lease in leases]

    @cached_property
    def leases_by(self) -> dict[int, list[Lease]]:
        """The leases of each worker, by its id."""
        found: dict[int, list[Lease]] = defaultdict(list)
        for lease in self.leases:
            found[lease.worker].append(lease)
        return found

    @cached_property
    def trouble(self) -> list[tuple[float, float, set[str] | None]]:
        """All that may cost a process its leases: since, until, which processes."""
        deadly = [run for run in self.runs if run.type in ("Block", "Kamikaze")]
        return [
            *((window.since, window.until, window.who) for window in self.windows),
            *((run.started, run.ended or run.started, {run.who}) for run in deadly),
            *(
                (since, process.ended or float("inf"), {process.who})
                for process in self.processes
                if (since := min(filter(None, [process.told, process.killed, process.ended]), default=None))
            ),
        ]

    def touched(self, who: str, since: float, until: float, slack: float = 6.0) -> bool:
        """Whether a fault touched that process between these times, or a moment before."""
        return any(
            (whose is None or who in whose) and begin <= until and since <= end + slack
            for begin, end, whose in self.trouble
        )

    def healed(self, at: float) -> float:
        """When the last of the faults that had begun by then is made up for."""
        return max((window.until + window.heal for window in self.windows if window.since <= at), default=0.0)

    @cached_property
    def _late(self) -> list[Lag]:
        """When the canary slept too long."""
        return [lag for lag in self.lags if lag.seconds]

    @cached_property
    def _slow(self) -> list[tuple[float, float]]:
        """When the canary computed, and how slow that was; in order."""
        return sorted((lag.at, lag.slow) for lag in self.lags if lag.slow)

    def lag(self, since: float, until: float) -> float:
        """How much longer a step of some work may have taken in between, since the machine was late or slow."""
        late = sum(
            lag.seconds for lag in self.lags if lag.seconds and since <= lag.at and lag.at - lag.seconds <= until
        )
        first, last = (bisect_left(self._slow, (at,)) for at in (since - CANARY_SECONDS, until + CANARY_SECONDS))
        near = [slow for _, slow in self._slow[first:last]]
        return late + WORK_SECONDS * (max(statistics.fmean(near), 1.0) - 1 if near else 0.0)


def read_events(folder: Path, history: History) -> None:
    """What the worker processes and the canary wrote."""
    canary = folder / "canary"
    if canary.exists():
        history.lags = [msgspec.json.decode(line, type=Lag) for line in canary.read_bytes().splitlines()]
    runs: dict[str, Run] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            event = msgspec.json.decode(line)
            match event["event"]:
                case "started":
                    runs[event["run"]] = msgspec.convert({**event, "started": event["at"]}, Run)
                case "ended":
                    runs[event["run"]].ended, runs[event["run"]].how = event["at"], event["how"]
                case _:
                    history.logs.append((event["at"], event["who"], event["message"], event["ids"]))
    history.runs = list(runs.values())


def _grouped(rows: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.id].append(row)
    return found
