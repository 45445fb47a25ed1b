"""--processes N: a parent process that starts N workers, restarts those that die, and passes signals on.

Each child has a session of its own, so a terminal's Ctrl-C reaches the parent alone. The parent shares a socket with
each child. The child sends a byte on it when it is ready. When one of the two dies, however it dies, the other sees the
socket close. So no child outlives its parent: it drains and ends. This works on every system, and needs no signal of
the kernel.

The first child starts alone, so an error in the app, the schema or the database is reported once.
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

VARIABLE = "_NOTIFYQ_PARENT"  # tells a child the file descriptor of the socket
READY = b"+"
AT_START = (2, 3, 4)  # exit codes of errors that another start would meet again
UNWRITTEN = 5  # a child's exit code: it stopped in order, with outcomes that could not be written. Its parent's is 1
PATIENCE_SECONDS = 3.0  # added to the time that a child gives itself to end
BACKOFF_SECONDS = (0.5, 30.0)  # between restarts: doubles from the first to the second

# -P leaves the current folder out of sys.path, as it may hold a module named notifyq. load.py adds the folder later.
CHILD = (sys.executable, "-P", "-m", "notifyq")


def parent_socket() -> socket.socket | None:
    """Return the socket that this process shares with its parent; None if no supervisor started it.

    A second call returns None, and processes that this one starts don't inherit the socket.
    """
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return None
    shared = socket.socket(fileno=int(number))
    shared.set_inheritable(False)
    forked.keep_from_children(shared.fileno())
    return shared


def tell_ready(shared: socket.socket) -> None:
    """Tell the parent, from a child, that this worker is ready."""
    try:
        shared.send(READY)
    except OSError:
        pass  # the parent is gone; Watch notices that too, and drains


async def supervise(argv: Sequence[str], processes: int, timeout: float, drain: bool) -> int:
    """Run `notifyq *argv` in `processes` processes, and return one exit code for all of them.

    timeout  seconds that a child waits for its running handlers
    drain    a child that has drained isn't started again
    """
    return await Supervisor(argv, processes, timeout, drain).run()


class Supervisor:
    """Starts the children, restarts those that die, and ends them. Its exit code is 1 after a second signal, or if a
    child failed."""

    def __init__(self, argv: Sequence[str], processes: int, timeout: float, drain: bool) -> None:
        self._argv = argv
        self._processes = processes
        self._timeout = timeout
        self._drain = drain
        self._children: set[asyncio.subprocess.Process] = set()
        self._signals = 0
        self._code = 0
        self._stop = anyio.Event()
        self._first_settled = anyio.Event()  # the first child is ready, or has ended for good

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_child_running)
            await self._first_settled.wait()
            for _ in range(self._processes - 1):
                group.start_soon(self._keep_child_running)
        return 1 if self._signals > 1 else self._code

    async def _keep_child_running(self) -> None:
        """Run one child, and start it again when it dies, until all are to stop."""
        was_ready = False
        wait = BACKOFF_SECONDS[0]
        while not self._stop.is_set():
            code, ready, seconds = await self._run_child()
            was_ready |= ready
            if self._stop.is_set():
                if code not in (0, -signal.SIGTERM):  # SIGTERM kills a child that hasn't set up its handler yet
                    self._code = self._code or 1
            elif code in (0, UNWRITTEN) and self._drain:
                self._code = self._code or min(code, 1)
                break
            elif code in AT_START and not (code == 3 and was_ready):  # 3, the database, may pass
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
        self._first_settled.set()

    async def _run_child(self) -> tuple[int, bool, float]:
        """Run a child to its end. Returns its exit code, whether it was ever ready, and the seconds that it lived."""
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
            if self._stop.is_set():  # set while the child started
                _send(child, signal.SIGTERM)
            ours.setblocking(False)
            if ready := await loop.sock_recv(ours, 1) == READY:
                self._first_settled.set()
            code = await child.wait()
        self._children.discard(child)
        return code, ready, loop.time() - began

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals <= 2:
            self._shut_down()

    def _shut_down(self) -> None:
        """Send SIGTERM to the children, which stop at once when they get a second one.

        A child that runs PATIENCE_SECONDS longer than it allows itself is killed.
        """
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
        pass  # the child has ended
