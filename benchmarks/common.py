"""What a benchmark is given and gives back, and what most of them need: an app, worker processes, percentiles."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

import notifyq
from notifyq.database import connection
from notifyq.embedded import Server

# Of every embedded server here: room for many workers, and no checkpoint that falls into one variant and not another.
SERVER = {"max_connections": "300", "shared_buffers": "512MB", "max_wal_size": "4GB", "min_wal_size": "2GB"}
WAL_FILES = 64  # 1 GB

app = notifyq.App()


class User(msgspec.Struct):
    id: str
    email: str


class Mail(notifyq.Task):
    """About 100 bytes of payload."""

    user: User
    key: str


# What a bare loop has instead of notifyq's tables.
FLOOR = """
CREATE SCHEMA IF NOT EXISTS bench; DROP TABLE IF EXISTS bench.floor;
CREATE TABLE bench.floor (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, type text, payload jsonb,
                          created_at timestamptz DEFAULT clock_timestamp(), processing_at timestamptz);
CREATE INDEX floor_ready ON bench.floor (id) WHERE processing_at IS NULL
"""

TASK = Mail(user=User(id="3f2b8a7e-0001", email="somebody@example.org"), key="k" * 24)


@app.handler
async def mail(task: Mail) -> None:
    """Nothing."""


class Line(NamedTuple):
    """One figure, beside what it is measured against."""

    what: str
    value: float
    unit: str
    reference: str = ""  # what it was measured against, in turns in this run
    ratio: float | None = None  # value / reference's, the median over the rounds
    least: float | None = None  # the aim: a bound on the ratio where there is one, else on the value
    most: float | None = None

    @property
    def aim(self) -> str:
        """Such as ">= 0.8"; empty without one."""
        bounds = [f">= {self.least:,g}" if self.least is not None else "", f"<= {self.most:,g}" if self.most else ""]
        return ", ".join(filter(None, bounds))

    @property
    def met(self) -> bool | None:
        """Whether the aim was, if there is one."""
        if self.least is None and self.most is None:
            return None
        measured = self.value if self.ratio is None else self.ratio
        return (self.least is None or measured >= self.least) and (self.most is None or measured <= self.most)


class Plot(NamedTuple):
    """One SVG; several of one name are its panels, side by side."""

    name: str  # of the file, without .svg
    title: str
    x: str  # the axes, with their units
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]  # label -> points
    log_x: bool = False
    log_y: bool = False


class Result(NamedTuple):
    """What a benchmark has measured."""

    lines: Sequence[Line]
    data: Mapping[str, Any] | None = None  # whatever else is worth keeping, for the JSON
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Bench:
    """What a benchmark is given."""

    dsn: str  # an empty, migrated database
    server: Server | None = None  # the embedded server it runs on; None with --dsn
    quick: bool = False  # a tenth of the work, to see that it runs; the figures mean nothing

    def program(self, name: str) -> str:
        """The path of pgbench, psql, ... of that server. Raises SystemExit, which says what is missing."""
        found = shutil.which(name, path=str(self.server.binaries.bin_dir) if self.server else None)
        if found is None:
            raise SystemExit(f"no {name} here; it comes with PostgreSQL's client programs")
        return found

    def work(self, amount: int) -> int:
        """`amount` of tasks, or a tenth."""
        return max(1, amount // 10) if self.quick else amount

    def rounds(self, count: int) -> int:
        """`count` rounds, or one."""
        return 1 if self.quick else count


async def warm_up(conn: connection.Connection) -> None:
    """Make a new server like one that has run for a while: with WAL files to use again.

    A new file is 16 MB of zeroes and an fsync, during which no session commits: 50 ms each here, and one a second under
    load. It made the p99 of latency at half load 60 ms instead of 9. A superuser's; 4 s.
    """
    for _ in range(WAL_FILES):
        await conn.execute("SELECT pg_logical_emit_message(false, '', '')")  # an empty one isn't switched from
        await conn.execute("SELECT pg_switch_wal()")
    await conn.execute("CHECKPOINT")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


median = statistics.median


def ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """The median over the rounds of ours / reference's."""
    return median(a / b for a, b in zip(ours, reference, strict=True))


@contextmanager
def worker_processes(dsn: str, count: int, *args: str, app: str = "benchmarks.common:app") -> Generator[list[int]]:
    """`notifyq worker` so many times, all ready when this begins; yields their pids; stopped at the end."""
    command = [sys.executable, "-m", "notifyq", "worker", app, "--dsn", dsn, "--log-level", "error", *args]
    with ExitStack() as stack:
        running: list[subprocess.Popen[str]] = []
        for _ in range(count):
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            stack.callback(process.communicate)
            stack.callback(process.terminate)
            running.append(process)
        for process in running:
            assert process.stderr is not None
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if "bell" in line:
                    break
            else:
                raise RuntimeError(f"a worker didn't start: {''.join(said)}")
        try:
            yield [process.pid for process in running]
        finally:
            for process in running:  # all at once, then one after the other
                process.terminate()


@contextmanager
def worker_process(dsn: str, *args: str) -> Generator[int]:
    """One of them: its pid."""
    with worker_processes(dsn, 1, *args) as (pid,):
        yield pid
