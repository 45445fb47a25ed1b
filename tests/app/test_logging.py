"""What a worker logs is there and says enough, however the application has set up logging."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import notifyq
from notifyq import log
from notifyq.cli import logs

from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.processes import Program, Start
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually
from ..worker.test_forked import INSERT

APP = """
import logging, logging.config
import notifyq

CONFIG = {"version": 1, "formatters": {"f": {"format": "APP %(levelname)s %(name)s %(message)s"}},
          "handlers": {"h": {"class": "logging.StreamHandler", "formatter": "f"}},
          "root": {"level": "INFO", "handlers": ["h"]}}  # existing loggers are disabled where nothing is said
app = notifyq.App()

class Bad(notifyq.Task, tag="BAD"):
    max_attempts = 1

class Empty(notifyq.Task, tag="EMPTY"):
    max_attempts = 1

class Say(notifyq.Task, tag="SAY"):
    pass

@app.handler
async def bad(task: Bad) -> None:
    raise ValueError("seen by nobody?")

@app.handler
async def empty(task: Empty) -> None:
    raise TimeoutError

@app.handler
async def say(task: Say) -> None:
    print("printed")
"""
SILENCING = {
    "at import": "logging.config.dictConfig(CONFIG)",
    "in the lifespan": """
@app.lifespan
async def lifespan():
    logging.config.dictConfig(CONFIG)
    yield
""",
}


@pytest.fixture
def start(tmp_path: Path, dsn: str) -> Iterator[Start]:
    programs: list[Program] = []

    def start(code: str, *words: str) -> Program:
        (tmp_path / "logs_app.py").write_text(code)
        worker = "import sys\nfrom notifyq.cli import main\nsys.exit(main(sys.argv[1:]))"
        programs.append(Program(tmp_path, dsn, sys.executable, "-c", worker, "worker", "logs_app:app", *words))
        return programs[-1]

    yield start
    for program in programs:
        program.kill_all()


@pytest.mark.parametrize("silenced", SILENCING)
async def test_a_configuration_that_disables_loggers(start: Start, db: Any, silenced: str) -> None:
    """The app's format has the id, the type and the error. A stop is logged too."""
    program = start(APP + SILENCING[silenced])
    await program.line("stop it")
    for type, error in (("BAD", '"ValueError: seen by nobody?"'), ("EMPTY", "TimeoutError")):
        id = await db.fetchval(INSERT, type, b"{}")
        line = await program.line(
            f"APP ERROR notifyq.run task dead id={id} type={type} queue=default attempt=1 handler="
        )
        assert f" error={error} " in line
        assert line.endswith(f' more="notifyq show {id}"')
    program.popen.send_signal(signal.SIGTERM)
    assert await program.end() == 0
    assert "APP INFO notifyq.worker worker stopped id=" in program.said


async def test_what_a_handler_prints_is_seen_at_once(start: Start, db: Any) -> None:
    """This holds although stdout is a file."""
    program = start(APP)
    await program.line("stop it")
    await db.fetchval(INSERT, "SAY", b"{}")
    await program.line("printed")
    assert program.popen.poll() is None


@pytest.mark.parametrize("style", ["text", "json"])
async def test_debug(start: Start, db: Any, style: str) -> None:
    """A failure's traceback is beside it, and how long a task took; each field is there once."""
    program = start(APP, "--log-level", "debug", "--log-format", style)
    await program.line("worker started" if style == "json" else "stop it")
    bad = await db.fetchval(INSERT, "BAD", b"{}")
    done = await db.fetchval(INSERT, "SAY", b"{}")
    dead, ended = await program.line("task dead"), await program.line("task done")
    await program.line("seen by nobody?")
    if style == "json":
        told, over = json.loads(dead), json.loads(ended)
        assert (told["message"], told["id"], told["type"]) == ("task dead", bad, "BAD")
        assert 'raise ValueError("seen by nobody?")' in told["traceback"]
        assert (over["message"], over["id"]) == ("task done", done)
        assert 0 <= over["seconds"] < 60
    else:
        assert dead.count(f"id={bad}") == 1
        await program.line('    raise ValueError("seen by nobody?")')
        assert f"task done id={done} " in ended
        assert " seconds=0." in ended


