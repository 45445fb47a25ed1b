"""The command line, run in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from .machine import limit


@dataclass
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Run = Callable[..., Awaitable[Said]]


class Program:
    """`notifyq ...` in a process of its own. `line` and `end` read what it prints, stderr in between."""

    def __init__(self, words: str, folder: Path, dsn: str, first: str = "", **environment: str) -> None:
        code = f"import sys; {first}\nfrom notifyq.cli import main\nsys.exit(main(sys.argv[1:]))"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *words.split()],
            cwd=folder,
            env={**os.environ, "NOTIFYQ_DSN": dsn, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""

    async def line(self, text: str) -> str:
        """Return the next line with this text."""
        assert self.popen.stdout is not None
        with anyio.fail_after(limit()):
            while read := await anyio.to_thread.run_sync(self.popen.stdout.readline, abandon_on_cancel=True):
                self.said += read
                if text in read:
                    return read
        raise AssertionError(f"it ended with {self.popen.wait()} before {text!r}:\n{self.said}")

    async def end(self, *signals: int) -> int:
        """Send these signals, and return the exit code. Other programs that write to the same place, its children, have
        ended too."""
        for number in signals:
            self.popen.send_signal(number)
        with anyio.fail_after(limit()):
            rest, _ = await anyio.to_thread.run_sync(self.popen.communicate, abandon_on_cancel=True)
        self.said += rest
        return self.popen.returncode


Start = Callable[..., Program]
INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2) RETURNING id"
STATE = "SELECT state, attempts::integer FROM notifyq.all_tasks WHERE id = $1"
