"""The demo's child processes: none of them outlives the demo, however the demo ends."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import anyio
from anyio.abc import Process, TaskStatus

from notifyq import NotifyqError

# Each child is `python -m ...` on a leash: its stdin, whose other end only the demo holds. However the demo dies, the
# kernel closes that end. Then the child stops as after SIGTERM, or is ended a second later.
LEASHED = """
import os, runpy, signal, sys, threading, time
def leash():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    os._exit(1)
threading.Thread(target=leash, daemon=True).start()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@dataclass(eq=False)
class Child:
    """A process, and the file that it prints to."""

    name: str
    process: Process
    output: IO[bytes]
    may_end: bool = False

    async def end(self, number: signal.Signals, seconds: float) -> int | None:
        """Send the signal and wait. Returns the exit code, or None if the child is still there after `seconds`."""
        self.may_end = True
        if self.process.returncode is None:
            self.process.send_signal(number)
        with anyio.move_on_after(seconds):
            await self.process.wait()
        return self.process.returncode

    def last_lines(self) -> str:
        """Call this last: a child that goes on writes from where this has read to."""
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()[-12:]
        return "\n".join(f"    {line}" for line in lines)


async def run_child(
    name: str, command: str, environment: Mapping[str, str], fds: Sequence[int], *, task_status: TaskStatus[Child]
) -> None:
    """Run `python -m command`, and end it when this is cancelled. `fds` are open files for the child.

    Raises NotifyqError when the child ends by itself.
    """
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the Child keeps it: a failed check prints the last lines
    process = await anyio.open_process(
        [sys.executable, "-c", LEASHED, *command.split()],
        stdout=output,
        stderr=output,
        pass_fds=fds,
        env=environment,
        start_new_session=True,  # Ctrl-C in a terminal goes to the demo alone, which then ends its children in order
    )
    async with process:
        child = Child(name, process, output)
        task_status.started(child)
        try:
            await process.wait()
        finally:
            with anyio.move_on_after(3, shield=True):
                assert process.stdin is not None
                await process.stdin.aclose()  # the leash
                await process.wait()
    if not child.may_end:
        raise NotifyqError(f"{name} ended, exit code {process.returncode}:\n{child.last_lines()}")
