"""Unique tasks: one with a key isn't enqueued while another is in its way, whatever happens at the same time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import psycopg
import pytest

import notifyq
from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.errors import ConfigError, DatabaseError
from notifyq.options import State
from notifyq.unique import DIGEST_LENGTH

from ..helpers import verbs
from ..helpers.databases import admin, grants
from ..helpers.processes import Process
from ..helpers.running import working
from ..helpers.steps import Steps, steps
from ..helpers.waiting import Seen, eventually

WAITING: tuple[State, ...] = ("scheduled", "ready")
KEY = '{"unique_key": "k"}'
KEYED = f"INSERT INTO notifyq.task (type, options) VALUES ('Known', '{KEY}')"
UNTIL_BEGUN = """
INSERT INTO notifyq.task (type, options)
VALUES ('Known', '{"unique_key": "k", "unique_states": ["scheduled", "ready"]}')
"""


class Known(notifyq.Task):
    n: int = 0


class Whole(notifyq.Task, tag="WHOLE"):
    unique = True
    user: str
    more: dict[str, int] | None = None


class Daily(notifyq.Task):
    unique = ("user", "day")
    unique_for = 3600
    user: str
    day: int
    note: str = ""


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[notifyq.App]:
    app = notifyq.App()
    async with app.connect(dsn):
        yield app


@pytest.fixture
async def s(dsn: str) -> AsyncIterator[Steps]:
    async with steps(dsn) as s:
        yield s


async def put(db: Any, state: str, **columns: Any) -> int:
    """A task with the key 'k' that is in this state; its id."""
    late: dict[str, Any] = {"run_at": "2100-01-01"} if state == "scheduled" else {}
    if state in ("scheduled", "ready"):
        return (await verbs.insert(db, options=KEY, **columns, **late))[0]
    [job] = await verbs.held(db, options=KEY, **columns)
    if state != "running":
        assert await verbs.finish(db, [job], state) == [job.id]
    return job.id


# --- Which are in the way

STATES: tuple[State, ...] = ("scheduled", "ready", "running", "done", "dead", "cancelled")


@pytest.mark.parametrize("state", STATES)
async def test_as_long_as_it_has_not_ended(app: notifyq.App, db: Any, state: str) -> None:
    old = await put(db, state)
    ref = await app.enqueue(Known(), unique="k")
    assert ref.existed is (state in ("scheduled", "ready", "running"))
    assert (ref.id == old) is ref.existed


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("chosen", STATES)
async def test_states_that_are_chosen(app: notifyq.App, db: Any, state: str, chosen: Any) -> None:
    old = await put(db, state)
    ref = await app.enqueue(Known(), unique="k", unique_states=(chosen,), unique_for=3600)
    assert (ref.existed, ref.id == old) == (state == chosen,) * 2


@pytest.mark.parametrize("state", STATES)
async def test_once_an_hour(app: notifyq.App, db: Any, state: str) -> None:
    """By its enqueue, whatever became of it, unless it failed; when the hour is over, it is in nobody's way."""
    old = await put(db, state)
    for seconds, existed in ((0, state not in ("dead", "cancelled")), (3700, False)):
        await db.fetch(SQL["advance_clock"], float(seconds))
        ref = await app.enqueue(Known(), unique="k", unique_for=3600)
        assert ref.existed is existed
        assert (ref.id == old) is existed


async def test_once_an_hour_where_no_history_is_kept(app: notifyq.App, dsn: str, db: Any) -> None:
    ran = Seen()

    @app.handler
    async def known(task: Known) -> None:
        ran.add(task.n)

    async with working(app, dsn, history=0.0):
        first = await app.enqueue(Known(n=1), unique="k", unique_for=3600)
        await ran.reach(1)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.all_tasks"), 0)
    again = await app.enqueue(Known(n=2), unique="k", unique_for=3600)
    assert (again.id, again.existed) == (first.id, True)
    assert not (await app.enqueue(Known(n=3), unique="k")).existed


