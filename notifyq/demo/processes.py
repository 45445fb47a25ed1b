"""The demo's child processes: none of them outlives the demo, however the demo ends."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from typing import IO

import anyio
from anyio.abc import Process, TaskGroup, TaskStatus

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
    name: str
    process: Process
    may_end: bool = False  # set before it gets a signal


@dataclass
class Children:
    """Child processes, each watched in the task group. It fails when one ends by itself. Cancelled, it ends them
    all."""

    group: TaskGroup
    output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)  # of all children

    async def start(self, name: str, command: str, *fds: int) -> Child:
        """Start `python -m command`. `fds` are open files that it inherits."""
        child: Child = await self.group.start(self._run, name, command, fds)
        return child

    async def _run(self, name: str, command: str, fds: tuple[int, ...], *, task_status: TaskStatus[Child]) -> None:
        process = await anyio.open_process(
            [sys.executable, "-c", LEASHED, *command.split()],
            stdout=self.output,
            stderr=self.output,
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C in a terminal reaches only the demo, which ends its children in order
        )
        async with process:
            child = Child(name, process)
            task_status.started(child)
            try:
                await process.wait()
            finally:
                with anyio.move_on_after(3, shield=True):
                    assert process.stdin is not None
                    await process.stdin.aclose()  # the leash
                    await process.wait()
        if not child.may_end:
            raise NotifyqError(f"{name} ended, exit code {process.returncode}:\n{self.last_lines()}")

    def last_lines(self) -> str:
        """What the children printed last. Call it at the end: it moves the position in the file at which they write."""
        self.output.seek(0)
        return "".join(f"    {line}\n" for line in self.output.read().decode(errors="replace").splitlines()[-24:])
