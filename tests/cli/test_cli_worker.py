"""`notifyq worker`: start, logs, signals, exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from typing import Any

import asyncpg
import pytest

from notifyq.cli import logs
from notifyq.database import schema

from ..helpers.command import INSERT, STATE, Start
from ..helpers.machine import limit
from .test_cli import NOWHERE

LOOPS = {"uvloop": "", "asyncio": "sys.modules['uvloop'] = None"}


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_worker(start: Start, db: Any, loop: str) -> None:
    """It says what it is, runs tasks, lets handlers enqueue through the app, and ends without error. Its log has no
    payloads."""
    worker = start("worker mailer:app -q default -q mail:5 -c 7 --threads 3", first=LOOPS[loop])
    banner = await worker.line("notifyq 0")
    assert re.fullmatch(r"notifyq \S+: worker \d+ \(\S+:\d+\) on PostgreSQL [\d.]+, schema \d+\n", banner)
    assert await worker.line("queues") == "  queues   default, mail (5 at once); 7 tasks at once, 3 in threads\n"
    assert await worker.line("types") == "  types    SEND_MAIL, SLEEP, THREAD\n"
    assert re.search(r"proven, \d+\.\d ms there and back", await worker.line("bell"))
    await db.fetchval(INSERT, "SEND_MAIL", b'{"to": "again"}')
    await worker.line("mail again")
    await worker.line("mail me")
    bad = await db.fetchval(INSERT, "SEND_MAIL", b'{"to": 5, "password": "secret"}')
    line = await worker.line("task dead")
    assert re.match(r"\d{4}-\d\d-\d\dT\S+ ERROR notifyq\.run: task dead id=\d+ type=SEND_MAIL queue=default ", line)
    assert f"id={bad} " in line
    assert await worker.end(signal.SIGTERM) == 0
    assert "secret" not in worker.said
    assert await db.fetchval("SELECT count(*) FROM notifyq.worker") == 0


@pytest.mark.parametrize("processes", ["", "--processes 2"])
async def test_an_outcome_that_could_not_be_written(start: Start, db: Any, processes: str) -> None:
    """The worker ends all the same, once, and its exit code is 1: the task will run again."""
    await db.execute("ALTER TABLE notifyq.finished ADD CONSTRAINT no CHECK (type <> 'SEND_MAIL')")
    await db.fetchval(INSERT, "SEND_MAIL", b'{"to": "x"}')
    worker = start(f"worker mailer:app --drain {processes}")
    assert await worker.end() == 1
    assert "stopped with outcomes that could not be written" in worker.said
    assert "starting another" not in worker.said


async def test_drain_and_json_logs(start: Start, db: Any) -> None:
    """The app and the flags may come from variables. Every line of the log is an object."""
    await db.execute(
        "INSERT INTO notifyq.task (type, payload) SELECT 'SEND_MAIL', '{\"to\": \"x\"}' FROM generate_series(1, 20)"
    )
    flags = {"APP": "mailer:app", "DRAIN": "1", "LOG_FORMAT": "json", "HISTORY": "0", "QUEUE": "default:2 mail"}
    worker = start("worker", **{f"NOTIFYQ_{name}": value for name, value in flags.items()})
    assert await worker.end() == 0
    lines = worker.said.splitlines()
    assert lines.count("mail x") == 20
    first = json.loads(lines[0])
    assert (first["message"], first["level"], first["logger"]) == ("worker started", "info", "notifyq.cli")
    assert (first["queues"], first["types"]) == (["default (2 at once)", "mail"], ["SEND_MAIL", "SLEEP", "THREAD"])
    assert (first["pid"], first["schema"], first["bell"][-3:]) == (worker.popen.pid, schema.SCHEMA_VERSION, " ms")
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 0, "no history was asked for"


async def test_a_worker_that_cannot_start(start: Start, empty_dsn: str) -> None:
    """Exit code 3 without a server, 4 without a schema, 2 without an app; each with one line."""
    for program, code, says in [
        (start("worker mailer:app", at=NOWHERE), 3, "(NOTIFYQ_DSN: postgresql://somebody:***@127.0.0.1:1/nothing)"),
        (start("worker mailer:app", at=empty_dsn), 4, "install it: notifyq migrate"),
        (start("worker mailer:app --processes 2", at=empty_dsn), 4, "install it: notifyq migrate"),
        (start("worker mailr:app"), 2, "there is no module 'mailr' for mailr:app"),
        (start("worker mailr:app --processes 3"), 2, "there is no module 'mailr' for mailr:app"),
    ]:
        assert await program.end() == code
        assert says in program.said
        assert len(program.said.splitlines()) == 1, program.said
        assert "secret" not in program.said


WATCH = "import notifyq.worker.signals as w; w.LATE_SECONDS = w.FORCED_SECONDS = {}; "
HANDED_BACK, ENDED = "handing their tasks back", "handlers don't end: ending the process"
ONE, TWO = [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(
    ("loop", "how", "timeout", "signals", "code", "after", "says"),
    [
        ("uvloop", "well", 0, ONE, 0, ("ready", 0), HANDED_BACK),
        ("asyncio", "well", 20, TWO, 1, ("ready", 0), HANDED_BACK),
        ("uvloop", "child", 0, ONE, 0, ("ready", 0), "child ended with -15"),
        *((loop, "takes signals", 0, ONE, 0, ("ready", 0), HANDED_BACK) for loop in LOOPS),
        *((loop, "takes signals", 20, TWO, 1, ("ready", 0), HANDED_BACK) for loop in LOOPS),
        *((loop, "blocks", 0, ONE, 1, ("running", 1), ENDED) for loop in LOOPS),
        *((loop, "blocks", 20, TWO, 1, ("running", 1), ENDED) for loop in LOOPS),
    ],
)
async def test_signals(
    start: Start, db: Any, loop: str, how: str, timeout: int, signals: list[int], code: int, after: Any, says: str
) -> None:
    """The first stops with the timeout, the second at once, whatever a handler does to the loop or to signals."""
    more = 0.3 if how == "blocks" else limit()  # for what ends by itself, if only it has the time
    worker = start(f"worker mailer:app --shutdown-timeout {timeout}", first=WATCH.format(more) + LOOPS[loop])
    id = await db.fetchval(INSERT, "SLEEP", json.dumps({"how": how}).encode())
    await worker.line(f"sleeps {how}")
    assert await worker.end(*signals) == code
    assert says in worker.said
    assert "Traceback" not in worker.said
    assert tuple(await db.fetchrow(STATE, id)) == after


async def test_a_thread_does_not_keep_the_process(start: Start, db: Any) -> None:
    """A plain handler can't be cancelled. Its task is handed back, and the process ends without waiting for it."""
    worker = start("worker mailer:app --shutdown-timeout 0", first=WATCH.format(limit()))
    id = await db.fetchval(INSERT, "THREAD", b"{}")
    await worker.line("sleeps in a thread")
    assert await worker.end(signal.SIGTERM) == 0
    assert tuple(await db.fetchrow(STATE, id)) == ("ready", 0)


