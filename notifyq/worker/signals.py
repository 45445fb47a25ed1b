r"""Signals for a worker, and an end to what doesn't end by itself.

The first SIGTERM or SIGINT sets `stop`, the second `force`. A thread hears them, and not the event loop, which
a handler may block for as long as it likes: the C half of a signal handler writes to a socket in whichever
thread it runs, and ours waits there. Should the app's code take that for itself (loop.add_signal_handler
does), there is still the Python half, which runs in the main thread when that next runs Python. Each tells of
the same signals, so the larger of two counts is how many there were.

To block the signals and wait in sigwait would be simpler, but the subprocesses of handlers would inherit the
block, and not end when they are told to.

Only this process counts. forked.py takes all of this away from a forked child. One that was forked by C code, where
Python can't do that, still writes to the socket when it gets a signal; on Linux the kernel says which process wrote.

With --processes there is a third source: a socket whose other end closes however the parent dies.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TypeAlias

import anyio

from .. import forked, log
from ..errors import ConfigError
from ..forked import SIGNALS

logger = log.logger("notifyq.worker")

LATE_SECONDS = 5.0  # beyond the shutdown timeout, for handlers to be cancelled and outcomes to be written
FORCED_SECONDS = 3.0  # after the second signal
LEFT_SECONDS = 1.0  # after the worker, for threads that handlers have left and for exit functions

PYTHON_HALF, FINISHED, CLOSED = b"\x00", b"\xff", b"\xfe"  # no signal has these numbers

CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
SENDERS_ARE_KNOWN = hasattr(socket, "SO_PASSCRED")

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class Watch:
    """Made in the main thread, inside of the event loop that `stop` and `force` belong to."""

    def __init__(
        self, stop: anyio.Event, force: anyio.Event, timeout: float, parent: socket.socket | None = None
    ) -> None:
        self._events = (stop, force)
        self._timeout = timeout
        self._parent = parent
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        if SENDERS_ARE_KNOWN:
            self._received.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for end in (self._received, self._sent):
            forked.keep_from_children(end.fileno())
        self._children = ExitStack()
        self._children.enter_context(forked.signals_are_ours())
        # uvloop has a socket of its own there, and until it ends it must still hear of signals: SIGCHLD, say.
        self._next = self._before = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        self._handlers: dict[signal.Signals, _Handler] = {}
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._python_half)
        self._heard = {"python": 0, "c": 0}
        self._told = 0
        self._deadline: float | None = None
        self._code: int | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="notifyq-signals", daemon=True)
        self._thread.start()

    @property
    def forced(self) -> bool:
        """Whether there was a second signal."""
        return self._told > 1

    def loop_ends(self) -> None:
        """To be called in the loop, last."""
        self._next = -1

    def finish(self, code: int) -> None:
        """The worker has ended. What keeps the process from ending now, a thread say, has a moment left."""
        try:
            sys.stdout.flush()  # what handlers printed; nobody else may come to do it
        except (OSError, ValueError):
            pass  # nobody reads it
        self._code = code
        self._send(FINISHED)

    def close(self) -> None:
        """The worker has ended, and its program goes on: signals are as they were before."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._python_half:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        now = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(self._before if now == self._sent.fileno() else now)
        self._children.close()
        self._send(CLOSED)
        self._thread.join()
        self._received.close()
        self._sent.close()

    def _python_half(self, _number: int, _frame: FrameType | None) -> None:
        self._send(PYTHON_HALF)

    def _send(self, byte: bytes) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._sent.send(byte)
        except BlockingIOError:
            pass  # after thousands of signals, it is awake

    # In the thread.

    def _run(self) -> None:
        while not self._closed:
            wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            sockets = [self._received, *([self._parent] if self._parent else [])]
            ready, _, _ = select.select(sockets, [], [], wait)
            if not ready:
                self._end()
            if self._received in ready:
                self._read(self._receive())
            if self._parent in ready:
                self._parent = None
                logger.warning("the parent process is gone: stopping")
                self._heard = {half: count + 1 for half, count in self._heard.items()}
            self._tell()

    def _receive(self) -> bytes:
        """What this process wrote. One read never returns what two processes wrote."""
        if not SENDERS_ARE_KNOWN:
            return self._received.recv(4096)
        received, about, _, _ = self._received.recvmsg(4096, socket.CMSG_SPACE(CREDENTIALS.size))
        for level, kind, data in about:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender, _, _ = CREDENTIALS.unpack(data)
                return received if sender == self._pid else b""
        return received

    def _read(self, received: bytes) -> None:
        self._heard["python"] += received.count(PYTHON_HALF)
        self._heard["c"] += sum(received.count(number) for number in SIGNALS)
        if CLOSED in received:
            self._closed = True
        elif FINISHED in received:
            self._deadline = time.monotonic() + LEFT_SECONDS
        elif (signals := received.strip(PYTHON_HALF)) and self._next >= 0:
            try:
                os.write(self._next, signals)
            except OSError:
                pass

    def _tell(self) -> None:
        """Do what so many signals ask for; nothing more comes of a third."""
        while self._told < min(2, max(self._heard.values())) and self._code is None:
            now = time.monotonic()
            if self._told == 0:
                self._deadline = now + self._timeout + LATE_SECONDS
            else:
                self._deadline = min(self._deadline or now, now + FORCED_SECONDS)
            event = self._events[self._told]
            self._told += 1
            try:
                self._loop.call_soon_threadsafe(event.set)
            except RuntimeError:
                pass  # the loop is closed already

    def _end(self) -> None:
        if self._code is not None:  # the interpreter is on its way out: it starts no more threads
            os._exit(self._code)
        try:
            # In a thread, as whoever is stuck may hold what writing needs.
            saying = threading.Thread(target=_last_words, daemon=True)
            saying.start()
            saying.join(0.5)
        finally:
            os._exit(1)


@contextmanager
def watched(stop: anyio.Event, force: anyio.Event, timeout: float) -> Generator[None, None, None]:
    """Inside, SIGTERM and SIGINT set these, as in `notifyq worker`. Raises ConfigError outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("signals=True works in the main thread only, where Python runs its signal handlers")
    watch = Watch(stop, force, timeout)
    try:
        yield
    finally:
        watch.close()


def _last_words() -> None:
    logger.error("handlers don't end: ending the process; their tasks will be rescued and run again")
    sys.stdout.flush()
