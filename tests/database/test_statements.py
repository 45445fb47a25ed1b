"""Each statement of notifyq/sql: what it takes and returns, which indexes it reads, and what it does.

The plans are asserted on 300,000 rows each of history, backlog and future tasks, and with statistics of every kind
of moment: a queue's statistics are always of another one. On this data nothing may read more than it returns.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from random import Random
from typing import Any, NamedTuple

import anyio
import asyncpg
import pytest

from notifyq.client.options import Options
from notifyq.database import connection, errors, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.worker import job as claims
from notifyq.worker.cursors import FromCursor
from notifyq.worker.left_out import LeftOut

from ..helpers.databases import Sessions, admin, overload
from ..helpers.machine import limit
from ..helpers.plans import MOMENTS, rolled_back, touched
from ..helpers.verbs import reclaim_unowned, rescue, unseen

ROW = (
    "id:int8 attempts:int2 type:text queue:text priority:int2 max_attempts:int2 created_at:timestamptz payload:jsonb"
    " needs_admission:bool crashes:int2"
)


class Statement(NamedTuple):
    parameters: str
    columns: str
    indexes: str | None  # of task and finished, each used with a condition; None: for people, on an ordinary connection


STATEMENTS = {
    "admit": Statement("int4 int8[] int2[]", "id:int8 waits_for:text", ""),
    "claim_unhandled": Statement("int4 text[] int4[] int4 text[] int4", ROW, "task_pkey task_unhandled"),
    "advance_clock": Statement("float8", "count:int8", None),
    "read_and_await": Statement(
        "int8[]",
        "id:int8 state:text type:text result:jsonb error:text progress:float4 note:text"
        " created_at:timestamptz marked:bool later:bool",
        "finished_pkey task_pkey",
    ),
    "send_heartbeat_only": Statement("int4", "", ""),
    "read_transaction_status": Statement("text", "status:text", ""),
    "cancel_if_created_at": Statement("int8 timestamptz", "cancelled:bool created_at:timestamptz", None),
    "claim": Statement("int4 text[] int4[] int4 int4", ROW, "task_pkey task_ready"),
    "claim_from_cursor": Statement("int4 text[] int4[] int4 text[] int2[] int8[] int4", ROW, "task_pkey task_ready"),
    "claim_fitting": Statement("int4 text[] int4[] int4 int4 text[] int4[] int4[] int4", ROW, "task_pkey task_ready"),
    "claim_from_cursor_fitting": Statement(
        "int4 text[] int4[] int4 text[] int2[] int8[] int4 text[] int4[] int4[] int4", ROW, "task_pkey task_ready"
    ),
    "claim_by_id": Statement("int4 int8[] int4", ROW, "task_pkey"),
    "list_claimable": Statement("text[] int4[] int4 int8[] text[] text[]", "id:int8", "task_ready task_unhandled"),
    "admit_running": Statement("int4 text[]", "admit_running:void", ""),
    "list_cron_conflicts": Statement(
        "text[] text[] text[] text[] text[] text[] int2[] text[] text[] int4",
        "name:text expression:text tz:text type:text queue:text worker:text",
        "",
    ),
    "list_due_crons": Statement(
        "text[] float8 text[] timestamptz[] timestamptz",
        "name:text expression:text tz:text missed:text next_at:timestamptz now:timestamptz since:timestamptz",
        "task_pkey",
    ),
    "enqueue_cron_slot": Statement("text timestamptz timestamptz bool", "moved:bool", ""),
    "register_crons": Statement("text[] text[] text[] text[] text[] text[] int2[] text[] text[]", "", ""),
    "remove_cron": Statement("text", "worker:text", None),
    "set_served_crons": Statement("int4 text[]", "", ""),
    "list_crons": Statement("", "cron:text name:text next_seconds:float8 last_seconds:float8", None),
    "read_django_result": Statement(
        "int8",
        "type:text queue:text priority:int2 state:text attempts:int2 created_at:timestamptz run_at:timestamptz "
        "processing_at:timestamptz processed_at:timestamptz payload:text result:text worker:text errors:text",
        None,
    ),
    "list_misdated": Statement("text", "failed:int8[] granted:int8[]", "task_scheduled"),
    "check_due": Statement(
        "text[] text[] int4 text timestamptz",
        "promoted:int8 next_seconds:float8 blocked:bool inserted:int8 slot_released:bool settings:text "
        "mark:timestamptz echo:text",
        "task_pkey task_ready task_scheduled",
    ),
    "end_backends": Statement("int4 text[] int8", "ended:int4 remaining:int4", ""),
    "read_final_states": Statement("int8[]", "id:int8 state:text", "finished_pkey"),
    "list_still_leased": Statement("int4 int8[] int2[]", "id:int8", "task_pkey"),
    "list_locked": Statement("int8[]", "id:int8", "task_pkey"),
    "enqueue": Statement("text text text float8 timestamptz int2 int2 text", "id:int8 created:int8", ""),
    "enqueue_many": Statement("text[] text[] text float8 timestamptz int2 int2 text", "id:int8", ""),
    "enqueue_many_placed": Statement("text[] text[] text[] float8 timestamptz int2[] int2 text[]", "id:int8", ""),
    "enqueue_then": Statement(
        "text[] text[] text[] float8 timestamptz int2[] int2 text[] text", "id:int8 created:int8 after:int8[]", ""
    ),
    "enqueue_many_unique": Statement(
        "text[] text[] text[] float8 timestamptz int2[] int2 text[]", "id:int8 key:text existed:bool", ""
    ),
    "enqueue_unique": Statement(
        "text text text float8 timestamptz int2 int2 text", "id:int8 created:int8 existed:bool", "task_pkey"
    ),
    "list_enqueued": Statement(
        "text",
        "id:int8 queue:text state:text priority:int2 run_at:timestamptz payload:text delay:float8",
        None,
    ),
    "list_findings": Statement("bool", "about:text problem:text cure:text", None),
    "finish": Statement("int4 int8[] int2[] text[] jsonb[] jsonb[] bool", "id:int8 slot_released:bool", "task_pkey"),
    "release_waiters": Statement("int4", "ready:int4", ""),
    "postpone_release": Statement("", "task:int8 queue:text order_key:text limit_key:text", ""),
    "forget_keys_of_future_ids": Statement("", "", "task_pkey"),
    "forget_older_outcomes": Statement("int4 int8[] int2[]", "id:int8", "finished_pkey task_pkey"),
    "read_highest_ids": Statement("", "highest:int8 last:int8", "finished_pkey task_pkey"),
    "hand_back": Statement("int4 int8[] int2[]", "id:int8 slot_released:bool", "task_pkey"),
    "find_lock_holder": Statement("text[]", "holder:text", None),
    "list_names": Statement("", "queues:text[] types:text[]", None),
    "list_next_types": Statement("text[]", "queue:text type:text", "task_ready"),
    "list_unowned": Statement("int8[]", "id:int8", "task_running"),
    "reclaim_unowned": Statement("int8[]", "count:int4", "task_pkey"),
    "measure_payloads": Statement("int4 int8[] int2[] int8", "id:int8 bytes:int8", "task_pkey"),
    "fetch_payloads": Statement("int4 int8[] int2[]", "id:int8 payload:jsonb", "task_pkey"),
    "write_progress": Statement("int4 int8[] int2[] float4[] text[]", "id:int8 told:text", "task_pkey"),
    "list_due": Statement("text[] int4 int8[]", "id:int8", "task_scheduled"),
    "promote_by_id": Statement("int8[]", "id:int8 promoted:bool", "task_pkey"),
    "prune_finished": Statement(
        "float8 float8 int4 timestamptz", "count:int4", "finished_dead finished_old finished_pkey"
    ),
    "prune_unique_keys": Statement("int4", "count:int4", "task_pkey"),
    "prune_rate_log": Statement("int4", "count:int4", ""),
    "list_unfinished": Statement("", "id:int8 type:text payload:jsonb", None),
    "list_queues": Statement("", "queue:text", None),
    "list_ran": Statement("timestamptz", "id:int8 state:text", None),
    "register_worker": Statement("text text[] text[] int2[] int4 float8", "id:int4", ""),
    "hand_back_all": Statement("int4 int8[]", "count:int4", "task_pkey task_running"),
    "rescue": Statement("int4 int4 float8 float8 int8[]", "name:text ready:int4 dead:int4", "task_pkey task_running"),
    "retry_later": Statement("int4 int8[] int2[] float8[] jsonb[]", "id:int8 slot_released:bool", "task_pkey"),
    "read_predecessor_results": Statement(
        "int8 int8", "id:int8 type:text state:text result:jsonb error:text left:int8", "finished_pkey task_pkey"
    ),
    "find_runnable": Statement("text[]", "queues:text[] next_seconds:float8 at:timestamptz", None),
    "list_served": Statement("text", "paused:bool queues:text[] types:text[]", None),
    "release_unhandled": Statement("int4 int8[] int2[]", "id:int8 slot_released:bool", "task_pkey"),
    "correct_misdated": Statement("int8[] int8[]", "changed:int4", "task_pkey"),
    "finish_in_transaction": Statement("int4 int8 int2 bool", "xid:text slot_released:bool", "task_pkey"),
    "show_task": Statement("int8", "to_json:text", None),
    "read_stats": Statement("", "json_build_object:text", None),
    "recheck_waiting": Statement("text", "last:text", ""),
    "reclaim_unanswered": Statement("int4 int8[] int2[] int8[]", "count:int4", "task_running"),
    "list_crashed": Statement("text[] text[] int8[] int4", "id:int8 crashes:int4", "task_parked"),
    "count_by_state": Statement("", "type:text state:text n:int8", None),
    "list_tasks": Statement("text text text int8 bool", "task:text seconds:float8", None),
    "send_heartbeat": Statement(
        "int4 int4 text int8[] int2[] text[] text[] bool",
        "registered:bool lost:int8[] others:int4[] seen:float8[] unhandled:bool suspects:bool "
        "slot_released:bool wanted:bool",
        "task_parked task_pkey task_unhandled",
    ),
    "is_turn_stolen": Statement("int4", "exists:bool", ""),
    "unregister_worker": Statement("int4", "", "task_running"),
}
WORKERS = [name for name, statement in STATEMENTS.items() if statement.indexes is not None]


# --- What they take and return


def test_every_statement_is_in_the_table() -> None:
    assert sorted(SQL) == sorted(STATEMENTS)


@pytest.mark.parametrize("name", STATEMENTS)
async def test_it_prepares_with_these_types(name: str, worker: Any) -> None:
    """asyncpg encodes by these: a parameter without a cast that turns from int4 into text fails only when it runs."""
    statement = await worker.prepare(SQL[name])
    assert " ".join(p.name for p in statement.get_parameters()) == STATEMENTS[name].parameters
    assert " ".join(f"{a.name}:{a.type.name}" for a in statement.get_attributes()) == STATEMENTS[name].columns


async def test_it_prepares_beside_functions_of_extensions(worker: Any, db: Any) -> None:
    """Those that an extension adds under the names of PostgreSQL's own make no call ambiguous, or another's."""
    await overload(db)
    for name, statement in STATEMENTS.items():
        prepared = await worker.prepare(SQL[name])
        assert " ".join(p.name for p in prepared.get_parameters()) == statement.parameters, name


# --- Plans

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
    """A database with 300,000 tasks each that are finished, ready and scheduled; a thousand running, and aside."""
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


@pytest.mark.parametrize("moment", MOMENTS)
async def test_nothing_reads_more_than_it_returns(sessions: dict[str, Any], moment: str) -> None:
    """Of ten tasks: a few dozen index entries each, with 900,000 rows around them."""
    conn = sessions[moment]
    async with rolled_back(conn, moment):
        rooms: dict[str, int] = {"default": 10, "empty": 10}
        most = {}
        for name, *rest in (
            ("finish", ["done"] * 10, [], [], True),
            ("retry_later", [1.0] * 10, [b"{}"] * 10),
            ("hand_back",),
            ("release_unhandled",),
        ):
            jobs, most["claim"] = await touched(conn, lambda: claims.claim(conn, 1, rooms, 10))
            args = [[job.id for job in jobs], [job.attempt for job in jobs], *rest]
            rows, most[name] = await touched(conn, lambda name=name, args=args: conn.fetch(SQL[name], 1, *args))  # type: ignore[misc]
            assert len(jobs) == len(rows) == 10
        for beside, from_cursor in {"": None, "_onward": FromCursor(["default"], [0], [1])}.items():
            threads = claims.Threads(["Other", "Known"], [1, 4], [0, 2], 1)
            jobs, most[f"claim{beside}_fitting"] = await touched(
                conn,
                partial(claims.claim, conn, 1, rooms, 10, from_cursor=from_cursor, threads=threads),
            )
            assert len(jobs) == 6
        rows, most["list_next_types"] = await touched(
            conn, lambda: conn.fetch(SQL["list_next_types"], ["default", "empty"])
        )
        assert [tuple(row) for row in rows] == [("default", "Known")]
        jobs, most["claim_unhandled"] = await touched(
            conn, lambda: claims.claim(conn, 1, rooms, 10, unhandled=["Strange", "Other"])
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
    """Under a held snapshot the entries of a thousand finished tasks stay: a claim, or a look for what is due, that
    begins at the front reads them all, and one that begins at a mark none."""
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
        ("check_due", lambda mark: worker.fetch(SQL["check_due"], ["default"], [], 5, None, mark), later),
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
    """On an ordinary connection, where the planner has its way."""
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
    """Enqueued and kept, on an ordinary connection, with 900,000 rows around it."""
    conn = sessions[f"person, {moment}"]
    query = """SELECT notifyq.enqueue('Known', options => '{"unique_key": "k"}')"""
    async with rolled_back(conn, moment):
        id, first = await touched(conn, lambda: conn.fetchval(query))
        again, second = await touched(conn, lambda: conn.fetchval(query))
    assert id == again
    assert max(first, second) <= 10, (first, second)


async def test_the_newest_tasks_are_read_from_the_end(sessions: dict[str, Any]) -> None:
    conn = sessions["person, counted now"]
    async with conn.transaction():
        rows, count = await touched(conn, lambda: conn.fetch(SQL["list_tasks"], None, None, None, 20, False))
    assert len(rows) == 20
    assert count <= 100


# --- What they do


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


async def register(conn: Any, name: str = "host:1", **more: Any) -> int:
    options = {"types": ["Known"], "allowed": [10], "lease": 30.0, **more}
    args = (["default"], options["types"], options["allowed"], 100, options["lease"])
    id: int = await conn.fetchval(SQL["register_worker"], name, *args)
    return id


async def insert(conn: Any, count: int = 1, **columns: Any) -> list[int]:
    """`insert(db, 3, queue="mail")`: rows with these columns, each an SQL literal by itself."""
    columns = {"type": "Known", **columns}
    values = ", ".join("NULL" if v is None else "'" + str(v).replace("'", "''") + "'" for v in columns.values())
    rows = await conn.fetch(
        f"INSERT INTO notifyq.task ({', '.join(columns)}) SELECT {values} FROM generate_series(1, $1) RETURNING id",
        count,
    )
    return [row[0] for row in rows]


async def held(conn: Any, count: int = 1, worker: int | None = None, **columns: Any) -> tuple[int, list[int]]:
    """A worker that has claimed `count` tasks: its id and theirs."""
    await insert(conn, count, **columns)
    worker = worker or await register(conn)
    jobs = await claims.claim(conn, worker, {"default": count}, count)
    assert len(jobs) == count
    return worker, [job.id for job in jobs]


async def task(conn: Any, id: int) -> Any:
    return await conn.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id)


async def states(conn: Any) -> dict[int, str]:
    return {row[0]: row[1] for row in await conn.fetch("SELECT id, state FROM notifyq.all_tasks ORDER BY id")}


def ids(rows: Any) -> list[int]:
    return sorted(row[0] for row in rows)


async def test_claim_goes_by_priority_then_by_id(worker: Any) -> None:
    me = await register(worker)
    low, first, second, top, last = [
        (await insert(worker, priority=priority))[0] for priority in (-32768, 5, 5, 32767, 0)
    ]
    jobs = await claims.claim(worker, me, {"default": 3}, 3)
    assert [job.id for job in jobs] == [top, first, second]
    assert [job.id for job in await claims.claim(worker, me, {"default": 3}, 3)] == [last, low]


async def test_a_claim_from_a_cursor_sees_no_task_before_it(worker: Any) -> None:
    """By level: the highest priority of a queue first, within its room; what has no mark isn't looked at."""
    me = await register(worker)
    a = [await insert(worker, 4, queue="a", priority=priority) for priority in (0, 5)]
    b = await insert(worker, 4, queue="b")
    await insert(worker, 4, queue="b", priority=1)
    from_cursor = FromCursor(["a", "a", "b"], [5, 0, 0], [a[1][2], a[0][1], b[1]])
    jobs = await claims.claim(worker, me, {"a": 3, "b": 2}, 9, from_cursor=from_cursor)
    assert [job.id for job in jobs if job.queue == "a"] == [*a[1][2:], a[0][1]]
    assert [job.id for job in jobs if job.queue == "b"] == b[1:3]
    assert len(await claims.claim(worker, me, {"a": 9, "b": 9}, 2, from_cursor=from_cursor)) == 2
    assert [job.id for job in await claims.claim(worker, me, {"a": 9}, 9)] == [*a[1][:2], a[0][0]]


