"""Which indexes each statement reads, and that it reads no more than it returns.

The plans are asserted on 300,000 rows each of history, backlog and future tasks, under statistics of several moments:
the statistics of a queue are always out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import pytest

from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.worker import job as claims
from notifyq.worker.cursors import FromCursor

from ..helpers.databases import Sessions, admin
from ..helpers.plans import MOMENTS, rolled_back, touched
from ..helpers.statements import insert, register
from .test_statements import STATEMENTS, WORKERS


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


MANY = 300_000
BACKLOG = f"""
    INSERT INTO notifyq.task (type, run_at, worker, attempts, withheld)
    SELECT CASE WHEN i <= 1000 THEN 'Strange' ELSE 'Known' END,
           CASE WHEN i % 2 = 0 THEN now() + i * interval '1 second' ELSE now() END,
           CASE WHEN i BETWEEN 1001 AND 2000 THEN 1 END, (i BETWEEN 1001 AND 2000)::integer, i <= 1000
    FROM generate_series(1, 2 * {MANY}) AS i"""
HISTORY = f"""
    INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority, attempts, state, queue,
                                  type, worker, payload)
    SELECT 10000000 + i, at, at, at, at, 0, 1, CASE WHEN i % 10 = 0 THEN 'dead' ELSE 'done' END, 'default',
           'Known', 'host:1', '{{}}'
    FROM (SELECT i, now() - interval '1 second' * ({MANY} - i) AS at FROM generate_series(1, {MANY}) AS i) AS s"""


@pytest.fixture(scope="module")
async def crowd(server: Server, template: str) -> AsyncIterator[str]:
    """A database with 300,000 finished, 300,000 ready and 300,000 scheduled tasks, a thousand running ones, and a
    thousand that no worker here handles."""
    await admin(server, f"CREATE DATABASE crowd TEMPLATE {template}")

    async def fill(statement: str, then: str) -> None:
        conn = await connection.connect(server.dsn("crowd"), role="test")
        await conn.execute(statement, timeout=100)
        await conn.execute(then, timeout=100)
        await conn.close()

    async with anyio.create_task_group() as group:
        group.start_soon(fill, BACKLOG, "VACUUM (ANALYZE) notifyq.task")
        group.start_soon(fill, HISTORY, "VACUUM (ANALYZE) notifyq.finished")
    conn = await connection.connect_worker(server.dsn("crowd"), "test")
    await register(conn)
    await conn.execute("UPDATE notifyq.worker SET id = 1")
    await conn.close()
    yield server.dsn("crowd")
    await admin(server, "DROP DATABASE crowd WITH (FORCE)")


@pytest.fixture(scope="module")
async def sessions(crowd: str) -> AsyncIterator[dict[str, Any]]:
    """A worker's connection for each moment, and a person's, in the crowded database."""
    conns: dict[str, Any] = {}
    for moment in MOMENTS:
        conns[moment] = await connection.connect_worker(crowd, "test")
        conns[f"person, {moment}"] = await connection.connect(crowd, role="test")
    yield conns
    for conn in conns.values():
        conn.terminate()


async def plan_of(conn: Any, name: str) -> list[dict[str, Any]]:
    """The nodes of the plan that asyncpg's prepared statement runs with: the generic one."""
    count = len((await conn.prepare(SQL[name])).get_parameters())
    arguments = f"({', '.join(['NULL'] * count)})" if count else ""
    await conn.execute(f"PREPARE planned AS {SQL[name]}")
    plan = json.loads(await conn.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE planned{arguments}"))
    await conn.execute("DEALLOCATE planned")
    nodes, todo = [], [plan[0]["Plan"]]
    while todo:
        nodes.append(todo.pop())
        todo += nodes[-1].get("Plans", [])
    return nodes


def assert_plan(name: str, nodes: list[dict[str, Any]]) -> None:
    used = set()
    for node in nodes:
        relation, index = node.get("Relation Name"), node.get("Index Name", "")
        if index.startswith(("task_", "finished_")):
            used.add(index)
            # list_unowned.sql asks about all that is running, and read_highest_ids.sql reads only the last entry.
            assert "Index Cond" in node or name in ("list_unowned", "read_highest_ids"), (
                f"{name} reads all of {index}: {node}"
            )
        elif relation in ("task", "finished") and "Scan" in node["Node Type"]:
            assert node["Node Type"] == "Bitmap Heap Scan", f"{name}: {node}"
        assert node["Node Type"] != "Sort" or name in (
            "claim_fitting",
            "claim_from_cursor_fitting",
            "register_crons",
            "hand_back_all",
            "rescue",
            "read_predecessor_results",
            "list_crashed",
            "send_heartbeat",
        ), f"{name} sorts: {node}"
    assert " ".join(sorted(used)) == STATEMENTS[name].indexes


@pytest.mark.parametrize("moment", MOMENTS)
async def test_plans_in_a_crowd(sessions: dict[str, Any], moment: str) -> None:
    conn = sessions[moment]
    async with rolled_back(conn, moment):
        for name in WORKERS:
            assert_plan(name, await plan_of(conn, name))


async def test_plans_in_an_empty_database(worker: Any) -> None:
    """A plan made here may be kept for hours."""
    for name in WORKERS:
        assert_plan(name, await plan_of(worker, name))


@pytest.mark.parametrize("name", [name for name in STATEMENTS if name.startswith("claim")])
async def test_a_claim_calls_no_function_for_a_plain_task(worker: Any, name: str) -> None:
    """PostgreSQL inlines them; and no claim reads options, which may be large, compressed and out of line."""
    count = len((await worker.prepare(SQL[name])).get_parameters())
    await worker.execute(f"PREPARE planned AS {SQL[name]}")
    plan = await worker.fetch(f"EXPLAIN (VERBOSE) EXECUTE planned({', '.join(['NULL'] * count)})")
    text = "\n".join(row[0] for row in plan)
    assert "expires_at IS NOT NULL" in text
    assert set(re.findall(r"notifyq\.(\w+)\(", text)) <= {"decompress_payload", "choose_fitting"}
    assert "options" not in text


@pytest.mark.parametrize("moment", MOMENTS)
async def test_nothing_reads_more_than_it_returns(sessions: dict[str, Any], moment: str) -> None:
    """Of ten tasks: a few dozen index entries each, with 900,000 rows around them."""
    conn = sessions[moment]
    async with rolled_back(conn, moment):
        free: dict[str, int] = {"default": 10, "empty": 10}
        most = {}
        for name, *rest in (
            ("finish", ["done"] * 10, [], [], True),
            ("retry_later", [1.0] * 10, [b"{}"] * 10),
            ("hand_back",),
            ("release_unhandled",),
        ):
            jobs, most["claim"] = await touched(conn, lambda: claims.claim(conn, 1, free, 10))
            args = [[job.id for job in jobs], [job.attempt for job in jobs], *rest]
            rows, most[name] = await touched(conn, lambda name=name, args=args: conn.fetch(SQL[name], 1, *args))  # type: ignore[misc]
            assert len(jobs) == len(rows) == 10
        for beside, from_cursor in {"": None, "_onward": FromCursor(["default"], [0], [1])}.items():
            threads = claims.Threads(["Other", "Known"], [1, 4], [0, 2], 1)
            jobs, most[f"claim{beside}_fitting"] = await touched(
                conn,
                partial(claims.claim, conn, 1, free, 10, from_cursor=from_cursor, threads=threads),
            )
            assert len(jobs) == 6
        rows, most["list_next_types"] = await touched(
            conn, lambda: conn.fetch(SQL["list_next_types"], ["default", "empty"])
        )
        assert [tuple(row) for row in rows] == [("default", "Known")]
        jobs, most["claim_unhandled"] = await touched(
            conn, lambda: claims.claim(conn, 1, free, 10, unhandled=["Strange", "Other"])
        )
        assert len(jobs) == 10
        args = [len(jobs), "ok", [job.id for job in jobs], [job.attempt for job in jobs]]
        row, most["send_heartbeat"] = await touched(
            conn, lambda: conn.fetchrow(SQL["send_heartbeat"], 1, *args, ["default"], ["Strange"], True)
        )
        assert row["lost"] == []
        assert row["unhandled"]
        await insert(conn, 10, created_at="2000-01-01", run_at="2001-01-01")
        row, most["check_due"] = await touched(
            conn, lambda: conn.fetchrow(SQL["check_due"], ["default"], ["default"], 10, None, None)
        )
        assert row["promoted"] == 10
        count, most["prune_finished"] = await touched(
            conn, lambda: conn.fetchval(SQL["prune_finished"], 60.0, 60.0, 5, None)
        )
        assert count == 10
        assert max(most.values()) <= 200, most  # one transaction: each steps over what those before left


async def test_a_claim_costs_the_same_in_a_crowd(sessions: dict[str, Any], worker: Any) -> None:
    """Pages that a claim of ten looks at: a level or two more of each index it descends, and nothing else."""
    await register(worker)
    await worker.execute("UPDATE notifyq.worker SET id = 1")
    await worker.execute("INSERT INTO notifyq.task (type) SELECT 'Known' FROM generate_series(1, 10)")
    pages = []
    for conn in (worker, sessions["counted now"]):
        async with rolled_back(conn):
            await conn.execute(f"PREPARE costed AS {SQL['claim']}")
            plan = await conn.fetchval("""EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON)
                                          EXECUTE costed(1, '{default,empty}', '{10,10}', 10, 16384)""")
        top = json.loads(plan)[0]["Plan"]
        assert top["Actual Rows"] == 10
        pages.append(top["Shared Hit Blocks"] + top["Shared Read Blocks"])
    small, crowded = pages
    assert crowded < 200
    assert crowded < 3 * small, pages


async def test_claims_from_a_cursor_step_over_no_dead_entries(worker: Any, connect: Sessions, db: Any) -> None:
    """A snapshot is held, so the entries of a thousand finished tasks stay in the index. A claim, or a look for what is
    due, that begins at the head reads them all; one that begins at a cursor reads none."""
    me = await register(worker)
    await insert(worker, 1010)
    await db.execute(
        """INSERT INTO notifyq.task (type, created_at, run_at)
           SELECT 'Known', '2000-01-01', timestamptz '2001-01-01' + i * interval '1 s'
           FROM generate_series(1, 1010) AS i"""
    )
    await db.execute("VACUUM notifyq.task")
    await (await connect()).execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    row = await worker.fetchrow(SQL["check_due"], ["default"], [], 1000, None, None)
    assert row["promoted"] == 1000
    jobs = await claims.claim(worker, me, {"default": 2000}, 2000)
    await worker.fetch(
        SQL["finish"], me, [j.id for j in jobs], [j.attempt for j in jobs], ["done"] * 2000, [], [], True
    )
    later = await db.fetchval("SELECT min(run_at) FROM notifyq.task WHERE run_at > created_at AND NOT promoted")
    for name, run, from_cursor in (
        ("claim", lambda mark: claims.claim(worker, me, {"default": 5}, 5, from_cursor=mark),
         FromCursor(["default"], [0], [max(job.id for job in jobs)])),
        ("check_due", lambda cursor: worker.fetch(SQL["check_due"], ["default"], [], 5, None, cursor), later),
    ):  # fmt: skip
        async with rolled_back(worker):
            _, front = await touched(worker, lambda run=run: run(None))  # type: ignore[misc]
        async with rolled_back(worker):
            rows, marked = await touched(worker, lambda run=run, from_cursor=from_cursor: run(from_cursor))  # type: ignore[misc]
        assert rows
        assert marked < 50, (name, marked)
        assert front >= 1000, (name, front)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_what_people_call_is_looked_up_too(sessions: dict[str, Any], moment: str) -> None:
    """The connection is an ordinary one, on which the planner chooses freely."""
    conn = sessions[f"person, {moment}"]
    ready, scheduled, running, dead, done = 3001, 3002, 1001, 10_000_010, 10_000_011
    for query, id, want in (
        ("SELECT notifyq.cancel($1)", ready, True),
        ("SELECT notifyq.cancel($1)", scheduled, True),
        ("SELECT notifyq.cancel($1)", running, True),
        ("SELECT notifyq.cancel($1)", dead, False),
        ("SELECT notifyq.retry($1)", dead, True),
        ("SELECT notifyq.retry($1)", scheduled, True),
        ("SELECT notifyq.retry($1)", done, False),
        ("SELECT notifyq.retry($1)", ready, False),
        ("SELECT id = $1 FROM notifyq.all_tasks WHERE id = $1", ready, True),
        ("SELECT id = $1 FROM notifyq.all_tasks WHERE id = $1", dead, True),
    ):
        async with rolled_back(conn, moment):
            result, count = await touched(conn, lambda query=query, id=id: conn.fetchval(query, id))  # type: ignore[misc]
        assert (result, count) == (want, min(count, 6)), f"{query} of {id} read {count}"


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_unique_task_looks_up_one(sessions: dict[str, Any], moment: str) -> None:
    """It is enqueued and kept on an ordinary connection, with 900,000 rows around it."""
    conn = sessions[f"person, {moment}"]
    query = """SELECT notifyq.enqueue('Known', options => '{"unique_key": "k"}')"""
    async with rolled_back(conn, moment):
        id, first = await touched(conn, lambda: conn.fetchval(query))
        again, second = await touched(conn, lambda: conn.fetchval(query))
    assert id == again
    assert max(first, second) <= 10, (first, second)


CALLS = 600
READY = "INSERT INTO notifyq.task (type) SELECT 'Known' FROM generate_series(1, 600)"
PEOPLE_CALL = {  # what fills the tables, and what is called for each row
    "cancel": (READY, "SELECT count(notifyq.cancel(t.id)) FROM notifyq.task t"),
    "retry": (HISTORY.replace("'done'", "'dead'"), "SELECT count(notifyq.retry(f.id)) FROM notifyq.finished f"),
    "enqueue": (
        "SELECT",
        """SELECT count(notifyq.enqueue('Known', options => jsonb_build_object('unique_key', (i / 2)::text)))
           FROM generate_series(2, 601) AS i""",
    ),
}


async def count_empty(db: Any) -> None:
    """VACUUM leaves the pages that an earlier test used, and with these the planner takes an index."""
    await db.execute("TRUNCATE notifyq.task, notifyq.finished, notifyq.unique_key")
    await db.execute("VACUUM (ANALYZE) notifyq.task, notifyq.finished, notifyq.unique_key")


@pytest.mark.parametrize("name", PEOPLE_CALL)
async def test_many_calls_look_up_one_row_each(db: Any, name: str) -> None:
    """The connection is an ordinary one, and has called the function before. Its plans are from when the tables were
    empty, and counted as that."""
    fill, call = PEOPLE_CALL[name]
    await count_empty(db)
    for _ in range(10):
        await db.execute("SELECT notifyq.cancel(1), notifyq.retry(1), notifyq.find_unique_task('')")
    async with rolled_back(db):
        await db.execute(fill.replace(str(MANY), str(CALLS)))
        count, read = await touched(db, lambda: db.fetchval(call))
    assert count == CALLS
    assert read < 20 * CALLS


async def test_handlers_transactions_look_up_one_row_each(worker: Any, db: Any) -> None:
    """So do their ends, on connections with the user's settings."""
    me = await register(worker)
    await count_empty(db)
    async with rolled_back(db):
        await db.execute(READY)
        await db.execute("UPDATE notifyq.task SET worker = $1, attempts = 1", me)
        ids = [row[0] for row in await db.fetch("SELECT id FROM notifyq.task")]

        async def settle() -> None:
            for id in ids:
                assert await db.fetchrow(SQL["finish_in_transaction"], me, id, 1, True)

        _, read = await touched(db, settle)
    assert read < 20 * CALLS


async def test_the_newest_tasks_are_read_from_the_end(sessions: dict[str, Any]) -> None:
    conn = sessions["person, counted now"]
    async with conn.transaction():
        rows, count = await touched(conn, lambda: conn.fetch(SQL["list_tasks"], None, None, None, 20, False))
    assert len(rows) == 20
    assert count <= 100
