"""The files of an embedded server on disk, their owners, and the cleanup after killed processes.

    /tmp/notifyq-pg-XXXXXXXX/  a server's run folder, removed when the server stops
        lock                   held by flock while its owner lives; later starts remove the folders of dead owners
        sock/                  the unix socket of a temporary server, or of a kept one whose folder's path is too long:
                               a socket's path may have 103 bytes
        data/  postgres.log    of a temporary server
    DATA_DIR/                  the folder of a kept server
        lock                   held by the owner, and has its process id; a second process attaches to the server
        sock/                  the unix socket; it is here so that the DSN stays the same
        data/  postgres.log

If root starts it, only data/ and sock/ belong to the account that runs the server. The folders around them belong to
root, which must not write into a folder where another user could have put a link.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from notifyq import forked
from notifyq.errors import EmbeddedError

from .account import Account

PREFIX = "notifyq-pg-"
LONGEST_BASE = 60  # bytes of the temporary folder's path: with /notifyq-pg-XXXXXXXX/sock/.s.PGSQL.65535, at most 103
LEFTOVER_TIMEOUT_SECONDS = 30.0


def lock_file(path: Path) -> int | None:
    """Open a file and lock it. Returns None while another process holds the lock; a dead process holds none."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    forked.keep_from_children(lock)  # a child that outlives its parent would hold the lock
    return lock


def new_run_dir(account: Account) -> tuple[Path, int]:
    """A new run folder and its lock, in the first temporary folder that has a short path and is open to the account."""
    bases = [Path(path) for path in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    fitting = (path for path in bases if len(os.fsencode(path)) <= LONGEST_BASE)
    base = next((path for path in fitting if not account.first_closed(path)), None)
    if base is None:
        tried = ", ".join(map(str, bases))
        raise EmbeddedError(f"account {account.name} can't reach {tried}; set TMPDIR to a folder that it can")
    sweep(base)
    run_dir = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    run_dir.chmod(0o711 if account.switch else 0o700)
    account.own(run_dir / "sock")
    # The file is locked before it gets its name, so that no sweep finds it free while its owner lives.
    lock = lock_file(run_dir / "lock.new")
    assert lock is not None
    os.rename(run_dir / "lock.new", run_dir / "lock")
    return run_dir, lock


def sweep(base: Path) -> None:
    """Remove the run folders of killed owners: they have the prefix, belong to this user, and their lock is free."""
    for folder in base.glob(PREFIX + "*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            if not (folder / "lock").exists():
                # Its owner is inside new_run_dir, or died there.
                if time.time() - status.st_mtime > 3600:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            lock = lock_file(folder / "lock")
            if lock is None:
                continue
            try:
                end_leftover(folder / "data")
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
        except (OSError, EmbeddedError):
            continue  # another process was faster, or a later sweep succeeds


@dataclass(frozen=True)
class Postmaster:
    """A running server, as its file postmaster.pid describes it."""

    pid: int
    port: int
    socket_dir: Path
    tcp: bool
    ready: bool


def running_postmaster(data: Path) -> Postmaster | None:
    """The server that runs on these data; None if none does. The file alone proves nothing, as it outlives a kill."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid, _, _, port, socket_dir, address, _, status, *_ = lines
    except (FileNotFoundError, ValueError):
        return None  # it doesn't exist, or isn't complete yet
    # Another process may have the pid by now: in a container pids are small, and soon used again.
    if f"-D {data} " not in _command_line(int(pid)):
        return None
    return Postmaster(int(pid), int(port), Path(socket_dir), bool(address), status.strip() == "ready")


def _command_line(pid: int) -> str:
    """The command line of a process; "" if it has ended or is a zombie."""
    if sys.platform != "linux":
        command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    try:  # not by ps, which slim images of Linux lack
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def end_leftover(data: Path) -> None:
    """End the server of a dead owner, whose lock the caller holds. On Linux the kernel has told it to stop already."""
    deadline = time.monotonic() + LEFTOVER_TIMEOUT_SECONDS
    while left := running_postmaster(data):
        if time.monotonic() > deadline:
            raise EmbeddedError(f"the server on {data} (pid {left.pid}) has no owner and doesn't stop; kill it")
        os.kill(left.pid, signal.SIGINT)
        time.sleep(0.01)
    # PostgreSQL would refuse to start if another process of the account had the pid in this file.
    (data / "postmaster.pid").unlink(missing_ok=True)