async def test_claim_keeps_to_each_queues_room_and_to_the_limit(worker: Any) -> None:
    me = await register(worker)
    for queue in "abc":
        await insert(worker, 5, queue=queue)
    jobs = await claims.claim(worker, me, {"a": 2, "b": 3, "nobody": 9}, 4)
    assert [job.queue for job in jobs] == ["a", "a", "b", "b"]
    jobs = await claims.claim(worker, me, {"b": 9, "a": 0}, 100)
    assert [job.queue for job in jobs] == ["b", "b", "b"]


async def test_a_claim_leaves_what_finds_no_thread(worker: Any, connect: Sessions) -> None:
    """Against a count of one task after the other; and another worker can have what it leaves."""
    me, random = await register(worker), Random(5)
    other = await connect()
    for _ in range(60):
        kinds = random.randint(1, 3)
        types = [f"Plain{n}" for n in range(kinds)]
        shares = [random.choice([1, 1, 2, 5]) for _ in types]
        threads = claims.Threads(types, shares, [random.randint(0, 6) for _ in types], random.randint(0, 4))
        levels = [random.randint(0, 1) for _ in range(24)]
        chosen = [random.choice([*types, "Async"]) for _ in levels]
        await worker.execute("INSERT INTO notifyq.task (type, priority) SELECT * FROM unnest($1::text[], $2::int2[])",
                             chosen, levels)  # fmt: skip
        rows = await worker.fetch("SELECT id, type, priority FROM notifyq.task ORDER BY priority DESC, id")
        limit = random.choice([1, 10, 24])
        want, held = [], dict(zip(types, threads.held, strict=True))
        spare = threads.spare
        for id, type, _ in rows[:limit]:
            if type in held:
                if held[type] % shares[types.index(type)] == 0:
                    if not spare:
                        continue
                    spare -= 1
                held[type] += 1
            want.append(id)
        from_cursor = random.choice([None, FromCursor(["default"] * 2, [1, 0], [1, 1])])
        jobs = await claims.claim(worker, me, {"default": limit}, limit, from_cursor=from_cursor, threads=threads)
        assert [job.id for job in jobs] == want, (threads, chosen, levels)
        assert threads.opened(jobs) == threads.spare - spare
        left = [id for id, _, _ in rows if id not in want]
        assert [job.id for job in await claims.claim(other, me, {"default": 24}, 24)] == left
        await worker.execute("DELETE FROM notifyq.task")


