"""Signals for a worker, and the end of a process that doesn't end by itself.

The first SIGTERM or SIGINT sets `stop`, the second sets `force`. A thread waits for them, and not the event loop, which
a handler may block for long. They reach the thread in two ways:

    the C half        of Python's signal handler runs at once, in any thread, and writes the signal's number to a socket
                      (signal.set_wakeup_fd). The app's code may take that away: loop.add_signal_handler does
    the Python half   runs in the main thread when that next runs Python, and writes a zero byte

Both tell of the same signals, so the larger of two counts is how many there were.

To block the signals and wait in sigwait would be simpler. But the subprocesses of handlers would inherit the block, and
not end when they are told to.

Only the signals of this process count. forked.py takes all of this away from a forked child. Python can't do that for a
child that C code forks, so it still writes to the socket when it gets a signal. On Linux the kernel says which process
wrote.

With --processes there is a third way: a socket that the parent process shares. It closes when the parent dies, in any
way, and that counts as a signal.
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

# How long the process may live until it is ended:
LATE_SECONDS = 5.0  # after the shutdown timeout, to cancel handlers and to write outcomes
FORCED_SECONDS = 3.0  # after the second signal
LEFT_SECONDS = 1.0  # after the worker has ended, for threads that handlers have left and for exit functions

PYTHON_HALF, FINISHED, CLOSED = b"\x00", b"\xff", b"\xfe"  # no signal has these numbers

CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
SENDERS_ARE_KNOWN = hasattr(socket, "SO_PASSCRED")

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class Watch:
    """Sets `stop` and `force`. It is made in the main thread, on the event loop of the two events."""

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
        # uvloop has set a socket of its own there. Until its loop ends, pass on what it must hear of: SIGCHLD, say.
        self._next = self._before = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        self._handlers: dict[signal.Signals, _Handler] = {}
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._python_half)
        self._heard = {"python": 0, "c": 0}  # signals, by the half that told of them
        self._told = 0  # events that were set
        self._deadline: float | None = None  # when the process is ended
        self._code: int | None = None  # the exit code, when the worker has ended
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="notifyq-signals", daemon=True)
        self._thread.start()

    @property
    def forced(self) -> bool:
        """Whether there was a second signal."""
        return self._told > 1

    def loop_ends(self) -> None:
        """Pass nothing on to uvloop any more. Call it in the event loop, as the last thing."""
        self._next = -1

    def finish(self, code: int) -> None:
        """The worker has ended. If a thread, say, keeps the process from ending, it is ended LEFT_SECONDS later."""
        try:
            sys.stdout.flush()  # what handlers printed: os._exit doesn't flush it
        except (OSError, ValueError):
            pass  # no process reads it any more
        self._code = code
        self._send(FINISHED)

    def close(self) -> None:
        """The worker has ended, and the program goes on: put signals back as they were."""
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
            pass  # thousands of signals are in the socket, so the thread is awake

    # In the thread.

    def _run(self) -> None:
        while not self._closed:
            wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            sockets = [self._received, *([self._parent] if self._parent else [])]
            ready, _, _ = select.select(sockets, [], [], wait)
            if not ready:
                self._end_process()
            if self._received in ready:
                self._read(self._receive())
            if self._parent in ready:
                self._parent = None
                logger.warning("the parent process is gone: stopping")
                self._heard = {half: count + 1 for half, count in self._heard.items()}
            self._set_events()

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

    def _set_events(self) -> None:
        """Do what this number of signals asks for. A third one changes nothing."""
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

    def _end_process(self) -> None:
        if self._code is not None:  # the interpreter is ending, and starts no more threads
            os._exit(self._code)
        try:
            # In a thread, as the thread that is stuck may hold a lock that writing needs.
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
