"""Parts of a benchmark in processes of their own: they are ready, are told to go, and say what they found.

A child is `python -m benchmarks.NAME ARGUMENT...`, which calls `child` with what it has to do.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import uvloop


class Child:
    """What the parent sees of one. Its `start` returns when the child waits to be told."""

    def __init__(self, module: str, *args: str) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *args]
        self._name = " ".join((module, *args))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def read(self) -> Any:
        """The next that it says. Raises RuntimeError if it ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name}: ended early")  # its stderr is ours
        return msgspec.json.decode(line)

    def tell(self) -> None:
        """Go; or, if it goes already, stop."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@contextmanager
def children(count: int, module: str, *args: str) -> Generator[list[Child]]:
    """So many of them, all ready."""
    running: list[Child] = []
    try:
        running += [Child(module, *args) for _ in range(count)]
        for one in running:
            one.read()
        yield running
    finally:
        for one in running:
            one.end()


def say(what: object) -> None:
    """From a child to its parent."""
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


async def told() -> None:
    """Wait for the parent, beside everything else that runs here."""
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(0, heard.set)
    await heard.wait()
    loop.remove_reader(0)
    sys.stdin.readline()


def child(work: Callable[[], Awaitable[object]]) -> None:
    """Run `work`, on the loop that `notifyq worker` uses, and say what it returns."""

    async def run() -> None:
        say(await work())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