async def test_claim_says_what_a_handler_needs(worker: Any) -> None:
    me = await register(worker)
    (id,) = await insert(worker, payload='{"to": "ä"}', priority=7, max_attempts=3)
    (job,) = await claims.claim(worker, me, {"default": 1}, 1)
    assert (job.id, job.worker, job.attempt, job.priority, job.max_attempts) == (id, me, 1, 7, 3)
    assert (job.type, job.queue, job.payload) == ("Known", "default", '{"to": "ä"}'.encode())
    row = await task(worker, id)
    assert (row["state"], row["worker"], row["attempts"]) == ("running", "host:1", 1)
    assert row["processing_at"] > row["created_at"] == job.created_at


async def test_claim_leaves_what_is_running_scheduled_or_aside(worker: Any) -> None:
    me, _ = await held(worker, 1)
    await insert(worker, run_at="2999-01-01")
    await insert(worker, withheld=True)
    (promoted,) = await insert(worker, run_at="2999-01-01", promoted=True)
    (early,) = await insert(worker, run_at="-infinity")
    assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == [promoted, early]


async def test_two_claims_at_once_share(worker: Any, dsn: str) -> None:
    """The second steps over what the first has locked, without waiting; what the first rolls back is there again."""
    me = await register(worker)
    all_ids = await insert(worker, 5)
    other: Any = await connection.connect_worker(dsn, "test")
    transaction = other.transaction()
    await transaction.start()
    with anyio.fail_after(limit()):
        assert [job.id for job in await claims.claim(other, me, {"default": 2}, 2)] == all_ids[:2]
        assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == all_ids[2:]
        await transaction.rollback()
        assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == all_ids[:2]
    other.terminate()


