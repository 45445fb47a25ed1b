"""A PostgreSQL of our own, for `notifyq demo`, `notifyq dev` and the tests: started, and never left behind.

Nothing else in notifyq imports this; production has a server already. What a `Server` puts on disk:

    /tmp/notifyq-pg-XXXXXXXX/    its run folder, removed when it stops
        lock                     held by flock while its owner lives; a later start sweeps the folders of the dead
        sock/                    the unix socket: here, as its path may have 107 bytes and homes lie deep
        data/  postgres.log      of a temporary server
    DATA_DIR/                    of a kept server
        lock                     held by the owner; whoever comes second attaches to the owner's server
        data/  postgres.log

PostgreSQL refuses to run as root, so root runs it as `postgres` or `nobody`. Only data/ and sock/ belong to that
account, the folders around them to root: root writes nowhere that another could have put a link.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from .binaries import CURE, Binaries, environment, find_binaries
from .errors import EmbeddedError

if sys.platform == "win32":
    raise EmbeddedError("the embedded PostgreSQL runs on Linux and macOS; here, name a server with --dsn")

import fcntl
import pwd

__all__ = ["Binaries", "Server", "find_binaries"]

USER = DATABASE = "notifyq"
DEFAULT_PORT = 5432  # without TCP too: it is part of the socket's name
START_TIMEOUT_SECONDS = 60.0  # for the crash recovery of a kept folder; a fresh start takes 0.4 s
STOP_TIMEOUT_SECONDS = 30.0  # then less polite signals
RUN_PREFIX = "notifyq-pg-"

StopMode = Literal["fast", "immediate"]
_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

# The server's process begins as this script and becomes `postgres` by exec. It asks Linux for SIGINT (a fast shutdown)
# when its parent dies, however that dies. Not in a `preexec_fn`, which runs Python in a fork of a process with threads
# (3.12 warns of it). It asks after the change of user, which would undo it; and as its parent may have died before it
# asked, it looks once more. With -I -S that takes 15 ms.
_BECOME_POSTGRES = """
import ctypes, os, signal, sys
owner, uid, gid = map(int, sys.argv[1:4])
if uid:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGINT))  # PR_SET_PDEATHSIG
if os.getppid() != owner:
    sys.exit("the owner of this server has gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would hand that down
os.execv(sys.argv[4], sys.argv[4:])
"""


class Server:
    """An embedded PostgreSQL with superuser `notifyq` and database `notifyq`, running between `start` and `stop`.

    data_dir    a folder to keep the data in; None makes a temporary server, whose data go when it stops. Of two
                on one folder, in one process or two, the second attaches to the first's, and never stops it.
    durable     False, for demos and tests, turns off fsync and full_page_writes: PostgreSQL's semantics without
                the disk's. A killed server loses nothing; a machine that loses power may lose the data.
    port        listens on 127.0.0.1 as well. There is no password, so any user of this machine can then come
                in; without it there is only a unix socket in a folder closed to others.
    settings    configuration parameters, given to the server as `-c name=value`.

    Synchronous: a start takes 0.4 s, of kept data 0.1 s (from async code: `anyio.to_thread.run_sync(server.start)`).
    The server ends with this process, also if that is killed: on Linux at once, by the kernel; elsewhere a normal
    exit stops it, and after a kill the next start does. Every failure is an EmbeddedError that names its cure.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        durable: bool = False,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        binaries: Binaries | None = None,
    ) -> None:
        self._data_dir = None if data_dir is None else Path(os.path.realpath(data_dir))
        self._durable = durable
        self._port = port
        self._settings = dict(settings or {})
        self._binaries = binaries
        self._owner = (
            0  # our pid while we own a server: a fork inherits this object, not the right to stop it
        )
        self._undo = ExitStack()  # what start did, undone from the last to the first
        self._process: _Process | None = None
        self._attached: _Postmaster | None = None
        self._home = self._run_dir = self._bin_dir = Path()
        self._account = _Account("", 0, 0, switch=False)

    def start(self) -> Self:
        """Start, or attach to the server another process runs on this folder; on return it takes connections."""
        if self._owner or self._attached:
            return self
        self._owner = os.getpid()
        try:
            self._start()
        except BaseException as error:
            self.stop("immediate")
            if isinstance(error, OSError):
                cure = "set TMPDIR to a folder with room that this user may write to"
                raise EmbeddedError(f"can't set up the embedded PostgreSQL: {error}; {cure}") from error
            raise
        return self

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server, "fast" (cuts clients off, saves all) or "immediate" (a crash); temporary data go.

        Does nothing if it is stopped already, and nothing to a server that it only attached to.
        """
        self._attached = None
        if self._owner == os.getpid():
            self._end_process(mode)
            self._undo.close()
            self._owner = 0

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop, and start on the same data, socket and port; "immediate" is a crash and its recovery.

        A server that was killed from outside is started again. Raises EmbeddedError if it isn't ours.
        """
        if self._owner != os.getpid():
            raise EmbeddedError("only the process that started an embedded PostgreSQL can restart it")
        self._end_process(mode)
        try:
            self._launch()
        except BaseException:
            self.stop("immediate")
            raise

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def dsn(self, database: str = DATABASE) -> str:
        """A postgresql:// URL for asyncpg, psycopg and psql. It says everything, so that no PG* variable joins in."""
        if self._port is not None:
            return f"postgresql://{USER}@127.0.0.1:{self._port}/{quote(database)}?sslmode=disable"
        port = self._attached.port if self._attached else DEFAULT_PORT
        return f"postgresql://{USER}@/{quote(database)}?host={quote(str(self.socket_dir))}&port={port}"

    @property
    def pid(self) -> int:
        """The postmaster's process id. Raises EmbeddedError if there is none."""
        if self._attached:
            return self._attached.pid
        if self._process is None:
            raise EmbeddedError("this embedded PostgreSQL is not running")
        return self._process.pid

    @property
    def binaries(self) -> Binaries:
        """What it runs, or would run. Raises EmbeddedError if this machine has nothing to run."""
        if self._binaries is None:
            self._binaries = find_binaries()
        return self._binaries

    @property
    def log_path(self) -> Path:
        """The server's log; that of a kept folder goes on from start to start."""
        return self._home / "postgres.log"

    @property
    def socket_dir(self) -> Path:
        """The folder of the unix socket."""
        return self._attached.socket_dir if self._attached else self._run_dir / "sock"

    # The steps of start, in order.

    def _start(self) -> None:
        binaries = self.binaries
        self._account = _account(self._data_dir and self._data_dir / "data")
        if self._data_dir and not self._take(self._data_dir):
            return
        self._run_dir, lock = _new_run_dir(self._account)
        self._undo.callback(os.close, lock)
        self._undo.callback(shutil.rmtree, self._run_dir, ignore_errors=True)
        self._home = self._data_dir or self._run_dir
        self._bin_dir = self._reachable(binaries.bin_dir)
        data = self._home / "data"
        if not data.exists():
            self._initdb(data)
        elif (major := (data / "PG_VERSION").read_text().strip()) != str(binaries.major):
            raise EmbeddedError(
                f"{data} was made by PostgreSQL {major}, and {binaries.source} is {binaries.version}; remove "
                f"{self._home} to begin anew, or set NOTIFYQ_PG_BIN to the programs of a PostgreSQL {major}"
            )
        _end_leftover(data)
        atexit.register(self.stop)
        self._undo.callback(atexit.unregister, self.stop)
        self._launch()

    def _take(self, folder: Path) -> bool:
        """Own the kept folder (True), or attach to the server of the process that does (False)."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        try:
            if not folder.exists():
                folder.mkdir(parents=True)
                folder.chmod(0o711 if self._account.switch else 0o700)
            while (lock := _lock(folder / "lock")) is None:
                running = _postmaster(folder / "data")
                if running and running.ready:
                    self._attach(folder, running)
                    return False
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"a process holds {folder} and runs no server there; end it, or choose another folder"
                    )
                time.sleep(0.01)  # the owner is starting or stopping
        except OSError as error:
            raise EmbeddedError(
                f"can't use {folder}: {error.strerror}; choose a folder this user may write to"
            ) from error
        self._undo.callback(os.close, lock)
        if closed := _first_closed(self._account, folder):
            raise EmbeddedError(
                f"root runs PostgreSQL as {self._account.name}, and that account may not pass {closed}; choose a data "
                f"folder elsewhere (none: a temporary one), or allow it by chmod o+x {closed}"
            )
        return True

    def _attach(self, folder: Path, running: _Postmaster) -> None:
        if self._port is not None and (self._port != running.port or not running.tcp):
            raise EmbeddedError(
                f"the server on {folder} (pid {running.pid}) is not on port {self._port}; stop it, or ask for no port"
            )
        self._attached, self._home, self._owner = running, folder, 0

    def _reachable(self, bin_dir: Path) -> Path:
        """The programs where the account can run them: a copy, if they lie in a home that is closed to it."""
        if not self._account.switch or self._account.can_run(bin_dir):
            return bin_dir
        # Opening the home is not ours to do. bin/ finds ../lib and ../share by itself, and a wheel's own libraries as
        # ../../../NAME.libs: they keep their places relative to each other. 0.1 s, and gone at stop.
        home = bin_dir.parent
        copies = self._run_dir / "programs"
        copy = copies / home.parent.name / home.name
        libs = home.parent.with_name(home.parent.name + ".libs")
        shutil.copytree(home, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
        if libs.is_dir():
            shutil.copytree(libs, copies / libs.name, symlinks=True)
        for path in (copies, *copies.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755)
        if not self._account.can_run(copy / "bin"):
            raise EmbeddedError(
                f"account {self._account.name} can run neither {bin_dir}/postgres nor a copy of it; {CURE}"
            )
        return copy / "bin"

    def _initdb(self, data: Path) -> None:
        """Make the cluster and its database, all or nothing: it gets its name when it is complete."""
        new = data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)  # of a start that was killed
        _make_folder(new, self._account)
        initdb = [
            self._bin_dir / "initdb",
            "-D",
            new,
            "-U",
            USER,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
        ]
        self._must_run([*initdb, "--no-instructions", *([] if self._durable else ["--no-sync"])])
        # Not by psql or createdb, which some sets of binaries lack; and nothing listens yet that a driver could talk to.
        single = [
            self._bin_dir / "postgres",
            "--single",
            "-D",
            new,
            "-c",
            f"fsync={self._durable}",
            "postgres",
        ]
        self._must_run(single, stdin=f"CREATE DATABASE {DATABASE}\n")
        os.rename(new, data)

    def _must_run(self, argv: Sequence[str | Path], stdin: str = "") -> None:
        done = self._account.run(argv, stdin)
        if done.returncode or re.search(
            "ERROR:|FATAL:|PANIC:", done.stdout
        ):  # single-user mode fails with status 0
            name = Path(argv[0]).name
            raise EmbeddedError(
                f"{name} failed in {self._home}:\n{_last_lines(done.stdout)}\nchoose another data folder, or {CURE}"
            )

    def _launch(self) -> None:
        """Run `postgres` until postmaster.pid says that it is ready."""
        data = self._home / "data"
        settings = {
            "listen_addresses": "127.0.0.1" if self._port else "",
            "port": str(self._port or DEFAULT_PORT),
        }
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        identity = (self._account.uid, self._account.gid) if self._account.switch else (0, 0)
        argv = [sys.executable, "-I", "-S", "-c", _BECOME_POSTGRES, *map(str, (os.getpid(), *identity))]
        argv += [str(self._bin_dir / "postgres"), "-D", str(data), "-k", str(self.socket_dir)]
        argv += [
            word for name, value in (settings | self._settings).items() for word in ("-c", f"{name}={value}")
        ]

        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            log = os.open(self.log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                log_start = os.fstat(log).st_size
                self._process = _Process(argv, log)
                while not self._process.ended.wait(0.005):
                    running = _postmaster(data)
                    if running and running.pid == self._process.pid and running.ready:
                        return
                    if time.monotonic() > deadline:
                        raise EmbeddedError(
                            f"PostgreSQL isn't ready after {START_TIMEOUT_SECONDS:.0f} s; {self.log_path} may say why"
                        )
                said = os.pread(log, 1_000_000, log_start).decode(errors="replace")
            finally:
                os.close(log)
            self._process = None
            # The backends of a postmaster that was killed do notice, and need a moment to leave.
            if "pre-existing shared memory block" not in said or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if self._port and "could not bind" in said:
            raise EmbeddedError(
                f"port {self._port} of 127.0.0.1 is taken; choose another, or none for a unix socket only"
            )
        raise EmbeddedError(f"PostgreSQL {self.binaries.version} ({self.binaries.source}) didn't start:\n{_last_lines(said)}\n"
                            f"correct the settings, choose another data folder, or {CURE}")  # fmt: skip

    def _end_process(self, mode: StopMode) -> None:
        if self._process:
            self._process.end(_SIGNALS[mode])
            self._process = None


class _Process:
    """A child that lives until it is ended or this process dies, and the thread that waits for it.

    The thread is for Linux, to which "my parent died" means the *thread* that forked. Were that the caller of `start`
    (a worker thread of an event loop, say), the server would go when that thread does.
    """

    def __init__(self, argv: Sequence[str], log: int) -> None:
        self.ended = threading.Event()
        born: Future[subprocess.Popen[bytes]] = Future()
        # A daemon, as Python joins all other threads before it runs atexit, where the server is stopped.
        threading.Thread(
            target=self._keep, args=(argv, log, born), name="notifyq-postgres", daemon=True
        ).start()
        self._popen = born.result()
        self.pid = self._popen.pid

    def _keep(self, argv: Sequence[str], log: int, born: Future[subprocess.Popen[bytes]]) -> None:
        try:
            # Its own session: Ctrl-C in a terminal is for us, who then stop the server in order.
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                cwd="/",
                start_new_session=True,
            )
        except BaseException as error:
            born.set_exception(error)
            return
        born.set_result(child)
        child.wait()
        self.ended.set()

    def end(self, first: signal.Signals) -> None:
        for sig, seconds in ((first, STOP_TIMEOUT_SECONDS), (signal.SIGQUIT, 6.0), (signal.SIGKILL, 6.0)):
            self._popen.send_signal(sig)
            if self.ended.wait(seconds):
                return


# ---------------------------------------------------------------- who runs it


@dataclass(frozen=True)
class _Account:
    """Who the server runs as; `switch` is false where that is already us."""

    name: str
    uid: int
    gid: int
    switch: bool

    def run(self, argv: Sequence[str | Path], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program to its end, stderr within stdout. In /, as our own folder may be closed to the account."""
        switch: dict[str, Any] = (
            {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switch else {}
        )
        pipes: dict[str, Any] = {
            "input": stdin,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        return subprocess.run(argv, env=environment(), cwd="/", check=False, **pipes, **switch)

    def can_run(self, bin_dir: Path) -> bool:
        try:
            return all(
                self.run([bin_dir / name, "--version"]).returncode == 0 for name in ("initdb", "postgres")
            )
        except PermissionError:
            return False


def _account(data: Path | None) -> _Account:
    """Ourselves; for root the owner of the data, if there are any yet, else `postgres`, else `nobody`."""
    uid = os.geteuid()
    owner = uid or (data.stat().st_uid if data and data.exists() else 0)
    for who in (owner,) if owner else ("postgres", "nobody"):
        try:
            entry = pwd.getpwuid(who) if isinstance(who, int) else pwd.getpwnam(who)
        except KeyError:
            continue
        return _Account(entry.pw_name, entry.pw_uid, entry.pw_gid, switch=uid == 0)
    lacks = f"user id {owner} has no name" if owner else "neither `postgres` nor `nobody` is"
    raise EmbeddedError(
        f"{lacks} in /etc/passwd, and PostgreSQL runs only as a named user who isn't root; {CURE.partition(', or ')[2]}"
    )


def _first_closed(account: _Account, folder: Path) -> Path | None:
    """The first folder on the way to this one that the account may not pass; asked as that account, as ACLs count too."""
    if not account.switch:
        return None
    way = [*reversed(folder.parents), folder]
    asked = account.run(
        ["/bin/sh", "-c", 'for d in "$@"; do [ -x "$d" ] || { echo "$d"; exit; }; done', "sh", *way]
    )
    return Path(asked.stdout.strip()) if asked.stdout.strip() else None


# ---------------------------------------------------------------- folders and locks


def _lock(path: Path) -> int | None:
    """An open file that holds the lock, or None while another has it. The kernel lets go when the holder dies."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _make_folder(folder: Path, account: _Account) -> None:
    folder.mkdir(mode=0o700)
    if account.switch:
        os.chown(folder, account.uid, account.gid, follow_symlinks=False)


def _new_run_dir(account: _Account) -> tuple[Path, int]:
    """A run folder and its lock, in the first temporary folder that is short and open to the account."""
    bases = [Path(path) for path in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    base = next(
        (path for path in bases if len(os.fsencode(path)) < 70 and not _first_closed(account, path)), None
    )
    if base is None:
        raise EmbeddedError(
            f"{account.name} may pass none of {bases}; set TMPDIR to a folder with a short path that it may"
        )
    _sweep(base)
    run_dir = Path(tempfile.mkdtemp(prefix=RUN_PREFIX, dir=base))
    run_dir.chmod(0o711 if account.switch else 0o700)
    _make_folder(run_dir / "sock", account)
    # Locked first and named then: no sweeper may see the lock of a living owner free.
    lock = _lock(run_dir / "lock.new")
    assert lock is not None
    os.rename(run_dir / "lock.new", run_dir / "lock")
    return run_dir, lock


def _sweep(base: Path) -> None:
    """Remove the run folders of owners that were killed: ours by name and by owner, with a lock that is free."""
    for folder in base.glob(RUN_PREFIX + "*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            if not (folder / "lock").exists():
                # Its owner is in the middle of _new_run_dir, unless it died there.
                if time.time() - status.st_mtime > 3600:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            if (lock := _lock(folder / "lock")) is not None:
                try:
                    _end_leftover(folder / "data")
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)
        except (OSError, EmbeddedError):
            continue  # another sweeper was faster, or the next will manage


# ---------------------------------------------------------------- a server that runs


@dataclass(frozen=True)
class _Postmaster:
    """What a running server says of itself in postmaster.pid."""

    pid: int
    port: int
    socket_dir: Path
    tcp: bool
    ready: bool


def _postmaster(data: Path) -> _Postmaster | None:
    """The server that runs on these data, if one does; the file alone proves nothing, as it outlives a killed one."""
    try:
        pid, _, _, port, socket_dir, address, _, status, *_ = (
            (data / "postmaster.pid").read_text().splitlines()
        )
    except (FileNotFoundError, ValueError):
        return None  # absent, or not all written
    # The pid may be anybody's by now: they are small and soon used again in a container. A zombie's command is empty.
    try:
        command = Path(f"/proc/{int(pid)}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        command = ""
        if sys.platform != "linux":
            ps = ["ps", "-o", "command=", "-p", pid]
            command = subprocess.run(ps, capture_output=True, text=True, check=False).stdout
    if f"-D {data} " not in command:
        return None
    return _Postmaster(
        int(pid), int(port), Path(socket_dir), tcp=bool(address), ready=status.strip() == "ready"
    )


def _end_leftover(data: Path) -> None:
    """End a server whose owner is dead; the caller holds the lock. On Linux it is on its way out already."""
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while left := _postmaster(data):
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"the server on {data} (pid {left.pid}) has lost its owner and doesn't stop; kill it"
            )
        os.kill(left.pid, signal.SIGINT)
        time.sleep(0.01)
    # PostgreSQL refuses to start if the pid in there lives again, as any process of the account.
    (data / "postmaster.pid").unlink(missing_ok=True)


def _last_lines(output: str) -> str:
    return "\n".join(f"  {line}" for line in output.strip().splitlines()[-6:])
