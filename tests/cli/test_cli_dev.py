"""`notifyq dev` and `notifyq demo`."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from notifyq.cli import database
from notifyq.errors import ConfigError

from ..helpers.command import Run, Start
from .test_cli import NOWHERE


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the account which runs PostgreSQL for root may pass; pytest's are closed."""
    with tempfile.TemporaryDirectory(prefix="nq-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow
async def test_dev(start: Start, open_folder: Path, folder: Path, run: Run) -> None:
    """Its first line is a DSN to a migrated database. A second one attaches, says whose the server is, and leaves it as
    it was. If the server dies, so does dev; a signal ends both. The next one has the same DSN and the same data."""
    state = {"XDG_STATE_HOME": str(open_folder)}
    first = start("dev", **state)
    dsn = (await first.line("")).strip()
    assert dsn.startswith("postgresql://notifyq@")
    assert f"data in {open_folder}/notifyq/dev/{database.project_name(folder)}" in await first.line("PostgreSQL ")
    assert f"export NOTIFYQ_DSN='{dsn}'; end it" in await first.line("use it")
    assert (await run("enqueue X", dsn=dsn)).out == "1\n"
    second = start("dev", **state)
    assert (await second.line("postgresql://")).strip() == dsn
    assert f"shares the one that process {first.popen.pid} runs: it ends when" in await second.line("PostgreSQL ")
    assert await second.end(signal.SIGTERM) == 0
    assert (await run("tasks", dsn=dsn)).code == 0
    server = int(re.search(r"process (\d+), data", first.said)[1])  # type: ignore[index]
    os.kill(server, signal.SIGKILL)
    assert await first.end() == 1
    assert "PostgreSQL has ended by itself;" in first.said
    third, fourth = start("dev", **state), None
    assert (await third.line("postgresql://")).strip() == dsn
    assert (await run("tasks", dsn=dsn)).lines[1].split()[0] == "1", "its data are kept"
    fourth = start("dev", **state)
    await fourth.line("use it")
    assert await third.end(signal.SIGINT) == 0
    assert await fourth.end() == 1
    assert f"PostgreSQL has ended; it was the one that process {third.popen.pid} runs" in fourth.said
    assert (await run("tasks", dsn=dsn)).code == 3


@pytest.mark.slow
async def test_dev_keeps_projects_apart(start: Start, open_folder: Path, folder: Path, run: Run) -> None:
    """They differ by folder, by name, by --data-dir; a command may start anywhere in a project."""
    state = {"XDG_STATE_HOME": str(open_folder)}
    one, two, three = start("dev", **state), start("dev shop", **state), start(f"dev --data-dir {open_folder}/d")
    dsns = [(await each.line("postgresql://")).strip() for each in (one, two, three)]
    assert len(set(dsns)) == 3
    assert f"{open_folder}/notifyq/dev/shop/sock" in dsns[1]
    assert f"{open_folder}/d/sock" in dsns[2]
    await run("enqueue X", dsn=dsns[0])
    assert "no such tasks" in (await run("tasks", dsn=dsns[1])).err
    for each in (one, two, three):
        assert await each.end(signal.SIGTERM) == 0
    (folder / "project" / "src" / "deep").mkdir(parents=True)
    (folder / "project" / "pyproject.toml").touch()
    (folder / "other" / "project").mkdir(parents=True)
    names = [database.project_name(folder / name) for name in ("project", "project/src/deep", "other/project")]
    assert names[0] == names[1] != names[2]
    assert all(re.fullmatch(r"project-[0-9a-f]{6}", name) for name in names)
    for words, says in (
        ("dev ../x", "NAME is '../x'; expected up to 40 letters"),
        ("dev x --data-dir y", "NAME 'x' and --data-dir y both name the folder"),
    ):
        said = await run(words)
        assert (said.code, said.out) == (2, "")
        assert says in said.err


@pytest.mark.slow
async def test_dev_that_cannot_start(start: Start, open_folder: Path, folder: Path) -> None:
    """Exit code 2, and a cure."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start(f"dev --port {port} --data-dir {open_folder}/data")
        assert await program.end() == 2
        assert f"notifyq: port {port} of 127.0.0.1 is taken; choose another" in program.said
    (open_folder / "file").touch()
    program = start(f"dev --data-dir {open_folder}/file")
    assert await program.end() == 2
    assert "choose a folder that this user may write to (--data-dir)" in program.said
    program = start("dev", NOTIFYQ_PG_BIN="/nowhere", XDG_STATE_HOME=str(open_folder))
    assert await program.end() == 2
    assert "NOTIFYQ_PG_BIN" in program.said
    left = list((open_folder / "notifyq" / "dev").iterdir())
    assert [kept.name for kept in left] == [database.project_name(folder)], "in the test's own folder"


def test_where_dev_keeps_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG says where; root has a place that others may pass."""
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, says XDG
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert database.state_folder() == Path("/home/somebody/.local/state/notifyq/dev")
    monkeypatch.delenv("HOME")
    no_names: dict[int, str] = {}
    monkeypatch.setattr("pwd.getpwuid", lambda id: no_names[id])
    with pytest.raises(ConfigError, match="no home folder to keep data in; say where: --data-dir FOLDER"):
        database.state_folder()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert database.state_folder() == Path("/var/lib/notifyq/dev")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert database.state_folder() == Path("/state/notifyq/dev")


async def test_demo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo gets its flags, and its exit code is the command's. It doesn't use NOTIFYQ_DSN."""
    asked: list[Any] = []

    def demo(seconds: float, tasks: int, dsn: str | None) -> int:
        asked.append((seconds, tasks, dsn))
        return 1

    monkeypatch.setattr("notifyq.demo.main", demo)
    monkeypatch.setenv("NOTIFYQ_DSN", NOWHERE)
    assert (await run("demo --seconds 7")).code == 1
    assert (await run("demo --seconds 6.5 --tasks 300", dsn="postgresql://x/y")).code == 1
    assert asked == [(7.0, 5000, None), (6.5, 300, "postgresql://x/y")]