def app_dsn(app: notifyq.App) -> str:
    assert app._dsn is not None
    return app._dsn


async def test_a_key_is_one_for_all_types_and_queues(app: notifyq.App) -> None:
    ref = await app.enqueue(Known(), unique="k")
    assert (await app.enqueue(Daily(user="a", day=1), unique="k", queue="other")).id == ref.id
    assert not (await app.enqueue(Known(), unique="K")).existed
    assert not (await app.enqueue(Known())).existed


@pytest.mark.parametrize("key", ["'; DROP TABLE notifyq.task --", "\U0001f600" * 200, "a\nb", "%s $1 {x}", " "])
async def test_any_key(app: notifyq.App, db: Any, key: str) -> None:
    ref = await app.enqueue(Known(), unique=key)
    assert (await app.enqueue(Known(), unique=key)).id == ref.id
    assert await db.fetchval("SELECT options ->> 'unique_key' FROM notifyq.all_tasks") == key


# --- On conflict


@pytest.mark.parametrize("state", ["scheduled", "ready", "running", "done"])
@pytest.mark.parametrize("conflict", ["keep", "replace", "move"])
async def test_on_conflict(app: notifyq.App, db: Any, state: str, conflict: Any) -> None:
    """What waits is changed. Beside what runs there is a new one, unless it is asked for to be kept."""
    old = await put(db, state, payload='{"n": 1}')
    before = await verbs_row(db, old)
    new = Known(n=2)
    ref = await app.enqueue(new, unique="k", on_conflict=conflict, delay=7200, unique_states=STATES[:3])
    row = await verbs_row(db, old)
    waits = state in WAITING
    assert ref.existed is (state != "done")
    assert row["payload"] == (b'{"n": 2}' if waits and conflict == "replace" else before["payload"])
    moved = waits and conflict == "move"
    assert (row["run_at"] != before["run_at"]) is moved
    assert row["state"] == ("scheduled" if moved else state)
    if state == "running":
        assert (await app.enqueue(new, unique="k", on_conflict=conflict)).existed is (conflict == "keep")


async def verbs_row(db: Any, id: int) -> Any:
    return await db.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id)


async def test_one_that_is_moved_to_now_is_ready_at_once(app: notifyq.App, db: Any) -> None:
    """A claim finds it, without any timer."""
    old = await put(db, "scheduled")
    assert (await app.enqueue(Known(), unique="k", on_conflict="move")).id == old
    assert [job.id for job in await verbs.claim(db, await verbs.register(db))] == [old]


async def test_one_that_is_moved_wakes_a_worker_in_time(app: notifyq.App, dsn: str, db: Any) -> None:
    """From tomorrow to now, and from now to a moment later, with nothing but the bell."""
    seen = Seen()

    @app.handler
    async def known(task: Known) -> None:
        seen.add(task.n)

    async with working(app, dsn):
        for n, delay in ((1, 0.0), (2, 0.05)):
            ref = await app.enqueue(Known(n=n), unique=f"k{n}", delay=86400)
            moved = await app.enqueue(Known(), unique=f"k{n}", on_conflict="move", delay=delay)
            assert (moved.id, moved.existed) == (ref.id, True)
            await seen.reach(n)
    assert seen.items == [1, 2]


async def test_a_replaced_one_runs_as_what_it_is_now(app: notifyq.App, dsn: str) -> None:
    seen = Seen()

    @app.handler
    async def daily(task: Daily) -> None:
        seen.add(task.note)

    await app.enqueue(Known(), unique="k")
    assert (await app.enqueue(Daily(user="a", day=1, note="new"), unique="k", on_conflict="replace")).existed
    async with working(app, dsn):
        assert await seen.reach(1) == ["new"]


# --- Rules