async def test_a_worker_that_was_given_up_claims_nothing(worker: Any) -> None:
    (id,) = await insert(worker)
    await insert(worker, withheld=True)
    assert await claims.claim(worker, 99, {"default": 9}, 9) == []
    assert await claims.claim(worker, 99, {"default": 9}, 9, from_cursor=FromCursor(["default"], [0], [1])) == []
    assert await claims.claim(worker, 99, {"default": 9}, 9, unhandled=["Known"]) == []
    assert (await task(worker, id))["attempts"] == 0


@pytest.mark.parametrize("at", ["infinity", "-infinity", "20000-01-01", "4000-01-01 BC", "0001-01-01"])
async def test_an_odd_created_at_is_claimed_all_the_same(worker: Any, at: str) -> None:
    """It is a time that Python's datetime doesn't have, in one row of a batch that is already leased."""
    me = await register(worker)
    await insert(worker, 2)
    await insert(worker, created_at=at, run_at="-infinity")
    await insert(worker, created_at=at, withheld=True)
    assert len(await claims.claim(worker, me, {"default": 9}, 9)) == 3
    assert len(await claims.claim(worker, me, {"default": 9}, 9, unhandled=["Known"])) == 1


@pytest.mark.parametrize("attempts", [-32768, -1, 32766, 32767])
async def test_odd_attempts_are_claimed_all_the_same(worker: Any, attempts: int) -> None:
    """One row whose counter would overflow must not keep the whole queue from being claimed."""
    me = await register(worker)
    await insert(worker, attempts=attempts)
    await insert(worker, 2)
    jobs = await claims.claim(worker, me, {"default": 9}, 9)
    assert [job.attempt for job in jobs] == [min(attempts + 1, 32767), 1, 1]


async def test_a_claim_leaves_out_large_payloads(worker: Any) -> None:
    """By what they are when they aren't compressed: 1 MB of x is 12 kB on disk. Each claim statement does."""
    me = await register(worker)
    insert_one = """INSERT INTO notifyq.task (type, payload, withheld) SELECT 'Known', to_jsonb(text), $1
                    FROM (VALUES (repeat('x', 3000)), (repeat('x', 1000000)),
                                 ((SELECT string_agg(md5(n::text), '') FROM generate_series(1, 1000) n)))
                         AS v (text) RETURNING id"""
    for statement in ("claim", "claim_from_cursor", "claim_fitting", "claim_from_cursor_fitting", "claim_unhandled"):
        all_ids = [row[0] for row in await worker.fetch(insert_one, statement == "claim_unhandled")]
        stored = "SELECT pg_column_size(payload) < 16000 FROM notifyq.task WHERE id = $1"
        assert await worker.fetchval(stored, all_ids[1]), "compressed"
        from_cursor = FromCursor(["default"], [0], [1]) if "onward" in statement else None
        aside = ["Known"] if statement == "claim_unhandled" else None
        threads = claims.Threads([], [], [], 0) if "fitting" in statement else None
        jobs = await claims.claim(
            worker, me, {"default": 9}, 9, from_cursor=from_cursor, unhandled=aside, threads=threads
        )
        assert [job.id for job in jobs] == all_ids
        assert [job.payload is None for job in jobs] == [False, True, True], statement
        assert jobs[0].payload == b'"' + b"x" * 3000 + b'"'
        await worker.execute("UPDATE notifyq.task SET worker = NULL, withheld = $1", statement == "claim_unhandled")
        jobs = await claims.claim(
            worker, me, {"default": 9}, 9, from_cursor=from_cursor, unhandled=aside, threads=threads, blind=True
        )
        assert [job.payload for job in jobs] == [None] * 3
        await worker.execute("DELETE FROM notifyq.task")


async def test_a_claim_for_many_takes_smaller_payloads_with_it(worker: Any) -> None:
    """All that an answer can hold is bounded, so what each may have depends on how many there may be."""
    me = await register(worker)
    text = "SELECT string_agg(sha256(n::text::bytea)::text, '') FROM generate_series(1, 200) n"
    for room, inline in ((100, True), (1000, False)):
        (id,) = await insert(worker)
        await worker.execute(f"UPDATE notifyq.task SET payload = to_jsonb(({text})) WHERE id = $1", id)
        (job,) = await claims.claim(worker, me, {"default": room}, room)
        assert (job.payload is not None) is inline


async def test_sizes_are_asked_for_up_to_so_many_bytes(worker: Any) -> None:
    """At least one. Who has lost its lease is told so, and what isn't asked for isn't in the answer."""
    me, mine = await held(worker, 4)
    await worker.execute("UPDATE notifyq.task SET payload = to_jsonb(repeat('x', 98))")
    await worker.execute("UPDATE notifyq.task SET attempts = 2 WHERE id = $1", mine[0])

    async def sizes(most: int) -> list[tuple[int, int | None]]:
        return [tuple(row) for row in await worker.fetch(SQL["measure_payloads"], me, mine, [1] * 4, most)]

    assert await sizes(1) == [(mine[0], None), (mine[1], 100)]
    assert await sizes(101) == [(mine[0], None), (mine[1], 100), (mine[2], 100)]
    assert len(await sizes(10**9)) == 4
    assert await worker.fetch(SQL["measure_payloads"], me, [], [], 1) == []
    got = await worker.fetch(SQL["fetch_payloads"], me, mine, [1] * 4)
    assert {row[0]: len(row[1]) for row in got} == dict.fromkeys(mine[1:], 100)


