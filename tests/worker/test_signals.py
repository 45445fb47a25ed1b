"""A program of one's own that runs a worker: `await app.run_worker(signals=True)`."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import notifyq

from ..helpers.processes import Program, Start
from ..helpers.running import working
from ..helpers.waiting import eventually
from .test_forked import INSERT

pytestmark = pytest.mark.slow

PROGRAM = """
import asyncio, signal, sys, time
from functools import partial
import notifyq

app = notifyq.App()

class Sleep(notifyq.Task, tag="SLEEP"):
    seconds: float
    blocks: bool = False

@app.handler
async def sleep(task: Sleep) -> None:
    print("sleeps", flush=True)
    if task.blocks:
        time.sleep(task.seconds)
    await asyncio.sleep(task.seconds)
    print("slept", flush=True)

async def main() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, partial(print, "usr1", flush=True))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before[2])
    async with app.connect():
        await app.run_worker(signals=True, shutdown_timeout=float(sys.argv[1]))
    after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    print("clean" if before == after else f"{before} {after}", flush=True)

if __name__ == "__main__":
    if "uvloop" in sys.argv:
        import uvloop
        uvloop.run(main())
    else:
        asyncio.run(main())
"""


@pytest.fixture
def start(tmp_path: Path, dsn: str) -> Iterator[Start]:
    (tmp_path / "program.py").write_text(PROGRAM)
    programs: list[Program] = []

    def start(*words: str) -> Program:
        programs.append(Program(tmp_path, dsn, sys.executable, "program.py", *words))
        return programs[-1]

    yield start
    for program in programs:
        program.kill_all()


STATE = "SELECT state, attempts::integer FROM notifyq.all_tasks WHERE id = $1"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("signals", "timeout", "seconds", "after"),
    [
        ([signal.SIGTERM], 60, 1, ("done", 1)),
        ([signal.SIGINT], 60, 1, ("done", 1)),
        ([signal.SIGTERM], 0, 600, ("ready", 0)),
        ([signal.SIGINT, signal.SIGTERM], 600, 600, ("ready", 0)),
    ],
)
async def test_signals(
    start: Start, db: Any, loop: str, signals: list[int], timeout: int, seconds: float, after: tuple[str, int]
) -> None:
    """The first lets handlers end, the second hands their tasks back. Then the program goes on, with its signals as
    they were. Meanwhile its event loop hears of the other signals that it asked for."""
    program = start(str(timeout), loop)
    id = await db.fetchval(INSERT, "SLEEP", json.dumps({"seconds": seconds}).encode())
    await program.line("sleeps")
    program.popen.send_signal(signal.SIGUSR1)
    await program.line("usr1")
    for number in signals:
        program.popen.send_signal(number)
    assert await program.end() == 0
    assert program.said.splitlines()[-1] == "clean"
    assert "Traceback" not in program.said
    assert tuple(await db.fetchrow(STATE, id)) == after


async def test_a_handler_that_blocks_does_not_keep_the_program(start: Start, db: Any) -> None:
    program = start("600")
    await db.fetchval(INSERT, "SLEEP", b'{"seconds": 600, "blocks": true}')
    await program.line("sleeps")
    program.popen.send_signal(signal.SIGINT)
    program.popen.send_signal(signal.SIGTERM)
    assert await program.end() == 1
    assert "handlers don't end: ending the process" in program.said


def ways() -> tuple[Any, ...]:
    """What happens at signals."""
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), fd


async def test_signals_are_left_alone(dsn: str) -> None:
    """A worker takes no signals unless it is asked to. Where it can't start, they are as they were before."""
    app, before = notifyq.App(), ways()

    class Never(notifyq.Task):
        pass

    @app.handler
    async def never(task: Never) -> None: ...

    async with working(app, dsn):
        assert ways() == before
    async with working(app, dsn, signals=True):
        assert ways() != before
    with pytest.raises(notifyq.DatabaseError):
        await app.run_worker(dsn="postgresql://127.0.0.1:1/none", signals=True)
    assert ways() == before


async def test_only_in_the_main_thread(dsn: str) -> None:
    app = notifyq.App()

    class Never(notifyq.Task):
        pass

    @app.handler
    async def never(task: Never) -> None: ...

    with pytest.raises(notifyq.ConfigError, match="main thread"):
        await anyio.to_thread.run_sync(lambda: asyncio.run(app.run_worker(dsn=dsn, signals=True)))


async def test_the_example_of_the_readme(tmp_path: Path, dsn: str, db: Any) -> None:
    """The snippet that runs a worker in a program of one's own."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [snippet] = re.findall(r"```python\n([^`]*signals=True[^`]*)```", readme)
    first = re.search(r"`mails.py`:\n\n```python\n(.*?)```", readme, re.DOTALL)
    assert first
    (tmp_path / "mails.py").write_text(first[1])
    (tmp_path / "run.py").write_text(snippet)
    program = Program(tmp_path, dsn, sys.executable, "run.py")
    try:
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.worker"), 1)
        program.popen.send_signal(signal.SIGTERM)
        assert await program.end() == 0
        assert "Traceback" not in program.said
    finally:
        program.kill_all()
