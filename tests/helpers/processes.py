"""Worker processes and other programs, followed by what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from .machine import limit


class Process:
    """A worker in a process of its own, running tests/helpers/workers.py; it prints a line of JSON for each event."""

    def __init__(self, dsn: str, *args: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "workers.py"), dsn, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.pid = self.popen.pid

    async def line(self, event: str) -> dict[str, Any]:
        """The next line that tells of `event`; others are skipped."""
        assert self.popen.stdout is not None
        with anyio.fail_after(limit()):
            while True:
                text = await anyio.to_thread.run_sync(self.popen.stdout.readline, abandon_on_cancel=True)
                if not text:
                    raise AssertionError(f"the worker ended before {event!r}: {self.popen.communicate()[1]}")
                line: dict[str, Any] = json.loads(text)
                if line["event"] == event:
                    return line

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def wait(self) -> int:
        with anyio.fail_after(limit()):
            return await anyio.to_thread.run_sync(self.popen.wait, abandon_on_cancel=True)

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()


class Story:
    """All that a worker process tells, each line with the time at which it came."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[tuple[float, dict[str, Any]]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.popen.stdout is not None
        try:
            for text in self.process.popen.stdout:
                self.lines.append((time.monotonic(), json.loads(text)))
        except ValueError:
            assert self.process.popen.poll() is not None  # closed

    def error(self) -> str:
        """What it wrote to stderr, if it has ended."""
        ended = self.process.popen.poll()
        return "it lives" if ended is None else f"exit {ended}: {self.process.popen.stderr.read()}"  # type: ignore[union-attr]

    def of(self, event: str, **fields: Any) -> list[tuple[float, dict[str, Any]]]:
        return [
            (at, line)
            for at, line in self.lines
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
        ]

    def logged(self, text: str) -> list[dict[str, Any]]:
        return [line["fields"] for _, line in self.of("log") if text in line["message"]]

    async def reach(self, count: int, event: str, **fields: Any) -> float:
        """Wait for that many; when the last of them came."""
        seconds = limit()
        with anyio.move_on_after(seconds):
            while len(self.of(event, **fields)) < count:
                await anyio.sleep(0.01)
        found = self.of(event, **fields)
        assert len(found) >= count, (
            f"{len(found)} of {count} times {event!r} after {seconds:.0f} s in {self.lines}; {self.error()}"
        )
        return found[count - 1][0]


async def started(spawn: Spawn, *options: str) -> Story:
    story = Story(spawn(*options))
    await story.reach(1, "started")
    return story


async def whose(db: Any, stories: list[Story]) -> list[Story]:
    """Whose the running tasks are, first: one worker's, which had the turn and room for them all."""
    names = "SELECT DISTINCT worker FROM notifyq.all_tasks WHERE state = 'running'"
    [pid] = [int(row[0].rpartition(":")[2]) for row in await db.fetch(names)]
    return sorted(stories, key=lambda story: story.process.pid != pid)


class Program:
    """A program in a session of its own, as a service manager starts it. Its children end with it."""

    def __init__(self, folder: Path, dsn: str, *words: str) -> None:
        self.log = folder / f"log{len(list(folder.glob('log*')))}"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, "NOTIFYQ_DSN": dsn},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    async def line(self, text: str, count: int = 1) -> str:
        """The line with this text, once it is there so often."""
        with anyio.move_on_after(limit()):
            while (said := self.said).count(text) < count:
                assert self.popen.poll() is None, f"it ended with {self.popen.returncode} before {text!r}:\n{said}"
                await anyio.sleep(0.02)
        assert said.count(text) >= count, f"no {text!r} in:\n{said}"
        return next(line for line in said.splitlines() if text in line)

    async def end(self) -> int:
        with anyio.fail_after(limit()):
            return await anyio.to_thread.run_sync(self.popen.wait, abandon_on_cancel=True)

    def kill_all(self) -> None:
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait()


Spawn = Callable[..., Process]
Start = Callable[..., Program]