async def test_no_traceback_above_debug(start: Start, db: Any) -> None:
    program = start(APP)
    await db.fetchval(INSERT, "BAD", b"{}")
    await program.line("task dead")
    assert "Traceback" not in program.said
    assert "raise ValueError" not in program.said


@pytest.mark.usefixtures("quick_heart")
async def test_a_cancelled_task_has_lost_nothing(db: Any, dsn: str, logged: Logged) -> None:
    """It was cancelled, which is no warning, whether its handler runs or has just ended."""
    app, seen, release = notifyq.App(), Seen(), anyio.Event()

    class Hold(notifyq.Task):
        pass

    @app.handler
    async def hold(task: Hold, ctx: notifyq.Context) -> None:
        seen.add(ctx.id)
        await release.wait()

    async with app.connect(dsn), working(app, dsn):
        first = await app.enqueue(Hold())
        await seen.reach(1)
        await first.cancel()
        await eventually(lambda: found(logged, "cancelled while it ran"))
        assert logged("cancelled while it ran")[0] == {"ids": [first.id], "tasks": 1}
        second = await app.enqueue(Hold())
        await seen.reach(2)
        # In one transaction, so that its handler ends before the worker can hear of it.
        async with db.transaction():
            await db.fetchval("SELECT notifyq.cancel($1)", second.id)
            release.set()
            await eventually(lambda: waits(dsn))
        await eventually(lambda: found(logged, "cancelled while they ran"))
    assert not logged("lease")


async def found(logged: Logged, text: str) -> bool:
    return bool(logged(text))


async def waits(dsn: str) -> bool:
    """Whether an outcome waits for the row's lock."""
    from notifyq.database import connection

    conn = await connection.connect(dsn, role="test")
    try:
        return bool(
            await conn.fetchval(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name LIKE 'notifyq settle%' AND wait_event_type = 'Lock')"
            )
        )
    finally:
        conn.terminate()


def test_a_record_says_everything() -> None:
    """As a template and its arguments, by which tools group records; a percent sign is only that."""
    stream = io.StringIO()
    logger = log.logger("notifyq.test")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    records: list[logging.LogRecord] = []
    handler.addFilter(lambda record: records.append(record) is None)  # type: ignore[func-returns-value]
    try:
        logger.error(
            "50%% done, %s", "really", extra={"fields": {"id": 5, "error": 'no "such" 100% host', "ids": [1, 2]}}
        )
        logger.error("plain %d", 5)
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().splitlines() == [
        '50% done, really id=5 error="no \\"such\\" 100% host" ids=1,2',
        "plain 5",
    ]
    assert records[0].msg == "50%% done, really id=%s error=%s ids=%s"
    line = logs.TextLines(pid=False).format(records[0])
    assert line.endswith(' ERROR notifyq.test: 50% done, really id=5 error="no \\"such\\" 100% host" ids=1,2')
    assert json.loads(logs.JsonLines().format(records[0]))["message"] == "50% done, really"


def test_only_ours_are_enabled_again() -> None:
    ours, theirs = log.logger("notifyq.some"), logging.getLogger("notifyqueue")
    ours.disabled = theirs.disabled = True
    try:
        log.enable()
        assert not ours.disabled
        assert theirs.disabled
    finally:
        theirs.disabled = False


async def test_the_examples_of_the_page(tmp_path: Path, dsn: str, db: Any) -> None:
    """The program of docs/logging.md runs, and its formatter writes what the page says."""
    import re

    page = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()
    [(name, text)] = re.findall(r"`(\w+\.py)`[^\n`]*:\n\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(text)
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, name],
            cwd=tmp_path,
            env={**os.environ, "NOTIFYQ_DSN": dsn},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit(),
        )
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "task dead" in line]
    told = json.loads(line)
    assert (told["message"], told["type"], told["attempt"]) == ("task dead", "CHARGE", 1)