HOSTILE = [
    "it's",
    '"quoted"',
    "'); DROP SCHEMA notifyq CASCADE; --",
    "back\\slash",
    "{a,b}",
    "NULL",
    "$1",
    "%s",
    " ",
    "new\nline",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "a\u0301\u202e",
    "\U0001f600" * 200,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_names_of_queues_and_types(worker: Any, name: str) -> None:
    """Through every array and every statement, to the end and back; 200 characters of four bytes fit each index."""
    me = await register(worker, types=[name])
    await insert(worker, 2, queue=name, type=name)
    jobs = await claims.claim(worker, me, {name: 9}, 9)
    keys = [job.id for job in jobs], [job.attempt for job in jobs]
    assert {(job.queue, job.type) for job in jobs} == {(name, name)}
    assert len(await worker.fetch(SQL["release_unhandled"], me, *keys)) == 2
    assert (await worker.fetchrow(SQL["send_heartbeat"], me, 0, "ok", [], [], [name], [name], False))["unhandled"]
    assert len(await claims.claim(worker, me, {name: 9}, 9, unhandled=[name])) == 2
    assert len(await worker.fetch(SQL["finish"], me, *keys, ["done"] * 2, [], [], True)) == 2
    assert await worker.fetchval("SELECT count(*) FROM notifyq.all_tasks WHERE queue = $1 AND type = $1", name) == 2


@pytest.mark.parametrize("length", [201, 1_000_000])
async def test_a_type_that_is_too_long_to_be_one_is_claimed_cut(worker: Any, length: int) -> None:
    """201 characters of it tell that it is, and are all that a worker has to hold. The row keeps it whole."""
    me = await register(worker)
    (id,) = await insert(worker, type="x" * length)
    for from_cursor in (None, FromCursor(["default"], [0], [id])):
        (job,) = await claims.claim(worker, me, {"default": 9}, 9, from_cursor=from_cursor)
        assert (job.id, job.type) == (id, "x" * 201)
        assert len(await worker.fetch(SQL["hand_back"], me, [id], [1])) == 1
    assert await worker.fetchval("SELECT length(type) FROM notifyq.task WHERE id = $1", id) == length


async def test_a_queue_of_201_characters_is_nobodys(worker: Any) -> None:
    """No worker can be given it (test_config). It is in nobody's way, and a person sees it and can cancel it."""
    me = await register(worker)
    (id,) = await insert(worker, queue="x" * 201)
    (good,) = await insert(worker)
    assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == [good]
    assert (await task(worker, id))["state"] == "ready"
    assert await worker.fetchval("SELECT notifyq.cancel($1)", id)


async def test_adopt_takes_only_what_is_aside_and_known(worker: Any) -> None:
    me = await register(worker)
    await insert(worker)
    await insert(worker, withheld=True, type="Strange")
    await insert(worker, withheld=True, queue="mail")
    low, high = (await insert(worker, withheld=True))[0], (await insert(worker, withheld=True, priority=1))[0]
    jobs = await claims.claim(worker, me, {"default": 9}, 9, unhandled=["Known", "Other"])
    assert [job.id for job in jobs] == [high, low]
    assert await worker.fetchval("SELECT count(*) FROM notifyq.task WHERE withheld") == 2
    assert await claims.claim(worker, me, {"default": 1, "mail": 0}, 9, unhandled=["Strange"]) != []


async def test_due_promotes_and_tells_the_next(worker: Any) -> None:
    past: dict[str, Any] = {"created_at": "2000-01-01", "run_at": "2001-01-01"}
    overdue = await insert(worker, 3, **past)
    await insert(worker, queue="other", **past)
    await insert(worker, run_at="2999-01-01")
    (soon,) = await insert(worker)
    await worker.execute("UPDATE notifyq.task SET run_at = created_at + interval '1 h' WHERE id = $1", soon)
    row = await worker.fetchrow(SQL["check_due"], ["default", "none"], [], 2, None, None)
    assert row["promoted"] == 2, "at most so many"
    row = await worker.fetchrow(SQL["check_due"], ["default", "none"], [], 2, None, None)
    assert row["promoted"] == 1
    assert 3590 < row["next_seconds"] <= 3600
    assert (row["blocked"], row["inserted"], row["echo"]) == (False, 6, None)
    assert {id for id, state in (await states(worker)).items() if state == "ready"} == set(overdue)


async def test_due_sees_what_waits_in_a_queue_without_room(worker: Any) -> None:
    assert not (await worker.fetchrow(SQL["check_due"], [], ["default"], 9, None, None))["blocked"]
    await insert(worker, run_at="2999-01-01")
    assert not (await worker.fetchrow(SQL["check_due"], [], ["default"], 9, None, None))["blocked"]
    await insert(worker)
    assert (await worker.fetchrow(SQL["check_due"], [], ["none", "default"], 9, None, None))["blocked"]


@pytest.mark.parametrize("at", ["infinity", "294276-12-31 23:59:59"])
async def test_a_run_at_beyond_all_days_stops_nobody(worker: Any, at: str) -> None:
    await insert(worker, run_at=at)
    row = await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    assert row["next_seconds"] > 9e12
    await insert(worker, run_at="2999-01-01")
    assert (await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None))["next_seconds"] < 9e12


async def test_due_of_two_workers_at_once(worker: Any, dsn: str) -> None:
    """A row that another promotes at this moment is stepped over, and isn't told as the next one either."""
    await insert(worker, 2, created_at="2000-01-01", run_at="2001-01-01")
    other: Any = await connection.connect_worker(dsn, "test")
    transaction = other.transaction()
    await transaction.start()
    assert (await other.fetchrow(SQL["check_due"], ["default"], [], 9, None, None))["promoted"] == 2
    with anyio.fail_after(limit()):
        row = await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    assert (row["promoted"], row["next_seconds"]) == (0, None)
    await transaction.rollback()
    other.terminate()


FENCED: dict[str, list[Any]] = {
    "finish": [["done"], [], [], True],
    "retry_later": [[0.0], [b'{"error": "x"}']],
    "hand_back": [],
    "release_unhandled": [],
}


@pytest.mark.parametrize("name", [*FENCED, "finish_in_transaction"])
async def test_a_lost_lease_settles_nothing(worker: Any, name: str) -> None:
    """Not another worker's, not another attempt's, not an unknown id's: the row stays as it is, to the last column."""

    async def settle(by: int, target: int, attempt: int) -> list[Any]:
        if name == "finish_in_transaction":  # one task, and it returns no id
            return list(await worker.fetch(SQL[name], by, target, attempt, True))
        return ids(await worker.fetch(SQL[name], by, [target], [attempt], *FENCED[name]))

    me, (id,) = await held(worker)
    other = await register(worker, "other:1")
    (unclaimed,) = await insert(worker)
    before = await worker.fetch("SELECT * FROM notifyq.task ORDER BY id")
    for by, target, attempt in (
        (other, id, 1),
        (me, id, 2),
        (me, id, 0),
        (me, unclaimed, 0),
        (me, unclaimed, 1),
        (me, 10**15, 1),
        (99, id, 1),
    ):
        assert await settle(by, target, attempt) == []
        assert await worker.fetch("SELECT * FROM notifyq.task ORDER BY id") == before
    assert await worker.fetchval("SELECT count(*) FROM notifyq.finished") == 0
    assert len(await settle(me, id, 1)) == 1
    assert await settle(me, id, 1) == [], "a second time nothing"


@pytest.mark.parametrize("name", FENCED)
async def test_a_batch_applies_to_what_is_still_held(worker: Any, name: str) -> None:
    me, mine = await held(worker, 3)
    await worker.execute("UPDATE notifyq.task SET attempts = 2 WHERE id = $1", mine[1])
    args = [argument * 3 if isinstance(argument, list) else argument for argument in FENCED[name]]
    rows = await worker.fetch(SQL[name], me, mine, [1, 1, 1], *args)
    assert ids(rows) == [mine[0], mine[2]]
    assert (await task(worker, mine[1]))["state"] == "running"


@pytest.mark.parametrize("name", FENCED)
async def test_an_empty_batch_is_nothing(worker: Any, name: str) -> None:
    args = [[] if isinstance(argument, list) else argument for argument in FENCED[name]]
    assert await worker.fetch(SQL[name], 1, [], [], *args) == []


async def test_finish_keeps_the_outcome(worker: Any) -> None:
    me, (done, dead, cancelled) = await held(worker, 3, payload='{"a": 1}', priority=2, max_attempts=4)
    errors = [None, b'{"attempt": 1, "error": "oh", "traceback": "..."}', b'{"attempt": 1, "error": "no"}']
    results = [b'{"x": [1]}', None, None]
    rows = await worker.fetch(
        SQL["finish"], me, [done, dead, cancelled], [1, 1, 1], ["done", "dead", "cancelled"], results, errors, True
    )  # fmt: skip
    assert ids(rows) == [done, dead, cancelled]
    row = await task(worker, done)
    assert (row["state"], row["result"], row["error"], row["errors"]) == ("done", b'{"x": [1]}', None, None)
    assert (row["worker"], row["payload"], row["priority"], row["max_attempts"]) == (
        "host:1",
        b'{"a": 1}',
        2,
        4,
    )
    assert row["created_at"] <= row["processing_at"] <= row["processed_at"]
    row = await task(worker, dead)
    (error,) = json.loads(row["errors"])
    assert (row["state"], row["error"], error["traceback"], error["attempt"]) == ("dead", "oh", "...", 1)
    assert error["at"].startswith("20")
    assert (await task(worker, cancelled))["error"] == "no"
    assert await worker.fetchval("SELECT count(*) FROM notifyq.task") == 0


