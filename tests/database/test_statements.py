"""Each statement of notifyq/database/sql: its parameters and its columns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from notifyq.database import connection, schema
from notifyq.database.connection import SQL

from ..helpers.databases import overload

ROW = (
    "id:int8 attempts:int2 type:text queue:text priority:int2 max_attempts:int2 created_at:timestamptz payload:jsonb"
    " needs_admission:bool crashes:int2"
)


class Statement(NamedTuple):
    parameters: str
    columns: str
    indexes: str | None  # of task and finished, each used with a condition; None: for people, on an ordinary connection


STATEMENTS = {
    "admit": Statement("int4 int8[] int2[]", "id:int8 waits_for:text expires_at:timestamptz seconds_left:float8", ""),
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
        "promoted:int8 next_seconds:float8 ready:bool inserted:int8 slot_released:bool settings:text "
        "next_cursor:timestamptz echo:text",
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
    "list_others": Statement("int4 text[] text[]", "id:int4 seen:float8 dead:bool", "task_running"),
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
    "register_worker": Statement("text text[] text[] int2[] int4 float8", "id:int4 name:text", ""),
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


def test_every_statement_is_in_the_table() -> None:
    assert sorted(SQL) == sorted(STATEMENTS)


@pytest.mark.parametrize("name", STATEMENTS)
async def test_it_prepares_with_these_types(name: str, worker: Any) -> None:
    """asyncpg encodes by these. A parameter without a cast that turns from int4 into text would fail only when it
    runs."""
    statement = await worker.prepare(SQL[name])
    assert " ".join(p.name for p in statement.get_parameters()) == STATEMENTS[name].parameters
    assert " ".join(f"{a.name}:{a.type.name}" for a in statement.get_attributes()) == STATEMENTS[name].columns


async def test_it_prepares_beside_functions_of_extensions(worker: Any, db: Any) -> None:
    """An extension may add functions under the names of PostgreSQL's own. They make no call ambiguous, nor another
    function's."""
    await overload(db)
    for name, statement in STATEMENTS.items():
        prepared = await worker.prepare(SQL[name])
        assert " ".join(p.name for p in prepared.get_parameters()) == statement.parameters, name


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


async def test_the_schema_on_disk_is_the_one_that_is_tested(worker: Any) -> None:
    assert await schema.check(worker) == schema.SCHEMA_VERSION