async def test_by_the_whole_payload(app: notifyq.App, db: Any) -> None:
    ref = await app.enqueue(Whole(user="a", more={"x": 1, "y": 2}))
    assert (await app.enqueue(Whole(user="a", more={"y": 2, "x": 1}))).id == ref.id
    assert not (await app.enqueue(Whole(user="a", more={"x": 1}))).existed
    assert not (await app.enqueue(Whole(user="a", more={"x": 1, "y": 2}), unique=False)).existed
    key = await db.fetchval("SELECT options ->> 'unique_key' FROM notifyq.task WHERE id = $1", ref.id)
    assert key.startswith("WHOLE:")
    assert len(key) == len("WHOLE:") + DIGEST_LENGTH


async def test_by_chosen_fields(app: notifyq.App, db: Any) -> None:
    ref = await app.enqueue(Daily(user="a", day=1, note="x"))
    assert (await app.enqueue(Daily(user="a", day=1, note="y"))).existed
    assert not (await app.enqueue(Daily(user="a", day=2))).existed
    assert not (await app.enqueue(Daily(user="b", day=1))).existed
    assert (await app.enqueue(Daily(user="a", day=9), unique=("user",))).existed is False
    assert (await app.enqueue(Daily(user="a", day=8), unique=("user",))).existed is True
    [job] = [job for job in await verbs.claim(db, await register_all(db)) if job.id == ref.id]
    await verbs.finish(db, [job])
    assert (await app.enqueue(Daily(user="a", day=1))).id == ref.id, "unique_for is the class's"


async def register_all(db: Any) -> int:
    id: int = await db.fetchval(SQL["register_worker"], "host:1", ["default"], ["Known", "Daily"], [10, 10], 100, 30.0)
    return id


async def test_types_with_long_names_have_keys_of_their_own(app: notifyq.App) -> None:
    class One(notifyq.Task, tag="x" * 199 + "1"):
        unique = True

    class Two(notifyq.Task, tag="x" * 199 + "2"):
        unique = True

    assert not (await app.enqueue(One())).existed
    assert not (await app.enqueue(Two())).existed
    assert (await app.enqueue(Two())).existed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"unique": "user"},
            r"unique is 'user'; expected True, or a tuple of its fields' names; \('user',\) has a comma",
        ),
        ({"unique": ("user", "usr")}, "unique has 'usr' in it, which is no field; its fields: user"),
        ({"unique": ()}, r"unique is \(\); expected True"),
        ({"unique": ["user"]}, r"unique is \['user'\]; expected True"),
        ({"unique": True, "unique_for": 0}, "unique_for is 0; expected seconds above 0"),
        ({"unique": True, "unique_for": float("nan")}, "unique_for is nan; expected seconds above 0"),
        ({"unique": True, "unique_states": ("redy",)}, "unique_states is .*; expected a tuple of scheduled, ready"),
        ({"unique": True, "unique_states": "ready"}, "unique_states is 'ready'; expected a tuple of scheduled, ready"),
        ({"unique": True, "unique_states": ("done",)}, "unique_states has 'done' in it, and nothing says for how long"),
        ({"unique": True, "on_conflict": "drop"}, "on_conflict is 'drop'; expected 'keep', 'replace' or 'move'"),
    ],
)
async def test_what_a_class_may_not_say(app: notifyq.App, settings: dict[str, Any], message: str) -> None:
    """Said where the handler is; and at enqueue, where there is none."""
    Wrong: Any = type("Wrong", (notifyq.Task,), {"__annotations__": {"user": str}, **settings})

    async def wrong(task: Wrong) -> None: ...

    with pytest.raises(ConfigError, match=f"task Wrong: {message}"):
        app.handler(wrong)
    with pytest.raises(ConfigError, match=f"task Wrong: {message}"):
        await app.enqueue(Wrong(user="a"))


