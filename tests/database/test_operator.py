"""The role of a person who operates queues: what docs/operate.md shows, with no more than schema.sql's GRANTs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import notifyq

from ..helpers.running import working
from ..helpers.waiting import eventually

PAGE = (Path(__file__).parents[2] / "docs" / "operate.md").read_text(encoding="utf-8")
_SQL = "\n".join(re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL))
RECIPES = re.findall(r"^[A-Z].*?;", _SQL, re.DOTALL | re.MULTILINE)
RUNNING = """
UPDATE notifyq.task t SET worker = 1, attempts = 1, processing_at = now() - interval '1 h'
FROM (SELECT id FROM notifyq.task WHERE type = $1) it WHERE it.id = t.id
"""


@pytest.fixture
async def filled(as_role: Any) -> Any:
    """Tasks in every state, with all options. They are inserted by the worker's role, which may do all of it."""
    worker = await as_role("worker")
    for table in ("task", "finished", "queue", "slot_released", "cron", "dependency"):
        await worker.execute(f"DELETE FROM notifyq.{table}")
    for name, options in (
        ("READY", None), ("RUNNING", None), ("ORDERED", '{"order_key": "o"}'), ("DEAD", '{"unique_key": "k"}'),
        ("LIMITED", '{"limit_key": "l", "limit_running": 1}'), ("GONE", '{"order_key": "p"}'),
    ):  # fmt: skip
        await worker.execute(
            "INSERT INTO notifyq.task (type, queue, options) VALUES ($1, 'mail', $2)",
            name,
            options and options.encode(),
        )
    first: int = await worker.fetchval("SELECT min(id) FROM notifyq.task")
    await worker.execute(
        "INSERT INTO notifyq.task (type, options) VALUES ('AFTER', jsonb_build_object('after', ARRAY[$1::int8]))",
        first,
    )
    await worker.execute("INSERT INTO notifyq.task (type, run_at) VALUES ('LATER', now() + interval '1 day')")
    for name in ("RUNNING", "ORDERED"):
        await worker.execute(RUNNING, name)
    for name, state in (("DEAD", "dead"), ("GONE", "cancelled")):
        await worker.execute(
            "WITH gone AS (DELETE FROM notifyq.task WHERE type = $1 RETURNING *) INSERT INTO notifyq.finished"
            " (id, created_at, run_at, processed_at, priority, attempts, max_attempts, state, queue, type, payload,"
            " options)"
            " SELECT id, created_at, run_at, now(), priority, 1, 10, $2, queue, type, payload, options FROM gone",
            name,
            state,
        )
    await worker.execute(
        "INSERT INTO notifyq.cron (name, expression, tz, type, payload, queue, priority, missed)"
        " VALUES ('nightly', '0 3 * * *', 'UTC', 'NIGHTLY', '{}', 'default', 0, 'once')"
    )
    return worker


async def test_what_an_operator_may(as_role: Any, filled: Any) -> None:
    """Each function does what it does for the worker's role, also on tasks that others wait for."""
    conn = await as_role("operator")
    ids = {row["type"]: row["id"] for row in await filled.fetch("SELECT id, type FROM notifyq.all_tasks")}
    for call, answer in (
        ("notifyq.pause('mail')", True),
        ("notifyq.limit_queue('mail', running => 20, rate => 100, seconds => 60) IS NULL", False),
        ("notifyq.resume('mail')", True),
        *((f"notifyq.retry({ids[it]})", True) for it in ("DEAD", "GONE", "LATER")),
        *((f"notifyq.cancel({ids[it]})", True) for it in ("READY", "RUNNING", "ORDERED", "LIMITED", "AFTER", "LATER")),
        ("notifyq.cron_run('nightly') > 0", True),
        ("notifyq.cron_pause('nightly')", True),
        ("notifyq.cron_resume('nightly')", True),
    ):
        found = await conn.fetchval(f"SELECT {call}")
        assert found is answer or "limit_queue" in call, call
    states = {row["type"]: row["state"] for row in await conn.fetch("SELECT type, state FROM notifyq.all_tasks")}
    assert states == {
        **dict.fromkeys(("READY", "RUNNING", "ORDERED", "LIMITED", "AFTER", "LATER"), "cancelled"),
        **dict.fromkeys(("DEAD", "GONE", "NIGHTLY"), "ready"),
    }


async def test_what_an_operator_may_not(as_role: Any, filled: Any) -> None:
    """It may not be a worker, nor change what a task is, nor the schema."""
    conn = await as_role("operator")
    for statement in (
        "INSERT INTO notifyq.worker (name, queues) VALUES ('x', '{}')",
        "UPDATE notifyq.task SET payload = '{}'",
        "UPDATE notifyq.task SET worker = 1",
        "UPDATE notifyq.finished SET state = 'done'",
        "UPDATE notifyq.cron SET type = 'X'",
        "TRUNCATE notifyq.task",
        "DROP TABLE notifyq.slot_released",
        "CREATE TABLE notifyq.mine ()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await conn.execute(statement)


@pytest.mark.parametrize("statement", RECIPES)
async def test_the_recipes(as_role: Any, filled: Any, statement: str) -> None:
    """Each statement of docs/operate.md is run by itself, by this role."""
    conn = await as_role("operator")
    await conn.execute(statement)


async def test_the_connections_of_a_worker(dsn: str, db: Any) -> None:
    """They are those of the page's table, and the transaction of `notifyq bell N` holds no snapshot."""
    app = notifyq.App()

    class Some(notifyq.Task):
        pass

    @app.handler
    async def some(task: Some) -> None: ...

    async def kinds() -> list[str]:
        rows = await db.fetch(
            "SELECT application_name FROM pg_stat_activity"
            " WHERE application_name LIKE 'notifyq %' AND datname = current_database() AND pid <> pg_backend_pid()"
        )
        return sorted(row[0].removeprefix("notifyq ") for row in rows)

    async with working(app, dsn) as worker:
        id = worker.info.id
        await eventually(kinds, [f"bell {id}", f"claims {id}", f"heartbeat {id}", "settle"])
        bell = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'notifyq bell %'"
            " AND datname = current_database() AND state = 'idle in transaction' AND backend_xmin IS NULL"
        )
        await eventually(lambda: db.fetchval(bell), 1)
    for kind in ("app", "bell", "claims", "cli", "client", "handler", "heartbeat", "payloads", "results", "settle"):
        assert f"`notifyq {kind}" in PAGE
