"""The errors of a task: the first and the last hundred are kept, at a bounded size."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest

import notifyq
from notifyq.config import WorkerConfig
from notifyq.database.connection import SQL
from notifyq.worker.worker import Worker

from ..helpers.logs import Logged
from ..helpers.running import working
from ..helpers.waiting import eventually
from .test_refusals import insert, states

pytestmark = pytest.mark.slow


async def test_errors_keep_the_first_and_the_last_hundred(db: Any) -> None:
    """They also say how many are left out between them, whatever the column held before."""
    add = "SELECT notifyq.append_error($1, $2)"
    errors: bytes | None = None
    for n in range(1, 251):
        errors = await db.fetchval(add, errors, json.dumps({"attempt": n, "error": "x"}).encode())
        found = json.loads(errors)
        if n <= 200:
            assert [entry["attempt"] for entry in found] == list(range(1, n + 1))
        else:
            kept = [*range(1, 101), None, *range(n - 99, n + 1)]
            assert [entry.get("attempt") for entry in found] == kept
            assert found[100]["left_out"] == n - 200
            assert str(n - 200) in found[100]["error"]


async def test_errors_that_are_long_or_large_already(db: Any) -> None:
    """Errors from the time before they were bounded, and what a person may have made of the column."""
    add = "SELECT notifyq.append_error({}, '{{\"attempt\": 0}}')"
    long = "(SELECT jsonb_agg(jsonb_build_object('attempt', n)) FROM generate_series(1, 5000) n)"
    found = json.loads(await db.fetchval(add.format(long)))
    assert [entry.get("attempt") for entry in found] == [*range(1, 101), None, *range(4902, 5001), 0]
    assert found[100]["left_out"] == 5000 - 199
    large = """(SELECT jsonb_agg(jsonb_build_object('attempt', n, 'error', (
                    SELECT string_agg(md5(n || '.' || i), '') FROM generate_series(1, 50000) i)))
                FROM generate_series(1, 10) n)"""
    await insert(db, "Good")
    await db.execute(f"UPDATE notifyq.task SET errors = {large}")
    found = json.loads(await db.fetchval("SELECT notifyq.append_error(errors, '{\"attempt\": 0}') FROM notifyq.task"))
    assert [entry.get("left_out") for entry in found] == [10, None]
    await db.execute("UPDATE notifyq.task SET errors = jsonb_set(errors, '{0,left_out}', '5000')")
    found = json.loads(await db.fetchval("SELECT notifyq.append_error(errors, '{\"attempt\": 0}') FROM notifyq.task"))
    assert [entry.get("left_out") for entry in found] == [5009, None], "an entry that stands for 5000, and nine others"
    alone = 'SELECT notifyq.append_error($1, \'{"attempt": 2, "left_out": true}\')'
    found = json.loads(await db.fetchval(alone, b'[{"left_out": 5000}, {"attempt": 1}]'))
    assert [(entry["left_out"], entry["error"].split(": ")[1]) for entry in found[:1]] == [(5001, "5001")]
    assert found[1:] == [{"attempt": 2}]
    for odd in ("'\"none\"'", "'{\"a\": 1}'", "'null'", "'[]'", "NULL"):
        found = json.loads(await db.fetchval(add.format(f"{odd}::jsonb")))
        assert found[-1] == {"attempt": 0}


async def test_every_statement_that_adds_an_error_keeps_to_it(db: Any) -> None:
    """The statements of a retry, a last attempt, a rescue, and a task whose predecessor is dead."""
    for name in ("finish", "retry_later", "rescue"):
        assert "notifyq.append_error(" in SQL[name]
    assert not [name for name, text in SQL.items() if "errors, '[]'" in text]
    bodies = "SELECT prosrc FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace AND prosrc ~ 'errors, ''\\[\\]'''"
    assert await db.fetch(bodies) == []


async def test_a_task_that_fails_hundreds_of_times(db: Any, dsn: str) -> None:
    """The worker writes each failure, and what it writes is bounded."""
    app = notifyq.App()
    done = asyncio.Event()

    class Poll(notifyq.Task):
        max_attempts = 32767
        backoff = 0.0

    @app.handler
    async def poll(task: Poll, ctx: notifyq.Context) -> None:
        if ctx.attempt > 230:
            done.set()
            return
        raise notifyq.Retry(delay=0)

    (id,) = await insert(db, "Poll")
    async with working(app, dsn):
        await eventually(lambda: states(db), {("Poll", "done"): 1}, 60)
    errors = json.loads(await db.fetchval("SELECT errors FROM notifyq.all_tasks WHERE id = $1", id))
    assert (len(errors), errors[100]["left_out"]) == (201, 30)
    assert errors[-1]["attempt"] == 230


async def test_what_is_said_of_a_refusal_has_no_row(db: Any, logged: Logged) -> None:
    """PostgreSQL's DETAIL shows the whole row, and with it the payload."""
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute("CREATE TEMP TABLE t (payload text CHECK (payload = '')); INSERT INTO t VALUES ('secret')")
    assert "secret" in str(refused.value), "it would prove nothing"
    worker = Worker(notifyq.App().registry, WorkerConfig(queues={"default": None}), None)
    await worker.outages.back_off("claim", refused.value)
    [line] = logged("PostgreSQL refuses what this worker needs")
    assert "t_payload_check" in line["error"]
    assert "secret" not in line["error"]
