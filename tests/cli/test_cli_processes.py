"""`notifyq worker --processes`: a supervisor and its workers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from notifyq.cli import supervisor

from ..helpers.command import INSERT, Program, Start
from ..helpers.waiting import eventually


async def pids(supervisor: Program, count: int) -> list[int]:
    """The process ids of that many workers, as they start."""
    started = [await supervisor.line("worker started") for _ in range(count)]
    return [int(line.split("[")[1].split("]")[0]) for line in started]


async def test_a_supervisor_and_its_workers(start: Start, db: Any) -> None:
    """Each process is a worker. One that dies is replaced. Ctrl-C is for the supervisor, which ends them all."""
    supervisor = start(
        "worker mailer:app --processes 2", first="import notifyq.cli.supervisor as f; f.BACKOFF_SECONDS = 0.01, 1"
    )
    one, two = await pids(supervisor, 2)
    assert len({one, two, supervisor.popen.pid}) == 3
    assert os.getsid(one) == one, "a terminal's Ctrl-C would reach the children"
    os.kill(two, signal.SIGKILL)
    line = await supervisor.line("ended by itself, starting another")
    assert f"notifyq.cli[{supervisor.popen.pid}]" in line
    assert "ended=SIGKILL" in line
    (three,) = await pids(supervisor, 1)
    assert three not in {one, two}
    for _ in range(2):
        await db.fetchval(INSERT, "SEND_MAIL", b'{"to": "x"}')
        await supervisor.line("mail x")
    assert await supervisor.end(signal.SIGINT) == 0


FAKE_CHILD = """
import os, signal, sys
os.write(int(os.environ["_NOTIFYQ_PARENT"]), b"+")
with open(sys.argv[1], "a+") as runs:
    first = not (runs.seek(0), runs.read())[1]
    print("run", file=runs, flush=True)
if first:
    sys.exit(3)
signal.pause()
"""


async def test_a_child_that_loses_its_database_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3 ends all processes only at the start, where another try would go no better."""
    runs = tmp_path / "runs"
    monkeypatch.setattr(supervisor, "CHILD", (sys.executable, "-I", "-S", "-c", FAKE_CHILD))
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.0, 1.0))
    parent = supervisor.Supervisor([str(runs)], 1, 5.0, False)

    async def count() -> int:
        return len(runs.read_text().splitlines()) if runs.exists() else 0

    async with anyio.create_task_group() as group:
        group.start_soon(parent._keep_child_running)
        await eventually(count, 2)
        assert not parent._stop.is_set()
        parent._shut_down()
    assert parent._code == 0


async def test_the_supervisor_is_killed(start: Start, db: Any) -> None:
    """The children notice it, and drain. (That `end` returns shows that they are gone.)"""
    supervisor = start("worker mailer:app --processes 2")
    await pids(supervisor, 2)
    assert await supervisor.end(signal.SIGKILL) == -signal.SIGKILL
    assert supervisor.said.count("the parent process is gone: stopping") == 2
    # By themselves they are gone from the database too, but for one that had no time to say so.
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.worker"), 0)


async def test_several_processes_drain(start: Start, db: Any) -> None:
    await db.execute(
        "INSERT INTO notifyq.task (type, payload) SELECT 'SEND_MAIL', '{\"to\": \"x\"}' FROM generate_series(1, 20)"
    )
    supervisor = start("worker mailer:app --processes 2 --drain")
    assert await supervisor.end() == 0
    assert supervisor.said.count("mail x") == 20


async def test_a_child_that_is_stuck(start: Start, db: Any) -> None:
    """Two signals reach a child that blocks, and don't help. Then the supervisor kills it, and its own exit code is
    1."""
    quick = "import notifyq.cli.supervisor as f; f.FORCED_SECONDS = f.PATIENCE_SECONDS = 0.2"
    supervisor = start("worker mailer:app --processes 2", first=quick)
    await pids(supervisor, 2)
    await db.fetchval(INSERT, "SLEEP", b'{"how": "blocks"}')
    await supervisor.line("sleeps blocks")
    assert await supervisor.end(signal.SIGTERM, signal.SIGINT) == 1
    assert "a worker process doesn't end: killing it" in supervisor.said
