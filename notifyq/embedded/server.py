"""Start, stop and restart an embedded PostgreSQL."""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from notifyq.errors import EmbeddedError

from .account import Account, find_account
from .binaries import OWN_SERVER, Binaries, environment, find_binaries
from .folders import Postmaster, end_leftover, lock_file, new_run_dir, running_postmaster

NO_SPACE = "make room on that disk, or choose a folder on another (--data-dir)"
USER = DATABASE = "notifyq"
LONGEST_SOCKET = 103  # bytes of a socket's path, the limit of macOS
DEFAULT_PORT = 5432  # the socket's name has it, without TCP too
START_TIMEOUT_SECONDS = 60.0  # long, for the crash recovery of kept data; a fresh start takes 0.5 s
STOP_TIMEOUT_SECONDS = 30.0  # then it gets a stronger signal

StopMode = Literal["fast", "immediate"]
SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

# The server's process begins as this script and becomes `postgres` by exec. It asks Linux for SIGINT, a fast shutdown,
# when its parent dies in any way. A `preexec_fn` could do that too, but it runs Python in a fork of a process with
# threads, of which Python 3.12 warns. The order matters. The script imports first, as this Python may lie in a home
# that is closed to the account. It asks after the change of user, which would undo the request. Then it checks whether
# its parent died meanwhile. With -I -S this takes 15 ms.
BECOME_POSTGRES = """
import ctypes, os, signal, sys
owner, uid, gid = map(int, sys.argv[1:4])
if uid:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGINT))  # PR_SET_PDEATHSIG
if os.getppid() != owner:
    sys.exit("the owner of this server has gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores SIGPIPE, and exec would pass that on
os.execv(sys.argv[4], sys.argv[4:])
"""