async def test_without_history_only_the_dead_are_kept(worker: Any) -> None:
    me, all_ids = await held(worker, 3)
    rows = await worker.fetch(SQL["finish"], me, all_ids, [1, 1, 1], ["done", "dead", "cancelled"], [], [], False)
    assert ids(rows) == all_ids
    assert await states(worker) == {all_ids[1]: "dead"}


async def test_an_unknown_state_is_refused_whole(worker: Any) -> None:
    me, all_ids = await held(worker, 2)
    with pytest.raises(asyncpg.CheckViolationError):
        await worker.fetch(SQL["finish"], me, all_ids, [1, 1], ["done", "lost"], [], [], True)
    assert set((await states(worker)).values()) == {"running"}


async def test_retry_later_schedules_and_remembers(worker: Any) -> None:
    me, (soon, later) = await held(worker, 2)
    errors = [b'{"attempt": 1, "error": "one"}'] * 2
    await worker.fetch(SQL["retry_later"], me, [soon, later], [1, 1], [0.0, 3600.0], errors)
    assert await states(worker) == {soon: "ready", later: "scheduled"}
    row = await task(worker, later)
    assert 3590 < (row["run_at"] - row["processed_at"]).total_seconds() < 3610
    assert (row["attempts"], row["worker"], row["error"]) == (1, None, "one")
    await claims.claim(worker, me, {"default": 1}, 1)
    await worker.fetch(SQL["retry_later"], me, [soon], [2], [9.0], [b'{"attempt": 2, "error": "two", "at": "x"}'])
    first, second = json.loads((await task(worker, soon))["errors"])
    assert (first["error"], second["error"]) == ("one", "two")
    assert second["at"] > first["at"], "by the database's clock, whatever the worker says"


async def test_a_handed_back_attempt_did_not_happen(worker: Any) -> None:
    me, (id,) = await held(worker, 1)
    await worker.fetch(SQL["hand_back"], me, [id], [1])
    row = await task(worker, id)
    assert (row["state"], row["attempts"], row["errors"], row["processed_at"]) == ("ready", 0, None, None)
    (job,) = await claims.claim(worker, me, {"default": 1}, 1)
    assert job.attempt == 1


async def test_handed_back_after_its_time_had_come_it_is_still_ready(worker: Any) -> None:
    await insert(worker, created_at="2000-01-01", run_at="2001-01-01")
    await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    me = await register(worker)
    (job,) = await claims.claim(worker, me, {"default": 1}, 1)
    await worker.fetch(SQL["hand_back"], me, [job.id], [1])
    assert await states(worker) == {job.id: "ready"}


async def test_set_aside_keeps_out_of_the_way(worker: Any) -> None:
    me, (id,) = await held(worker, 1)
    await worker.fetch(SQL["release_unhandled"], me, [id], [1])
    row = await task(worker, id)
    assert (row["state"], row["attempts"]) == ("ready", 0)
    assert await claims.claim(worker, me, {"default": 1}, 1) == []
    (job,) = await claims.claim(worker, me, {"default": 1}, 1, unhandled=["Known"])
    assert (job.id, job.attempt) == (id, 1)


async def silent(conn: Any, worker: int, seconds: float) -> None:
    await conn.execute(
        "UPDATE notifyq.worker SET seen_at = now() - make_interval(secs => $2) WHERE id = $1", worker, seconds
    )


async def test_tick_is_a_sign_of_life_and_hears_of_lost_leases(worker: Any) -> None:
    me, (mine, gone, again) = await held(worker, 3)
    quiet, quieter = await register(worker, "quiet:1"), await register(worker, "quieter:1")
    await silent(worker, me, 20)
    await silent(worker, quiet, 3)
    await silent(worker, quieter, 5)
    loud = await register(worker, "loud:1")
    await worker.execute("DELETE FROM notifyq.task WHERE id = $1", gone)
    await worker.execute("UPDATE notifyq.task SET attempts = 2 WHERE id = $1", again)
    args = (me, 2, "busy", [mine, gone, again], [1, 1, 1], ["default"], ["Known"], False)
    row = await worker.fetchrow(SQL["send_heartbeat"], *args)
    assert row["registered"]
    assert not row["unhandled"]
    assert sorted(row["lost"]) == [gone, again]
    others = sorted((quiet, quieter, loud))
    assert row["others"] == others
    assert row["seen"] == [(await unseen(worker, other))[0] for other in others]
    seen = await worker.fetchrow(
        "SELECT running, status, now() - seen_at < interval '9 s' FROM notifyq.worker WHERE id = $1", me
    )
    assert tuple(seen) == (2, "busy", True)
    assert not (await worker.fetchrow(SQL["send_heartbeat"], 99, *args[1:]))["registered"]


async def test_tick_sees_only_what_is_aside_for_it(worker: Any) -> None:
    me = await register(worker)
    await insert(worker, withheld=True, type="Strange")
    await insert(worker, withheld=True, queue="mail")
    await insert(worker)

    async def unhandled(queues: list[str], types: list[str]) -> bool:
        row = await worker.fetchrow(SQL["send_heartbeat"], me, 0, "ok", [], [], queues, types, False)
        return bool(row["unhandled"])

    assert not await unhandled(["default"], ["Known"])
    assert await unhandled(["default", "mail"], ["Other", "Known"])


LOCK = "SELECT pg_try_advisory_lock_shared(1852990827, $1)"


@pytest.mark.parametrize(
    ("seconds", "locked", "rescued"),
    [(0, False, False), (1, False, False), (2.5, False, True), (2.5, True, False), (31, True, True)],
)
async def test_rescue_only_of_the_dead(worker: Any, dsn: str, seconds: float, locked: bool, rescued: bool) -> None:
    """Its lock free and not seen for 2 seconds, or not seen for its lease of 30, lock or no lock."""
    me, (id,) = await held(worker)
    its_own = await connection.connect_worker(dsn, "test")
    if locked:
        assert await its_own.fetchval(LOCK, me)
    await silent(worker, me, seconds)
    row = await rescue(worker, me, 100)
    assert tuple(row) == (("host:1", 1, 0) if rescued else (None, 0, 0))
    assert (await task(worker, id))["state"] == ("ready" if rescued else "running")
    its_own.terminate()


async def test_rescue_counts_as_an_attempt_and_says_why(worker: Any) -> None:
    me, (id,) = await held(worker)
    await silent(worker, me, 5)
    await rescue(worker, me, 100)
    row = await task(worker, id)
    (error,) = json.loads(row["errors"])
    assert (row["attempts"], error["attempt"]) == (1, 1)
    assert row["error"] == "its worker host:1 vanished while it ran this task alone"
    other = await register(worker, "other:1")
    (job,) = await claims.claim(worker, other, {"default": 1}, 1)
    assert job.attempt == 2


