"""Unique tasks by plain SQL, COPY and enqueue_many."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import pytest

import notifyq
from notifyq.errors import ConfigError

from ..helpers.running import working
from ..helpers.uniques import KEYED, Daily, Known, Whole
from ..helpers.waiting import Seen
from .test_unique import verbs_row


async def count(db: Any) -> int:
    n: int = await db.fetchval("SELECT count(*) FROM notifyq.task")
    return n


async def copy(db: Any, *keys: str) -> None:
    records = [("Known", json.dumps({"unique_key": key}).encode()) for key in keys]
    await db.copy_records_to_table("task", schema_name="notifyq", columns=["type", "options"], records=records)


async def test_rows_of_one_statement(db: Any) -> None:
    """Several rows with one key are one task, and RETURNING has no row for those that were left out."""
    rows = await db.fetch(
        "INSERT INTO notifyq.task (type, options)"
        " SELECT 'T', jsonb_build_object('unique_key', 'k' || i % 3) FROM generate_series(1, 9) AS i RETURNING id"
    )
    assert [row[0] for row in rows] == [1, 2, 3]
    again = """INSERT INTO notifyq.task (type, options) VALUES ('T', '{"unique_key": "k0"}')"""
    for conflict in ("", "ON CONFLICT DO NOTHING"):
        assert await db.fetch(f"{again} {conflict} RETURNING id") == []
    assert await count(db) == 3


async def test_copy(db: Any) -> None:
    for _ in range(2):
        await copy(db, *(f"k{n % 10}" for n in range(1000)))
        assert await count(db) == 10


async def test_the_function(db: Any) -> None:
    async def call(more: str = "", **options: Any) -> int:
        query = f"SELECT notifyq.enqueue('Known', '{{\"n\": 2}}', options => $1::text::jsonb{more})"
        id: int = await db.fetchval(query, json.dumps(options))
        return id

    assert await call(unique_key="k") == 1
    assert await call(unique_key="k") == 1
    assert await call(unique_key="k", on_conflict="move", more=", run_at => '2100-01-01'") == 1
    assert (await verbs_row(db, 1))["state"] == "scheduled"
    new = await call(unique_key="k", unique_states=["running"])
    assert new != 1
    assert await call(unique_key="k", unique_for=60) == new


async def test_plain_tasks_touch_no_key(app: notifyq.App, dsn: str, db: Any) -> None:
    """They are enqueued, run and settled in all the ways there are, although the table of keys is gone."""
    await db.execute("ALTER TABLE notifyq.unique_key RENAME TO elsewhere")
    try:
        seen = Seen()

        @app.handler
        async def known(task: Known) -> None:
            seen.add(task.n)

        async with working(app, dsn):
            await app.enqueue(Known())
            await app.enqueue_many([Known() for _ in range(3000)])
            await db.execute("INSERT INTO notifyq.task (type) VALUES ('Known')")
            await db.fetchval("SELECT notifyq.enqueue('Known')")
            await db.copy_records_to_table("task", schema_name="notifyq", columns=["type"], records=[("Known",)])
            await seen.reach(3004)
        with pytest.raises(asyncpg.UndefinedTableError):
            await db.execute(KEYED)
    finally:
        await db.execute("ALTER TABLE notifyq.elsewhere RENAME TO unique_key")


async def test_many_in_order(app: notifyq.App, db: Any) -> None:
    """Tasks are unique or not, occur twice in the call, or were there before. More than one statement has this order,
    too."""
    [old] = await app.enqueue_many([Daily(user="old", day=1)])
    for size in (10, 5000):
        tasks = [Known(n=n) if n % 2 else Daily(user=str(n % 8), day=size) for n in range(size)]
        ids = await app.enqueue_many([Daily(user="old", day=1), *tasks])
        assert ids[0] == old
        assert ids.existed == {old}
        rows = {row[0]: row[1] for row in await db.fetch("SELECT id, payload::text FROM notifyq.task")}
        for task, id in zip(tasks, ids[1:], strict=True):
            want = f'"n": {task.n}' if isinstance(task, Known) else f'"user": "{task.user}"'
            assert want in rows[id].decode() if isinstance(rows[id], bytes) else want in rows[id]
        assert len(set(ids)) == 1 + size // 2 + 4


async def test_many_with_one_key_is_a_mistake(app: notifyq.App) -> None:
    with pytest.raises(
        ConfigError,
        match="unique is 'k', one key for many tasks, so only one of them",
    ):
        await app.enqueue_many([Known()], unique="k")
    assert len(set(await app.enqueue_many([Known(), Known(), Known(n=1)], unique=True))) == 2
    with pytest.raises(ConfigError, match="a group's tasks can't be unique"):
        await app.enqueue_many([Known()], then=Known(), unique=True)
    with pytest.raises(ConfigError, match="a group's tasks can't be unique"):
        await app.enqueue_many([Whole(user="a")], then=Known())


async def test_many_that_replace_have_the_last_word(app: notifyq.App, db: Any) -> None:
    tasks = [Daily(user="a", day=1, note=note) for note in ("x", "y", "z")]
    first, *_ = await app.enqueue_many(tasks, on_conflict="replace")
    assert b'"z"' in (await verbs_row(db, first))["payload"]
    assert (await app.enqueue_many(tasks[:2], on_conflict="replace")) == [first, first]
    assert b'"y"' in (await verbs_row(db, first))["payload"]


@pytest.mark.slow
async def test_bulk_in_orders_that_make_for_deadlocks(app: notifyq.App, db: Any) -> None:
    """Ten calls at once have the same keys, each in another order, over several statements: none fails."""
    tasks = [Daily(user=str(n), day=1) for n in range(2500)]

    async def send(n: int) -> None:
        shift = n * 83 % len(tasks)
        order = tasks[shift:] + tasks[:shift]
        found.append(await app.enqueue_many(order if n % 2 else order[::-1]))

    found: list[list[int]] = []
    async with anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(send, n)
    assert len({id for ids in found for id in ids}) == len(tasks) == await count(db)