class Server:
    """An embedded PostgreSQL with superuser `notifyq` and database `notifyq`, running from `start` to `stop`.

    data_dir  the folder for the data; None: a temporary server, whose data are removed when it stops. A second Server
              on a folder, in this process or another, attaches to the first one's server, and never stops it
    durable   False, for demos and tests, turns off fsync and full_page_writes. A killed server loses nothing, but a
              machine that loses power may lose the data
    port      listen on this port of 127.0.0.1 too. There is no password, so any user of this machine can connect;
              without it there is only a unix socket, in a folder closed to other users
    settings  configuration parameters, given to the server as `-c name=value`
    binaries  the programs to run; None: those that find_binaries() finds

    It blocks: a start takes 0.5 s, or 0.1 s on kept data. Async code calls it by `anyio.to_thread.run_sync`.

    The server ends with this process, even if that is killed. On Linux the kernel ends it at once. Elsewhere a normal
    exit stops it, and after a kill the next start does. Every failure is an EmbeddedError that names the cure.
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
        self._owner = 0  # this process's id while it owns a server: a forked child has a copy, and must not stop it
        self._undo = ExitStack()  # undoes what `start` did
        self._process: _Process | None = None
        self._attached: Postmaster | None = None
        self._home = self._run_dir = self._sock = self._bin_dir = Path()
        self._account = Account("", 0, 0, switch=False)

    def start(self) -> Self:
        """Start a server, or attach to the running one of this folder. On return it takes connections."""
        if self._owner or self._attached:
            return self
        self._owner = os.getpid()
        try:
            self._start()
        except BaseException as error:
            self.stop("immediate")
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise EmbeddedError(f"can't set up the embedded PostgreSQL: {error}; {NO_SPACE}") from error
            if isinstance(error, OSError):
                cure = "set TMPDIR to a folder with room that this user may write to"
                raise EmbeddedError(f"can't set up the embedded PostgreSQL: {error}; {cure}") from error
            raise
        return self

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server, "fast" (it closes connections and saves all) or "immediate" (a crash). Temporary data are
        removed.

        It does nothing if the server is stopped already, or if this Server only attached to it.
        """
        self._attached = None
        if self._owner == os.getpid():
            self._end_process(mode)
            self._undo.close()
            self._owner = 0

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop, and start on the same data, socket and port. "immediate": a crash and its recovery.

        A server that was killed from outside is started again. Raises EmbeddedError for another process's server.
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
        """A postgresql:// URL for asyncpg, psycopg and psql. No PG* variable changes where it leads."""
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
        """The programs that it runs, or would run. Raises EmbeddedError if this machine has none."""
        if self._binaries is None:
            self._binaries = find_binaries()
        return self._binaries

    @property
    def log_path(self) -> Path:
        """The server's log. A kept folder has one log for all starts."""
        return self._home / "postgres.log"

    @property
    def socket_dir(self) -> Path:
        """The folder of the unix socket."""
        return self._attached.socket_dir if self._attached else self._sock

    @property
    def is_stable(self) -> bool:
        """Whether the next start on this folder has the same DSN."""
        return self._port is not None or (self._data_dir is not None and self.socket_dir == self._data_dir / "sock")

    @property
    def shares(self) -> bool:
        """Whether another process owns this server, and may end it at any time."""
        return self._attached is not None

    @property
    def owner_pid(self) -> int | None:
        """The id of the process that owns this server; None if it isn't known."""
        if not self.shares:
            return os.getpid()
        try:
            return int((self._home / "lock").read_text())
        except (OSError, ValueError):
            return None

    # The steps of start, in order.

    def _start(self) -> None:
        self._account = find_account(self._data_dir and self._data_dir / "data")
        if self._data_dir and not self._take(self._data_dir):
            return
        binaries = self.binaries
        self._run_dir, lock = new_run_dir(self._account)
        self._undo.callback(os.close, lock)
        self._undo.callback(shutil.rmtree, self._run_dir, ignore_errors=True)
        self._home = self._data_dir or self._run_dir
        self._sock = self._socket_folder()
        self._bin_dir = self._reachable(binaries.bin_dir)
        data = self._home / "data"
        if not data.exists():
            self._initdb(data)
        elif (major := (data / "PG_VERSION").read_text().strip()) != str(binaries.major):
            raise EmbeddedError(
                f"{data} was made by PostgreSQL {major}, and {binaries.source} is {binaries.version}; remove "
                f"{self._home} to begin anew, or set NOTIFYQ_PG_BIN to the programs of a PostgreSQL {major}"
            )
        end_leftover(data)
        atexit.register(self.stop)
        self._undo.callback(atexit.unregister, self.stop)
        self._launch()

    def _take(self, folder: Path) -> bool:
        """Lock the kept folder, and return True; or attach to the server of the process that has the lock: False."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        try:
            try:
                folder.mkdir(parents=True)
                folder.chmod(0o711 if self._account.switch else 0o700)
            except FileExistsError:
                pass  # its permissions stay as they are
            while (lock := lock_file(folder / "lock")) is None:
                running = running_postmaster(folder / "data")
                if running and running.ready:
                    self._attach(folder, running)
                    return False
                if time.monotonic() > deadline:
                    cure = "end that process, or choose another folder"
                    raise EmbeddedError(f"a process holds {folder} and runs no server there; {cure}")
                time.sleep(0.01)  # the owner is starting or stopping
        except OSError as error:
            cure = "choose a folder that this user may write to (--data-dir)"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                cure = NO_SPACE
            raise EmbeddedError(f"can't use {folder}: {error.strerror}; {cure}") from error
        self._undo.callback(os.close, lock)
        os.truncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())  # read by processes that attach
        if closed := self._account.first_closed(folder):
            raise EmbeddedError(
                f"root runs PostgreSQL as {self._account.name}, and that account may not pass {closed}; "
                f"choose another data folder (none: a temporary one), or allow it by chmod o+x {closed}"
            )
        return True

    def _attach(self, folder: Path, running: Postmaster) -> None:
        if self._port is not None and (self._port != running.port or not running.tcp):
            where = f"the server on {folder} (pid {running.pid})"
            raise EmbeddedError(f"{where} is not on port {self._port}; ask for no port, or stop it first")
        self._attached, self._home, self._owner = running, folder, 0

    def _socket_folder(self) -> Path:
        """The folder of the socket: the kept folder, so that the DSN stays; the run folder if that path is too long."""
        if self._data_dir is None or len(os.fsencode(self._data_dir / "sock/.s.PGSQL.65535")) > LONGEST_SOCKET:
            return self._run_dir / "sock"
        folder = self._data_dir / "sock"
        try:
            self._account.own(folder)
        except FileExistsError:
            for left in folder.glob(".s.PGSQL.*"):  # of a server that was killed
                left.unlink(missing_ok=True)
        return folder

    def _reachable(self, bin_dir: Path) -> Path:
        """The folder where the account can run the programs: a copy, if they lie in a home that is closed to it."""
        if not self._account.switch or self._account.can_run(bin_dir):
            return bin_dir
        # The home is the user's, so it isn't opened. The programs look for ../lib and ../share, and for the libraries
        # of a wheel in ../../../NAME.libs, so all are copied with their relative places. This takes 0.4 s. `stop`
        # removes the copy.
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
            account = self._account.name
            raise EmbeddedError(f"account {account} can run neither {bin_dir}/postgres nor a copy of it; {OWN_SERVER}")
        return copy / "bin"

    def _initdb(self, data: Path) -> None:
        """Create the cluster and its database. Their folder has another name until they are complete."""
        new = data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)  # of a start that was killed
        self._account.own(new)
        words = f"-U {USER} --auth=trust --encoding=UTF8 --locale=C --no-instructions"
        words += "" if self._durable else " --no-sync"
        self._must_run("initdb", "-D", str(new), *words.split())
        # A single-user server creates the database: some sets of programs lack psql and createdb.
        fsync = f"fsync={'on' if self._durable else 'off'}"
        # The user has the name of notifyq's schema, and "$user" is first in the default search_path: without this, the
        # tables that people create would land in that schema.
        create = f"CREATE DATABASE {DATABASE}\nALTER ROLE {USER} SET search_path = public\n"
        self._must_run("postgres", "--single", "-D", str(new), "-c", fsync, "postgres", stdin=create)
        os.rename(new, data)

    def _must_run(self, program: str, *args: str, stdin: str = "") -> None:
        done = self._account.run([self._bin_dir / program, *args], stdin)
        # The exit code isn't enough: a single-user server exits with 0 after a statement that failed.
        if done.returncode or re.search("ERROR:|FATAL:|PANIC:", done.stdout):
            cure = _cure(done.stdout, "choose another folder")
            raise EmbeddedError(f"{program} failed in {self._home}:\n{last_lines(done.stdout)}\n{cure}")

    def _launch(self) -> None:
        """Run `postgres`. On return it is ready."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        # The backends of a killed postmaster need a moment to notice and exit.
        while "pre-existing shared memory block" in (said := self._run_postgres(deadline)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if not said:
            return
        if self._port is not None and "could not bind" in said:
            why = "is taken"
            if "Permission denied" in said:
                why = f"is not for the account {self._account.name}: on most systems the ports below 1024 are root's"
            cure = "choose another, or none for a unix socket only"
            raise EmbeddedError(f"port {self._port} of 127.0.0.1 {why}; {cure}")
        what = f"PostgreSQL {self.binaries.version} ({self.binaries.source})"
        cure = _cure(said, "correct the settings, or choose another folder")
        raise EmbeddedError(f"{what} didn't start:\n{last_lines(said)}\n{cure}")

    def _run_postgres(self, deadline: float) -> str:
        """Try once. Returns "" when the server is ready, or its log if it ended before."""
        data = self._home / "data"
        log = os.open(self.log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            log_start = os.fstat(log).st_size
            self._process = process = _Process(self._command(data), log)
            while not process.ended.wait(0.005):
                running = running_postmaster(data)
                if running and running.pid == process.pid and running.ready:
                    return ""
                if time.monotonic() > deadline:
                    late = f"PostgreSQL isn't ready after {START_TIMEOUT_SECONDS:.0f} s"
                    raise EmbeddedError(f"{late}; {self.log_path} may say why")
            self._process = None
            return os.pread(log, 1_000_000, log_start).decode(errors="replace") or "  nothing in its log"
        finally:
            os.close(log)

    def _command(self, data: Path) -> list[str]:
        settings = {"listen_addresses": "", "port": str(DEFAULT_PORT)}
        if self._port is not None:
            settings = {"listen_addresses": "127.0.0.1", "port": str(self._port)}
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        uid, gid = (self._account.uid, self._account.gid) if self._account.switch else (0, 0)
        python = [sys.executable, "-I", "-S", "-c", BECOME_POSTGRES, str(os.getpid()), str(uid), str(gid)]
        postgres = [str(self._bin_dir / "postgres"), "-D", str(data), "-k", str(self.socket_dir)]
        for name, value in (settings | self._settings).items():
            postgres += ["-c", f"{name}={value}"]
        return python + postgres

    def _end_process(self, mode: StopMode) -> None:
        if self._process:
            self._process.end(SIGNALS[mode])
            self._process = None


class _Process:
    """A child process that runs until it is ended or this process dies, and the thread that started it.

    The thread is needed on Linux, which tells a child when the *thread* that forked it dies. Without a thread of its
    own the server would end with the thread that called `start`, which may be a worker thread of an event loop.
    """

    def __init__(self, argv: Sequence[str], log: int) -> None:
        self.ended = threading.Event()
        self._born: Future[subprocess.Popen[bytes]] = Future()
        # A daemon thread: Python joins all others before it runs atexit, which stops the server.
        thread = threading.Thread(target=self._run, args=(argv, log), name="notifyq-postgres", daemon=True)
        thread.start()
        self._popen = self._born.result()
        self.pid = self._popen.pid

    def _run(self, argv: Sequence[str], log: int) -> None:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                cwd="/",
                start_new_session=True,  # so that Ctrl-C in a terminal goes to this process, which stops the server
            )
        except BaseException as error:
            self._born.set_exception(error)
            return
        self._born.set_result(child)
        child.wait()
        self.ended.set()

    def end(self, first: signal.Signals) -> None:
        """Send signals, each stronger than the one before, until the child has ended."""
        for sig, seconds in ((first, STOP_TIMEOUT_SECONDS), (signal.SIGQUIT, 6.0), (signal.SIGKILL, 6.0)):
            self._popen.send_signal(sig)
            if self.ended.wait(seconds):
                return


def _cure(said: str, otherwise: str) -> str:
    return NO_SPACE if "No space left on device" in said else f"{otherwise} (--data-dir), or {OWN_SERVER}"


def last_lines(output: str) -> str:
    return "\n".join(f"  {line}" for line in output.strip().splitlines()[-6:])