@pytest.mark.parametrize(
    ("columns", "allowed", "dead"),
    [
        ({"attempts": 8}, 10, False),
        ({"attempts": 9}, 10, True),
        ({"attempts": 2}, 3, True),
        ({"attempts": 2, "max_attempts": 4}, 3, False),
        ({"attempts": 0, "max_attempts": 1}, 3, True),
        ({"attempts": 0, "max_attempts": 0}, 3, True),
        ({"attempts": 0, "max_attempts": -5}, 3, True),
        ({"attempts": 8, "type": "Strange"}, 3, False),
        ({"attempts": 9, "type": "Strange"}, 3, True),
    ],
)
async def test_rescue_ends_what_has_spent_its_attempts(
    worker: Any, columns: dict[str, Any], allowed: int, dead: bool
) -> None:
    """What the row says, else what its worker said of the type, else 10."""
    me = await register(worker, allowed=[allowed])
    _, (id,) = await held(worker, worker=me, payload='{"a": 1}', **columns)
    await silent(worker, me, 5)
    row = await rescue(worker, me, 100)
    assert tuple(row) == ("host:1", int(not dead), int(dead))
    row = await task(worker, id)
    assert row["state"] == ("dead" if dead else "ready")
    assert (row["attempts"], row["payload"]) == (columns["attempts"] + 1, b'{"a": 1}')
    assert "vanished" in row["error"]
    assert row["worker"] == ("host:1" if dead else None)


CRASHES = "SELECT crashes, crashes_alone, parked, attempts FROM notifyq.task WHERE id = $1"


async def test_a_crash_beside_others_is_no_failure(worker: Any) -> None:
    """Ready again after the first, though it allows one attempt; parked after the second, and claimed as a suspect."""
    ids: list[int] = []
    for crash in (1, 2, 3):
        if crash == 1:
            me, ids = await held(worker, 3, max_attempts=1)
        else:
            me = await register(worker)
            crashed = await worker.fetch(
                SQL["list_crashed"], ["crashed:other", "crashed:default"], ["Known", "X"], [], 9
            )
            assert [row["crashes"] for row in crashed] == ([2, 2, 2] if crash == 3 else [])
            if crash == 2:
                jobs = await claims.claim(worker, me, {"default": 9}, 9)
            else:
                assert await claims.claim(worker, me, {"default": 9}, 9) == []
                assert await LeftOut().claim_crashed(worker, me, ["crashed:default"], ["Known"], 3, 9) == []
                jobs = await LeftOut().claim_crashed(worker, me, ["crashed:default"], ["Known"], 2, 2)
                assert len(jobs) == 2
            assert {(job.attempt, job.excused) for job in jobs} == {(crash, crash - 1)}
        await silent(worker, me, 5)
        assert await rescue(worker, me, 9) == ("host:1", 2 if crash == 3 else 3, 0)
        parked = None if crash == 1 else "crashed"
        assert tuple(await worker.fetchrow(CRASHES, ids[0])) == (crash, None, parked, crash)
    row = await task(worker, ids[0])
    assert (row["state"], row["waits_for"]) == ("scheduled", "crashed")
    assert row["error"] == "its worker host:1 vanished while it ran this task and others"


async def test_three_crashes_alone_are_the_end(worker: Any) -> None:
    """Though ten attempts are allowed, and others of the past don't count."""
    me, (id,) = await held(worker, 1, attempts=7, crashes=7)
    for crash in (1, 2, 3):
        await silent(worker, me, 5)
        assert await rescue(worker, me, 9) == ("host:1", int(crash < 3), int(crash == 3))
        if crash < 3:
            assert tuple(await worker.fetchrow(CRASHES, id)) == (7, crash, "crashed", 7 + crash)
            me = await register(worker)
            [job] = await LeftOut().claim_crashed(worker, me, ["crashed:default"], ["Known"], 7 + crash, 9)
            assert (job.id, job.attempt, job.excused) == (id, 8 + crash, 7)
    row = await task(worker, id)
    assert (row["state"], row["error"]) == (
        "dead",
        "its worker host:1 vanished while it ran this task alone, 3 times by now",
    )


async def test_the_last_of_many_was_not_alone(worker: Any) -> None:
    """A rescue in pieces, or one that leaves what is locked, sees one task in the end."""
    me, _ = await held(worker, 3)
    await silent(worker, me, 5)
    for _ in range(3):
        await rescue(worker, me, 1)
    rows = await worker.fetch("SELECT crashes, crashes_alone FROM notifyq.task")
    assert [tuple(row) for row in rows] == [(1, None)] * 3


async def test_a_rescue_in_pieces_buries_the_worker_at_the_end(worker: Any) -> None:
    me, _ = await held(worker, 5)
    await silent(worker, me, 5)
    found = [tuple(await rescue(worker, me, 2)) for _ in range(5)]
    assert found == [
        ("host:1", 2, 0),
        ("host:1", 2, 0),
        ("host:1", 1, 0),
        ("host:1", 0, 0),
        (None, 0, 0),
    ]
    assert await worker.fetchval("SELECT count(*) FROM notifyq.worker") == 0


async def test_two_rescuers_take_turns(worker: Any, dsn: str) -> None:
    me, _ = await held(worker, 2)
    await silent(worker, me, 5)
    other: Any = await connection.connect_worker(dsn, "test")
    transaction = other.transaction()
    await transaction.start()
    assert tuple(await rescue(other, me, 1)) == ("host:1", 1, 0)
    with anyio.fail_after(limit()):
        assert tuple(await rescue(worker, me, 9)) == (None, 0, 0)
    await transaction.commit()
    assert tuple(await rescue(worker, me, 9)) == ("host:1", 1, 0)
    other.terminate()


async def test_rescue_leaves_what_is_being_settled(worker: Any, dsn: str) -> None:
    """The worker wasn't quite dead: what it settles at this moment is settled, once."""
    me, (first, second) = await held(worker, 2)
    await silent(worker, me, 5)
    settler: Any = await connection.connect_worker(dsn, "test")
    transaction = settler.transaction()
    await transaction.start()
    await settler.fetch(SQL["finish"], me, [first], [1], ["done"], [], [], True)
    with anyio.fail_after(limit()):
        assert tuple(await rescue(worker, me, 9)) == ("host:1", 1, 0)
    await transaction.commit()
    assert await states(worker) == {first: "done", second: "ready"}
    settler.terminate()


async def test_unowned_tasks_are_ready_again(worker: Any) -> None:
    _, (mine,) = await held(worker)
    gone, (unowned,) = await held(worker, worker=await register(worker, "gone:1"))
    await worker.execute("DELETE FROM notifyq.worker WHERE id = $1", gone)
    assert await reclaim_unowned(worker) == 1
    assert await states(worker) == {mine: "running", unowned: "ready"}
    assert await reclaim_unowned(worker) == 0


