"""--processes N: a parent that starts N workers, restarts those that die, and passes signals on.

Children have a session each, so that a terminal's Ctrl-C reaches the parent alone. With each the parent shares
a socket. The child says on it that it works; and when it closes, the other end is gone, however that died. So
no child outlives its parent (it drains), on any system, and without asking the kernel for a signal.

The first child starts alone: what is wrong with the app, the schema or the database is then said once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence

import anyio

from notifyq import forked, log
from notifyq.worker.signals import FORCED_SECONDS, LATE_SECONDS

logger = log.logger("notifyq.cli")

VARIABLE = "_NOTIFYQ_PARENT"  # the socket's number, for a child
READY = b"+"
AT_START = (2, 3, 4)  # exit codes that say: it will go no better next time
PATIENCE_SECONDS = 3.0  # beyond what a child gives itself
BACKOFF_SECONDS = (0.5, 30.0)  # between restarts: doubles from the first to the second

# -P: without the current folder, where something of the user's may be called notifyq; `worker` adds it later.
CHILD = (sys.executable, "-P", "-m", "notifyq")


def parent() -> socket.socket | None:
    """In a child: the socket that it shares with its parent. Only once: grandchildren have nothing to do with it."""
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return None
    shared = socket.socket(fileno=int(number))
    shared.set_inheritable(False)
    forked.keep_from_children(shared.fileno())
    return shared


def tell_ready(shared: socket.socket) -> None:
    """In a child: it works."""
    try:
        shared.send(READY)
    except OSError:
        pass  # the parent is gone, which Watch sees too


async def supervise(argv: Sequence[str], processes: int, timeout: float, drain: bool) -> int:
    """Run `notifyq *argv` so many times, side by side. Returns the exit code for all."""
    return await Family(argv, processes, timeout, drain).run()


class Family:
    def __init__(self, argv: Sequence[str], processes: int, timeout: float, drain: bool) -> None:
        self._argv = argv
        self._processes = processes
        self._timeout = timeout
        self._drain = drain
        self._children: set[asyncio.subprocess.Process] = set()
        self._signals = 0
        self._code = 0
        self._stop = anyio.Event()
        self._first_works = anyio.Event()  # or it has ended

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep)
            await self._first_works.wait()
            for _ in range(self._processes - 1):
                group.start_soon(self._keep)
        return 1 if self._signals > 1 else self._code

    async def _keep(self) -> None:
        """Have one child, until all are to stop."""
        worked = False
        wait = BACKOFF_SECONDS[0]
        while not self._stop.is_set():
            code, works, seconds = await self._run_child()
            worked |= works
            if self._stop.is_set():
                if code not in (0, -signal.SIGTERM):  # by which one ends that hasn't begun
                    self._code = self._code or 1
            elif code == 0 and self._drain:
                break
            elif code in AT_START and not (code == 3 and worked):
                self._code = code
                self._shut_down()
            else:
                if seconds > BACKOFF_SECONDS[1]:
                    wait = BACKOFF_SECONDS[0]
                ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                logger.error(
                    "a worker process ended by itself, starting another",
                    extra={"fields": {"ended": ended, "after": round(seconds, 1), "again_in": wait}},
                )
                with anyio.move_on_after(wait):
                    await self._stop.wait()
                wait = min(BACKOFF_SECONDS[1], wait * 2)
        self._first_works.set()

    async def _run_child(self) -> tuple[int, bool, float]:
        """Its exit code; whether it came to work; for how many seconds it lived."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = await asyncio.create_subprocess_exec(
                    *CHILD,
                    *self._argv,
                    env={**os.environ, VARIABLE: str(theirs.fileno())},
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            self._children.add(child)
            if self._stop.is_set():  # meanwhile
                _send(child, signal.SIGTERM)
            ours.setblocking(False)
            if works := await loop.sock_recv(ours, 1) == READY:
                self._first_works.set()
            code = await child.wait()
        self._children.discard(child)
        return code, works, loop.time() - began

    def _signal(self) -> None:
        self._signals += 1
        if self._signals <= 2:
            self._shut_down()

    def _shut_down(self) -> None:
        """Tell the children to stop; told twice they stop at once. What is stuck beyond help is killed."""
        self._stop.set()
        for child in self._children:
            _send(child, signal.SIGTERM)
        own = self._timeout + LATE_SECONDS if self._signals <= 1 else FORCED_SECONDS
        asyncio.get_running_loop().call_later(own + PATIENCE_SECONDS, self._kill)

    def _kill(self) -> None:
        for child in self._children:
            logger.error("a worker process doesn't end: killing it", extra={"fields": {"process": child.pid}})
            _send(child, signal.SIGKILL)


def _send(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        child.send_signal(number)
    except ProcessLookupError:
        pass  # it has ended