@pytest.mark.parametrize("name", ["unique", "unique_for", "unique_states", "on_conflict"])
def test_a_setting_is_no_field(name: str) -> None:
    Wrong: Any = type("Wrong", (notifyq.Task,), {"__annotations__": {name: int}})

    async def wrong(task: Wrong) -> None: ...

    with pytest.raises(ConfigError, match=f"'{name}' is a setting of the class, not a field of the payload"):
        notifyq.App().handler(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique": ""}, "unique '': expected 1 to 200 characters"),
        ({"unique": "x" * 201}, "expected 1 to 200 characters"),
        ({"unique": "a\x00b"}, "expected 1 to 200 characters, none of them NUL"),
        ({"unique": 7}, "unique is 7; expected a key, True, or a tuple"),
        ({"unique": ("m",)}, "unique has 'm' in it, which is no field; its fields: n"),
        ({"unique_for": 60}, "unique_for, unique_states and on_conflict go with a key, and Known has no rule for one"),
        ({"unique": "k", "unique_for": -1}, "unique_for is -1; expected seconds above 0"),
        ({"unique": "k", "unique_for": True}, "unique_for is True; expected seconds above 0"),
        (
            {"unique": "k", "unique_states": ("dead",)},
            "has 'dead' in it, and nothing says for how long; add unique_for",
        ),
        ({"unique": "k", "unique_states": ()}, r"unique_states is \(\); expected a tuple"),
        ({"unique": "k", "on_conflict": "replace it"}, "on_conflict is 'replace it'"),
    ],
)
async def test_what_enqueue_refuses(app: notifyq.App, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await app.enqueue(Known(), **options)


# --- Plain SQL


async def count(db: Any) -> int:
    n: int = await db.fetchval("SELECT count(*) FROM notifyq.task")
    return n


async def copy(db: Any, *keys: str) -> None:
    records = [("Known", json.dumps({"unique_key": key}).encode()) for key in keys]
    await db.copy_records_to_table("task", schema_name="notifyq", columns=["type", "options"], records=records)


async def test_rows_of_one_statement(db: Any) -> None:
    """Several with one key are one task, and RETURNING has no row for those that were left out."""
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
    """Enqueued, run and settled by all the ways there are, with the table gone."""
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


# --- Many


async def test_many_in_order(app: notifyq.App, db: Any) -> None:
    """Unique or not, twice in the call or there before; more than one statement has, too."""
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
    """Ten at once, each with the same keys in another order, over several statements: none fails."""
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


# --- At once


def by_psql(program: str, dsn: str) -> None:
    subprocess.run([program, "-q", dsn], input=f"{KEYED};\n" * 50, text=True, check=True)


async def test_hundreds_at_once_are_one(app: notifyq.App, dsn: str, db: Any) -> None:
    """Over asyncpg, and psql, and while they start and end."""
    refs: list[notifyq.Ref] = []

    async def send() -> None:
        refs.append(await app.enqueue(Known(), unique="k"))

    psql = shutil.which("psql")
    async with anyio.create_task_group() as group:
        for _ in range(300):
            group.start_soon(send)
        for _ in range(5 if psql is not None else 0):
            group.start_soon(anyio.to_thread.run_sync, by_psql, str(psql), dsn)
    assert len({ref.id for ref in refs}) == 1 == await count(db)
    assert sum(not ref.existed for ref in refs) <= 1


async def test_inserts_and_copies_at_once_are_one(dsn: str, db: Any) -> None:
    """By clients that know nothing but the table, each with a connection of its own."""

    async def insert(conn: Any, *keys: str) -> None:
        for _ in keys:
            await conn.execute(KEYED)

    conns = [await connection.connect(dsn, role="test") for _ in range(20)]
    async with anyio.create_task_group() as group:
        for n, conn in enumerate(conns):
            group.start_soon(copy if n % 2 else insert, conn, *["k"] * 20)
    for conn in conns:
        await conn.close()
    assert await count(db) == 1


async def test_one_at_a_time_while_they_come_and_go(app: notifyq.App, dsn: str, db: Any) -> None:
    """With a worker that runs them: never two at once, each one that is new runs, and it isn't one for all."""
    running, most, ran = 0, 0, Seen()

    @app.handler
    async def known(task: Known, ctx: notifyq.Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.lowlevel.checkpoint()
        running -= 1
        ran.add(ctx.id)

    refs: list[notifyq.Ref] = []

    async def send() -> None:
        for _ in range(60):
            ref = await app.enqueue(Known(), unique="k")
            refs.append(ref)

    async with working(app, dsn):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(send)
        new = {ref.id for ref in refs if not ref.existed}
        await ran.reach(len(new))
    assert most == 1
    assert sorted(ran.items) == sorted(new)
    assert len(new) > 1
    assert {ref.id for ref in refs} == new


# --- Interleavings


async def test_the_second_waits_for_the_first(s: Steps) -> None:
    a, b = await s.session("a"), await s.session("b")
    for end, there in (("ROLLBACK", 0), ("COMMIT", 1)):
        await a("BEGIN")
        await a(KEYED)
        waiting = await b.blocked_by(a, f"{KEYED} RETURNING id")
        await a(end)
        assert len(await waiting) == 1 - there
        await s.db.execute("TRUNCATE notifyq.task, notifyq.unique_key")


async def test_a_savepoint_frees_the_key(s: Steps) -> None:
    a, b = await s.session("a"), await s.session("b")
    await a("BEGIN")
    await a("SAVEPOINT x")
    await a(KEYED)
    waiting = await b.blocked_by(a, f"{KEYED} RETURNING id")
    await a("ROLLBACK TO x")
    [row] = await waiting
    assert await a(f"{KEYED} RETURNING id") == []
    await a("COMMIT")
    assert [r[0] for r in await s.db.fetch("SELECT id FROM notifyq.task")] == [row[0]]


async def test_what_stands_in_the_way_begins_after_the_enqueuer_has_committed(s: Steps) -> None:
    """Or else its handler could miss what was written beside the enqueue."""
    a, w = await s.session("a"), await s.worker("claims")
    [old] = await verbs.insert(s.db, options=KEY)
    me = await w(verbs.register)
    for end in ("ROLLBACK", "COMMIT"):
        await a("BEGIN")
        assert await a(f"{UNTIL_BEGUN} RETURNING id") == []
        assert await w(verbs.claim, me) == []
        await a(end)
    assert [job.id for job in await w(verbs.claim, me)] == [old]


async def test_the_worker_that_stepped_over_it_is_rung(app: notifyq.App, dsn: str, db: Any, s: Steps) -> None:
    """It sleeps, with nothing but the bell, and the one that waits is held back until the enqueuer commits."""
    seen = Seen()

    @app.handler
    async def known(task: Known) -> None:
        seen.add(task.n)

    a = await s.session("a")
    await app.enqueue(Known(n=1), unique="k", delay=0.3)
    await a("BEGIN")
    assert await a(f"{UNTIL_BEGUN} RETURNING id") == []
    async with working(app, dsn):
        await eventually(lambda: db.fetchval("SELECT run_at < clock_timestamp() FROM notifyq.task"), True)
        assert seen.items == []
        await a("COMMIT")
        assert await seen.reach(1) == [1]


async def test_one_that_is_being_claimed_is_waited_for(s: Steps) -> None:
    """It has begun: so there is a new one, if only those that wait are in the way; else it is kept."""
    a, w = await s.session("a"), await s.worker("claims")
    await verbs.insert(s.db, options=KEY)
    me = await w(verbs.register)
    await w("BEGIN")
    [job] = await w(verbs.claim, me)
    waiting = await a.blocked_by(w, f"{UNTIL_BEGUN} RETURNING id")
    await w("COMMIT")
    assert len(await waiting) == 1
    assert await s.db.fetchval("SELECT worker FROM notifyq.task WHERE id = $1", job.id) == me
    assert await a(f"{KEYED} RETURNING id") == []


async def test_a_claim_that_is_rolled_back_leaves_it_in_the_way(s: Steps) -> None:
    a, w = await s.session("a"), await s.worker("claims")
    await verbs.insert(s.db, options=KEY)
    me = await w(verbs.register)
    await w("BEGIN")
    await w(verbs.claim, me)
    waiting = await a.blocked_by(w, f"{UNTIL_BEGUN} RETURNING id")
    await w("ROLLBACK")
    assert await waiting == []
    assert [job.id for job in await w(verbs.claim, me)] == [1]


async def test_no_worker_waits_for_an_enqueuer(s: Steps) -> None:
    """What runs is not locked: it is settled, handed back or put off while somebody has its key in a transaction."""
    a, w = await s.session("a"), await s.worker("settle")
    for settle in (verbs.finish, verbs.later, verbs.hand_back, verbs.release_unhandled):
        await s.db.execute("TRUNCATE notifyq.task, notifyq.unique_key")
        [job] = await w(verbs.held, options=KEY)
        await a("BEGIN")
        assert await a(f"{KEYED} RETURNING id") == []
        assert await w(settle, [job]) == [job.id]
        await a("ROLLBACK")


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_the_old_one_ends_while_the_new_one_is_inserted(s: Steps, end: str) -> None:
    """Settled, and not committed: it is still there. Whatever happens then, one of them is, or has run."""
    a, w = await s.session("a"), await s.worker("settle")
    [job] = await w(verbs.held, options=KEY)
    await w("BEGIN")
    assert await w(verbs.finish, [job]) == [job.id]
    assert await a(f"{KEYED} RETURNING id") == []
    await w(end)
    new = await a(f"{KEYED} RETURNING id")
    assert len(new) == (end == "COMMIT")
    assert await count(s.db) == 1


async def test_cancelled_while_the_new_one_is_inserted(s: Steps) -> None:
    a, p = await s.session("a"), await s.session("p")
    [old] = await verbs.insert(s.db, options=KEY)
    await p("BEGIN")
    assert await p(verbs.cancel, old)
    waiting = await a.blocked_by(p, f"{KEYED} RETURNING id")
    await p("COMMIT")
    assert len(await waiting) == 1
    assert await count(s.db) == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_under_a_snapshot_of_the_callers(s: Steps, level: str) -> None:
    """What others did since then, to the key or to the task in the way, is a serialization failure; no second task."""
    a, b, w = await s.session("a"), await s.session("b"), await s.worker("claims")
    me = await w(verbs.register)
    for what in ("enqueued", "claimed", "nothing"):
        await s.db.execute("TRUNCATE notifyq.task, notifyq.unique_key")
        if what != "enqueued":
            await b(KEYED)
        await a(f"BEGIN ISOLATION LEVEL {level}")
        await a("SELECT count(*) FROM notifyq.task")
        if what == "enqueued":
            await b(KEYED)
        elif what == "claimed":
            await w(verbs.claim, me)
        if what == "nothing":
            assert await a(f"{KEYED} RETURNING id") == []
        else:
            with pytest.raises(asyncpg.SerializationError):
                await a(KEYED)
        await a("ROLLBACK")
        assert await count(s.db) == 1


# --- Those that never look at a key


async def test_a_retry_asks_nobody(app: notifyq.App, db: Any) -> None:
    """Of a dead one by a person, beside a new one; and then the newest is in the way."""
    old = await put(db, "dead")
    new = await app.enqueue(Known(), unique="k")
    assert not new.existed
    assert await db.fetchval("SELECT notifyq.retry($1)", old)
    assert await count(db) == 2
    assert (await app.enqueue(Known(), unique="k")).id == new.id
    assert await db.fetchval("SELECT notifyq.cancel($1) AND notifyq.cancel($2)", old, new.id)
    assert not (await app.enqueue(Known(), unique="k")).existed


async def test_returns_ask_nobody(app: notifyq.App, db: Any) -> None:
    """Two with one key, as the first had begun when the second came: both return to the queue, and both run."""
    for give in (verbs.later, verbs.hand_back, verbs.release_unhandled):
        await db.execute("TRUNCATE notifyq.task, notifyq.unique_key")
        [job] = await verbs.held(db, options=KEY)
        new = await app.enqueue(Known(), unique="k", unique_states=WAITING)
        assert not new.existed
        assert await give(db, [job]) == [job.id]
        assert await count(db) == 2


async def test_killed_workers(app: notifyq.App, dsn: str, db: Any, spawn: Callable[..., Process]) -> None:
    """Two that run with one key, on a worker that is killed: both are rescued, both are there, and in the way."""

    class Sleep(notifyq.Task):
        seconds: float = 3600

    worker = spawn()
    await worker.line("started")
    first = await app.enqueue(Sleep(), unique="k", unique_states=WAITING)
    await worker.line("ran")
    second = await app.enqueue(Sleep(), unique="k", unique_states=WAITING)
    await worker.line("ran")
    assert first.id != second.id
    worker.signal(signal.SIGKILL)
    other = spawn()
    ran = sorted([(await other.line("ran"))["id"] for _ in range(2)])
    assert ran == [first.id, second.id]
    assert (await app.enqueue(Sleep(), unique="k")).id == second.id


# --- Keys are forgotten


async def keys(db: Any) -> list[str]:
    return [row[0] for row in await db.fetch("SELECT key FROM notifyq.unique_key ORDER BY key")]


async def test_prune_keys(app: notifyq.App, db: Any) -> None:
    """When the task is over and the time has passed; a few at a time."""
    await app.enqueue(Known(), unique="lives")
    await app.enqueue(Known(), unique="lives for", unique_for=3600)
    for key in ("over", "over too"):
        ref = await app.enqueue(Known(), unique=key)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ref.id)
    ref = await app.enqueue(Known(), unique="over for", unique_for=3600)
    assert await db.fetchval("SELECT notifyq.cancel($1)", ref.id)
    assert [await db.fetchval(SQL["prune_unique_keys"], n) for n in (2, 2, 2)] == [2, 1, 0]
    assert await keys(db) == ["lives", "lives for", "over for"]
    await db.fetch(SQL["advance_clock"], 3600.0 * 2)
    assert await db.fetchval(SQL["prune_unique_keys"], 100) == 3
    assert await keys(db) == ["lives", "lives for"]


async def test_a_key_is_remembered_for_the_longest_time_that_was_asked_for(app: notifyq.App, db: Any) -> None:
    """The second caller asks for an hour, and finds the first caller's task in its way; so does the third."""
    old = await app.enqueue(Known(), unique="k", unique_for=60)
    assert (await app.enqueue(Known(), unique="k", unique_for=3600)).existed
    await verbs.finish(db, await verbs.claim(db, await verbs.register(db)))
    await db.fetch(SQL["advance_clock"], 120.0)
    await db.fetchval(SQL["prune_unique_keys"], 100)
    again = await app.enqueue(Known(), unique="k", unique_for=3600)
    assert (again.id, again.existed) == (old.id, True)


async def test_pruning_waits_for_nobody_and_forgets_no_new_task(s: Steps) -> None:
    """A key whose old task is over, and that somebody is using: locked, it is stepped over."""
    a, p = await s.session("a"), await s.session("p")
    [old] = await verbs.insert(s.db, options=KEY)
    assert await s.db.fetchval("SELECT notifyq.cancel($1)", old)
    await a("BEGIN")
    await a(KEYED)
    assert [row[0] for row in await p(SQL["prune_unique_keys"], 10)] == [0]
    await a("COMMIT")
    await p(SQL["prune_unique_keys"], 10)
    assert await keys(s.db) == ["k"]
    assert await a(f"{KEYED} RETURNING id") == []


async def test_pruning_looks_at_the_task_that_the_key_names_now(s: Steps) -> None:
    """The new one was inserted before the prune took its snapshot, and committed after: the old one is seen to be over,
    and the new one isn't seen at all."""
    a, p, gate = await s.session("a"), await s.session("p"), await s.session("gate")
    [old] = await verbs.insert(s.db, options=KEY)
    assert await s.db.fetchval("SELECT notifyq.cancel($1)", old)
    await gate("SELECT pg_advisory_lock(7)")
    await a("BEGIN")
    await a(KEYED)
    gated = SQL["prune_unique_keys"].replace(
        "ORDER BY k.until", "AND pg_advisory_xact_lock(7)::text = '' ORDER BY k.until"
    )
    assert gated != SQL["prune_unique_keys"]
    waiting = await p.blocked_by(gate, gated, 10)
    await a("COMMIT")
    await gate("SELECT pg_advisory_unlock(7)")
    assert [row[0] for row in await waiting] == [0]
    assert await a(f"{KEYED} RETURNING id") == []
    assert await count(s.db) == 1


# --- Roles, and other ways in


async def test_the_grants(server: Server, template: str, roles: Any) -> None:
    """An enqueuer without those for keys enqueues plain tasks, and is told; with them it sees no payload."""
    await admin(server, "DROP ROLE IF EXISTS keyed", "CREATE ROLE keyed LOGIN")
    owner = await connection.connect(server.dsn("roles"), role="test")
    for grant in (*grants("enqueuer"), *grants("keys")):
        await owner.execute(grant.replace("TO enqueuer;", "TO keyed;").replace("TO keys;", "TO keyed;"))
    app = notifyq.App()
    async with app.connect(roles("enqueuer")):
        await app.enqueue(Known())
        with pytest.raises(
            DatabaseError, match=r"this user may not enqueue: .*unique_key; schema.sql ends with the GRANTs"
        ):
            await app.enqueue(Known(), unique="k")
    keyed = roles("enqueuer").replace("://enqueuer@", "://keyed@")
    async with app.connect(keyed):
        for conflict in ("keep", "keep", "replace", "move"):
            await app.enqueue(Known(), unique="k", on_conflict=conflict)
            await app.enqueue_many([Known(), Whole(user="a")])
    conn = await connection.connect(keyed, role="test")
    for statement in ("SELECT payload FROM notifyq.task", "DELETE FROM notifyq.unique_key", "DELETE FROM notifyq.task"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await conn.execute(statement)
    await conn.close()
    await owner.execute("DROP OWNED BY keyed")
    await owner.close()
    await admin(server, "DROP ROLE keyed")


async def test_sync_and_foreign(app: notifyq.App, dsn: str, db: Any) -> None:
    with notifyq.SyncClient(app).connect(dsn) as client:
        ref = client.enqueue(Known(), unique="k")
        again = client.enqueue(Known(), unique="k", unique_for=60, unique_states=STATES, on_conflict="move", delay=60)
        assert (ref.existed, again.existed, again.id) == (False, True, ref.id)
        ids = client.enqueue_many([Whole(user="b"), Known(), Whole(user="a"), Whole(user="b")])
        assert ids[0] == ids[3]
        with psycopg.connect(dsn) as conn:
            assert client.enqueue_many([Whole(user="a"), Whole(user="c")], conn=conn).existed == {ids[2]}
            conn.rollback()
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        assert not (await app.enqueue(Whole(user="c"), conn=conn)).existed
        many = await app.enqueue_many([Whole(user="c"), Known(n=3), Whole(user="d")], conn=conn)
        assert len(set(many)) == 3
        await conn.rollback()
    assert await count(db) == 4


async def test_the_command_line(dsn: str) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "notifyq", "enqueue", "Known", *args]
        return subprocess.run(
            command, env={**os.environ, "NOTIFYQ_DSN": dsn}, capture_output=True, text=True, check=False
        )

    first, second = run("--unique", "k"), run("--unique", "k", "--unique-for", "1h")
    assert first.stdout == second.stdout == "1\n"
    assert (first.stderr, second.stderr) == ("", "notifyq: nothing was enqueued: a task with this key is there\n")
    assert run("--unique-for", "1h").returncode == 2
