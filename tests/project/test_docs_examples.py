"""The pages of docs/ with examples: their files are written down, their tests run, their commands answer as shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from notifyq.database import connection

from ..helpers.machine import limit

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
FILE = re.compile(r"`(\w+\.py)`[^\n`]*:\n\n```python\n(.*?)```", re.DOTALL)
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
TASKS = """
INSERT INTO notifyq.task (type, payload) VALUES
    ('SEND_MAIL', '{"user": {"email": "a@b.c", "name": "a"}}'),
    ('SEND_MAIL', '{"user": {"email": "a@b.c", "name": "b"}}'),
    ('SEND_MALE', '{}'), ('SEND_MAIL', '{"user": {"email": "a@b.c", "name": "c"}, "title": "hello"}')
"""


def test_testing(tmp_path: Path, notifyq_server_dsn: str) -> None:
    files = FILE.findall((DOCS / "testing.md").read_text())
    assert [name for name, _ in files] == ["shop.py", "conftest.py", "test_inline.py", "test_shop.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    with (tmp_path / "conftest.py").open("a") as conftest:  # which anyio leaves to its users
        conftest.write("import pytest\n\n@pytest.fixture\ndef anyio_backend() -> str:\n    return 'asyncio'\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "NOTIFYQ_TEST_DSN": notifyq_server_dsn},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


def prints_what_it_shows(page: str, tmp_path: Path, dsn: str) -> None:
    """A page with one program and what that prints."""
    [(name, text)] = FILE.findall(page)
    (tmp_path / name).write_text(text)
    [shown] = CONSOLE.findall(page)
    command, _, output = shown.partition("\n")
    assert command == f"$ python {name}"
    done = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env={**os.environ, "NOTIFYQ_DSN": dsn},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (output, "")


def test_limits(tmp_path: Path, dsn: str) -> None:
    prints_what_it_shows((DOCS / "limits.md").read_text(), tmp_path, dsn)


def test_cron(tmp_path: Path, dsn: str) -> None:
    """A worker enqueues the slots until the cron is paused, as the page shows, and runs what it is told to run."""
    page = (DOCS / "cron.md").read_text()
    [(name, text)] = FILE.findall(page)
    (tmp_path / name).write_text(text)
    [shown] = CONSOLE.findall(page)
    command, _, output = shown.partition("\n")
    assert command == "$ notifyq cron pause Beat"
    assert "`notifyq worker reports:app -q default -q reports`" in page
    assert "`notifyq cron run 'report us'`" in page
    where: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "NOTIFYQ_DSN": dsn}, "text": True}
    notifyq = [sys.executable, "-m", "notifyq"]
    argv = [*notifyq, "worker", "reports:app", "-q", "default", "-q", "reports"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **where) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "beat\n"
            paused = subprocess.run([*notifyq, "cron", "pause", "Beat"], capture_output=True, check=True, **where)
            assert paused.stdout == output
            subprocess.run([*notifyq, "cron", "run", "report us"], stdout=subprocess.DEVNULL, check=True, **where)
            while (line := worker.stdout.readline()) == "beat\n":  # one that was on its way
                pass
            assert line == "report us\n"
        finally:
            worker.terminate()


async def test_schema(tmp_path: Path, dsn: str) -> None:
    """In the order of the page: a file, what commands say of it, its next version, what they say of that."""
    db = await connection.connect(dsn)
    await db.execute(TASKS)
    await db.close()
    page = (DOCS / "schema.md").read_text()
    parts = sorted([*FILE.finditer(page), *CONSOLE.finditer(page)], key=lambda part: part.start())
    commands = 0
    for part in parts:
        if part.re is FILE:
            (tmp_path / part[1]).write_text(part[2])
            continue
        for shown in re.split(r"^\$ ", part[1], flags=re.MULTILINE)[1:]:
            command, _, output = shown.partition("\n")
            program = command.replace("notifyq", f"{sys.executable} -B -m notifyq", 1)
            done = subprocess.run(
                program, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
                env={**os.environ, "NOTIFYQ_DSN": dsn},
            )  # fmt: skip
            assert done.stdout.strip() == output.strip(), command
            commands += 1
            assert done.returncode == ("--" in command), done.stderr
    assert commands == 4


async def test_results(tmp_path: Path, dsn: str) -> None:
    """The two files, a worker, and what the page says is printed."""
    page = (DOCS / "results.md").read_text()
    files = FILE.findall(page)
    assert [name for name, _ in files] == ["thumbs.py", "ask.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    where: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "NOTIFYQ_DSN": dsn}, "text": True}
    with subprocess.Popen(
        [sys.executable, "-m", "notifyq", "worker", "thumbs:app"], stderr=subprocess.DEVNULL, **where
    ) as worker:
        try:
            ask = [sys.executable, "ask.py"]
            asked = subprocess.run(ask, capture_output=True, timeout=limit(), check=False, **where)
        finally:
            worker.terminate()
    (shown,) = CONSOLE.findall(page)
    assert asked.stdout == shown.partition("\n")[2], asked.stderr


async def test_unique(tmp_path: Path, dsn: str) -> None:
    page = (DOCS / "unique.md").read_text()
    prints_what_it_shows(page, tmp_path, dsn)
    db = await connection.connect(dsn)
    for statement in re.findall(
        r"^(?:INSERT|SELECT) .*?;", re.findall(r"```sql\n(.*?)```", page, re.DOTALL)[0], re.MULTILINE
    ):
        await db.execute(statement)
    assert await db.fetchval("SELECT count(*) FROM notifyq.task WHERE type = 'Sync'") == 1
    await db.close()