async def test_the_schema_goes_away(start: Start, db: Any) -> None:
    """The worker has nothing to wait for: exit code 4."""
    worker = start("worker mailer:app")
    await worker.line("stop it")
    while True:
        try:
            await db.execute("DROP SCHEMA notifyq CASCADE")
            break
        except asyncpg.DeadlockDetectedError:
            pass  # with a statement of the worker's, which has some of the tables and wants others
    assert await worker.end() == 4
    assert "notifyq migrate" in worker.said


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("notifyq.run", logging.INFO, "", 1, message, None, None)
    made.fields = fields
    return made


def test_log_lines() -> None:
    """They are key=value, in quotes where a reader would need them; one line a record, with a traceback after it."""
    text = logs.TextLines(pid=False).format(
        record("a\r\nb", id=5, types=["A", "B"], error='he said "no"', empty="", x="\x1b")
    )
    assert text.split("notifyq.run: ")[1] == 'a\\r\\nb id=5 types=A,B error="he said \\"no\\"" empty="" x="\\u001b"'
    assert f" INFO notifyq.run[{os.getpid()}]: hello" in logs.TextLines(pid=True).format(record("hello"))
    try:
        raise ValueError("oh")
    except ValueError:
        failed = record("failed", id=5)
        failed.exc_info = sys.exc_info()
    assert logs.TextLines(pid=False).format(failed).splitlines()[-1] == "ValueError: oh"
    line = json.loads(logs.JsonLines().format(failed))
    assert (line["message"], line["id"], line["pid"]) == ("failed", 5, os.getpid())
    assert line["traceback"].endswith("ValueError: oh")
