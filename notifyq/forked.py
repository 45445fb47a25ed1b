"""What a forked child of this process must not share with it.

A handler may fork: multiprocessing's Pool, os.fork, subprocess with preexec_fn. The child inherits

    signals   the handlers that stop the worker, and the socket that wakes its event loop. A signal to the child would
              stop the parent, and not end the child.
    sockets   those of the database. While the child lives, the server doesn't see that a killed worker is gone.

So Python runs `_in_child` in each child, before the code that forked goes on there. The child has one thread, a copy of
the one that forked. Locks that other threads held at the fork stay locked in the child for ever. So `_in_child` takes
no lock, logs nothing, and makes system calls only. It never closes a socket through an event loop: the child shares the
epoll instance, and would remove the parent's sockets from it. It replaces each socket by one without a peer. The
descriptor stays in use, so that a later close of it closes nothing else.

SIGTERM is blocked from before the fork until the child has signal handlers of its own. A signal in between, as from a
`terminate()` right after the start, would run the parent's handler in the child, and not end it.

None of this happens where C code forks without Python's hooks; signals.py has a second check for that.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn
from weakref import WeakMethod

from . import log

logger = log.logger("notifyq.run")

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that end a child, and stop a worker

pid = os.getpid()  # of this process; a module attribute is the cheapest to check

# Each change is one step of the interpreter, so a fork in another thread never copies half a change.
_files: dict[int, tuple[int, int]] = {}  # descriptor -> device and inode, which differ after the descriptor was reused
_workers: set[object] = set()  # while it isn't empty, children start with default signal handlers
_masked = threading.local()  # the thread's signal mask, while it forks
_resets: set[WeakMethod[Callable[[], None]]] = set()


def keep_from_children(descriptor: int) -> None:
    """Forked children don't get this file. Nothing needs to be called when it is closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return  # closed already
    _files[descriptor] = status.st_dev, status.st_ino


def call_in_children(reset: Callable[[], None]) -> None:
    """Call this method in each forked child, while its object lives, so that it forgets what belongs to the parent."""
    _resets.add(WeakMethod(reset, _resets.discard))


@contextmanager
def signals_are_ours() -> Generator[None, None, None]:
    """Inside, a forked child starts with SIGTERM and SIGINT as a new Python has them."""
    mark = object()
    _workers.add(mark)
    try:
        yield
    finally:
        _workers.discard(mark)


def leave(error: BaseException | None) -> NoReturn:
    """End this child, as its handler has returned: otherwise it would go on as a second copy of the worker."""
    code = 1
    try:
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            code = error.code or 0
        elif isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        elif error is not None:
            traceback.print_exception(error)
        else:
            code = 0
            logger.warning("a forked child returned from the handler that forked it, and ends here: use os._exit(0)")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _before() -> None:
    if _workers:
        _masked.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    if (before := getattr(_masked, "before", None)) is not None:
        _masked.before = None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child() -> None:
    global pid  # noqa: PLW0603 - a module attribute is the cheapest to read
    pid = os.getpid()
    try:
        if _workers:
            _workers.clear()
            _free_signals()
    finally:  # Ctrl-C raises KeyboardInterrupt here, and Python goes on with the child nevertheless
        _unblock()
    files = list(_files.items())
    _files.clear()
    if files:
        _replace(files)
    for reference in list(_resets):
        if (reset := reference()) is not None:
            reset()


def _free_signals() -> None:
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            # SIG_DFL and SIG_IGN, which aren't Python's, are inherited by all children, and stay.
            if callable(signal.getsignal(number)):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
    except ValueError:
        pass  # only the main interpreter has signals


def _replace(files: list[tuple[int, tuple[int, int]]]) -> None:
    dead, peer = socket.socketpair()
    peer.close()
    with dead:
        for descriptor, known in files:
            try:
                status = os.fstat(descriptor)
                if (status.st_dev, status.st_ino) == known:
                    os.dup2(dead.fileno(), descriptor, inheritable=False)
            except OSError:
                pass  # closed since


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_unblock, after_in_child=_in_child)