async def test_prune_by_age_each_state_by_its_own(worker: Any) -> None:
    me, all_ids = await held(worker, 6)
    outcomes = ["done", "dead", "cancelled"] * 2
    await worker.fetch(SQL["finish"], me, all_ids, [1] * 6, outcomes, [], [], True)
    await worker.execute(
        "UPDATE notifyq.finished SET processed_at = now() - interval '1 h' WHERE id = ANY ($1)", all_ids[:3]
    )
    await insert(worker)
    assert await worker.fetchval(SQL["prune_finished"], 7200.0, 7200.0, 100, None) == 0
    assert await worker.fetchval(SQL["prune_finished"], 60.0, 7200.0, 100, None) == 2
    assert await worker.fetchval(SQL["prune_finished"], 60.0, 60.0, 100, None) == 1
    assert await worker.fetchval(SQL["prune_finished"], 0.0, 60.0, 1, None) == 1, "no more than the limit"
    assert await worker.fetchval(SQL["prune_finished"], 0.0, 60.0, 1, None) == 1
    assert await worker.fetchval(SQL["prune_finished"], 0.0, 60.0, 1, None) == 0
    assert sorted((await states(worker)).values()) == ["dead", "ready"]


async def test_release_hands_back_all_of_one_worker(worker: Any) -> None:
    me, mine = await held(worker, 3)
    _, (other,) = await held(worker, worker=await register(worker, "other:1"))
    assert await worker.fetchval(SQL["hand_back_all"], me, None) == 3
    assert await states(worker) == {**dict.fromkeys(mine, "ready"), other: "running"}
    assert await worker.fetchval("SELECT max(attempts) FROM notifyq.task WHERE worker IS NULL") == 0


async def test_a_worker_that_holds_a_task_stays_registered(worker: Any) -> None:
    me, _ = await held(worker)
    await worker.execute(SQL["unregister_worker"], me)
    assert await worker.fetchval("SELECT count(*) FROM notifyq.worker") == 1
    await worker.fetchval(SQL["hand_back_all"], me, None)
    await worker.execute(SQL["unregister_worker"], me)
    assert await worker.fetchval("SELECT count(*) FROM notifyq.worker") == 0


async def test_a_rescuer_ends_the_door_of_that_worker_and_no_other(worker: Any, dsn: str, db: Any) -> None:
    doors = [await connection.connect_worker(dsn, role) for role in ("door 7", "door 77", "claims 7")]
    assert await worker.fetchrow(SQL["end_backends"], 7, ["door"], 0) == (1, 0)
    assert await worker.fetchrow(SQL["end_backends"], 8, ["door"], 0) == (0, 0)
    with pytest.raises(errors.TRANSIENT):
        await doors[0].fetchval("SELECT 1")
    assert [await door.fetchval("SELECT 1") for door in doors[1:]] == [1, 1]
    for door in doors:
        door.terminate()


async def test_a_worker_ends_its_own_backends_and_no_others(worker: Any, dsn: str) -> None:
    conns = [await connection.connect_worker(dsn, role) for role in ("claims 7", "door 7", "claims 77", "door 77")]
    both = ["claims", "door"]
    assert await worker.fetchrow(SQL["end_backends"], 7, both, 2000) == (2, 0)
    names = "SELECT count(*) FROM pg_stat_activity WHERE application_name IN ('notifyq claims 7', 'notifyq door 7')"
    assert await worker.fetchval(names) == 0
    assert await worker.fetchrow(SQL["end_backends"], 7, both, 2000) == (0, 0), "there is none"
    assert [await conn.fetchval("SELECT 1") for conn in conns[2:]] == [1, 1]
    for conn in conns:
        conn.terminate()


async def test_an_unanswered_claim_took_what_the_worker_does_not_know_of(worker: Any) -> None:
    me, mine = await held(worker, 3)
    _, (other,) = await held(worker, worker=await register(worker, "other:1"))
    assert await worker.fetchval(SQL["reclaim_unanswered"], me, mine[:1], [1], None) == 2
    assert await states(worker) == {mine[0]: "running", mine[1]: "ready", mine[2]: "ready", other: "running"}
    assert await worker.fetchval("SELECT max(attempts) FROM notifyq.task WHERE worker IS NULL") == 0
    # Of the remaining task it knows an earlier attempt. That one was lost, so the claim of this one is unanswered.
    assert await worker.fetchval(SQL["reclaim_unanswered"], me, mine[:1], [0], None) == 1


# Who says "look again". A claim or a promotion that rang would wake the whole fleet for nothing.
RINGS: dict[str, tuple[Any, Callable[[Any, int, int], Any]]] = {
    "claim": (False, lambda c, w, id: claims.claim(c, w, {"default": 9}, 9)),
    "check_due": (False, lambda c, w, id: c.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)),
    "send_heartbeat": (
        False,
        lambda c, w, id: c.fetchrow(SQL["send_heartbeat"], w, 0, "ok", [id], [1], ["default"], ["Known"], True),
    ),
    "finish": (False, lambda c, w, id: c.fetch(SQL["finish"], w, [id], [1], ["done"], [], [], True)),
    "release_unhandled": ("unhandled", lambda c, w, id: c.fetch(SQL["release_unhandled"], w, [id], [1])),
    "retry_later": (True, lambda c, w, id: c.fetch(SQL["retry_later"], w, [id], [1], [9.0], [b"{}"])),
    "hand_back": (True, lambda c, w, id: c.fetch(SQL["hand_back"], w, [id], [1])),
    "reclaim_unanswered": (True, lambda c, w, id: c.fetchval(SQL["reclaim_unanswered"], w, [], [], None)),
    "cancel": (False, lambda c, w, id: c.fetchval("SELECT notifyq.cancel($1)", id)),
    "hand_back_all": (True, lambda c, w, id: c.fetchval(SQL["hand_back_all"], w, None)),
    "rescue": (True, lambda c, w, id: rescue(c, w, 9)),
    "insert": (True, lambda c, w, id: insert(c)),
    "enqueue": (True, lambda c, w, id: c.fetch(SQL["enqueue"], "T", "{}", *Options.check(queue="q").columns, None)),
    "enqueue_many": (
        True,
        lambda c, w, id: c.fetch(SQL["enqueue_many"], ["T"], ["{}"], *Options.check(queue="q").columns, None),
    ),
    "echo": ("hello", lambda c, w, id: c.fetchrow(SQL["check_due"], [], [], 9, "hello", None)),
}


@pytest.mark.parametrize("name", RINGS)
async def test_who_rings_while_somebody_sleeps(worker: Any, db: Any, connect: Sessions, name: str) -> None:
    want, act = RINGS[name]
    me, (id,) = await held(worker)
    await insert(worker, created_at="2000-01-01", run_at="2001-01-01")
    await silent(worker, me, 5)
    sleeper = await connect()
    heard: list[str] = []
    await db.add_listener("notifyq", lambda *args: heard.append(args[3]))
    async with sleeper.transaction():
        await sleeper.execute("LOCK TABLE notifyq.bell IN SHARE MODE")
        await act(worker, me, id)
        await worker.execute("NOTIFY notifyq, 'the end'")
        with anyio.fail_after(limit()):
            while "the end" not in heard:
                await anyio.sleep(0.001)
    assert heard[:-1] == ([""] if want is True else [want] if want else [])


async def test_a_ring_that_fails_aborts_nobodys_insert(worker: Any) -> None:
    async with rolled_back(worker):
        await worker.execute("DROP TABLE notifyq.bell")
        assert len(await insert(worker)) == 1


async def test_the_schema_on_disk_is_the_one_that_is_tested(worker: Any) -> None:
    assert await schema.check(worker) == schema.SCHEMA_VERSION
