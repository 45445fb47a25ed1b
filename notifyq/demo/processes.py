"""The demo's child processes: none outlives the demo, whatever becomes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import anyio
from anyio.abc import Process

import notifyq

# Every child begins as this script, which forks a watcher and becomes the program. The watcher waits for the
# end of a pipe whose other end only the demo holds: the kernel closes it however the demo dies. Then it ends
# the program, if that is still its parent, and so never another process that got the same pid.
BEGIN = """
import os, signal, sys
pipe, program = int(sys.argv[1]), os.getpid()
if os.fork() == 0:
    os.closerange(0, pipe)
    os.closerange(pipe + 1, 1024)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.read(pipe, 1)
    if os.getppid() == program:
        os.kill(program, signal.SIGKILL)
    os._exit(0)
os.close(pipe)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A running program, and what it said (stderr, and stdout unless that is a pipe)."""

    def __init__(self, name: str, process: Process, log: IO[bytes]) -> None:
        self.name = name
        self.process = process
        self.pid = process.pid
        self._log = log

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    def said(self) -> str:
        """Its last lines."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")
        return "\n".join(f"    {line}" for line in text.splitlines()[-12:])

    async def end(self, sig: signal.Signals, seconds: float) -> int | None:
        """Send the signal, and wait: its exit code, or None if it is still there after so long."""
        if self.process.returncode is None:
            self.process.send_signal(sig)
        with anyio.move_on_after(seconds):
            return await self.process.wait()
        return None


class Children:
    """Starts children, and on leaving ends all that are left: politely, then not."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # Children take the notifyq that runs this, installed or not; and no settings meant for real workers.
        here = str(Path(notifyq.__file__).parents[1])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFYQ_")}
        self._environment = {**inherited, "PYTHONPATH": path, **environment}
        self.started: list[Child] = []
        self._pipe = (-1, -1)

    async def start(
        self, name: str, argv: Sequence[str], *, talk: bool = False, fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Child:  # fmt: skip
        """Start a program. talk: its stdin and stdout are streams. fds: open files it is to have."""
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the child's; without a name, so it can't be left behind
        ends = subprocess.PIPE if talk else None
        process = await anyio.open_process(
            [sys.executable, "-I", "-S", "-c", BEGIN, str(self._pipe[0]), *argv],
            stdin=ends or subprocess.DEVNULL,
            stdout=ends or log,
            stderr=log,
            pass_fds=[self._pipe[0], *fds],
            env={**self._environment, **(environment or {})},
            start_new_session=True,  # Ctrl-C in a terminal is for the demo, which then ends them in order
        )
        child = Child(name, process, log)
        self.started.append(child)
        return child

    async def python(self, name: str, *argv: str, fds: Sequence[int] = ()) -> Child:
        """Start `python -m ...`."""
        return await self.start(name, [sys.executable, "-m", *argv], fds=fds)

    async def __aenter__(self) -> Self:
        self._pipe = os.pipe()
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for child in self.started:
                    group.start_soon(_dismiss, child)
        for end in self._pipe:
            os.close(end)


async def _dismiss(child: Child) -> None:
    if await child.end(signal.SIGTERM, 1.0) is None:
        await child.end(signal.SIGKILL, 5.0)
    await child.process.aclose()
