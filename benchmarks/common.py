"""What the benchmarks share: a no-op app, a worker in a process of its own, medians, and lines to print."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

import notifyq

app = notifyq.App()


class User(msgspec.Struct):
    id: str
    email: str


class Mail(notifyq.Task):
    """About 100 bytes of payload."""

    user: User
    key: str


TASK = Mail(user=User(id="3f2b8a7e-0001", email="somebody@example.org"), key="k" * 24)


@app.handler
async def mail(task: Mail) -> None:
    """Nothing."""


class Line(NamedTuple):
    """One figure, beside what it is measured against."""

    what: str
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None
    aim: str = ""

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:8.2f} x {self.reference}"
        return f"{self.what:<58} {self.value:>12,.2f} {self.unit:<8}{ratio:<44}{self.aim}"


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


median = statistics.median


@contextmanager
def worker_process(dsn: str, *args: str) -> Generator[int, None, None]:
    """`notifyq worker benchmarks.common:app`, ready when this begins; yields its pid; stopped at the end."""
    command = [sys.executable, "-m", "notifyq", "worker", "benchmarks.common:app", "--dsn", dsn, *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "bell" in line:
                break
        else:
            raise RuntimeError("the worker didn't start")
        yield process.pid
    finally:
        process.terminate()
        process.communicate()
