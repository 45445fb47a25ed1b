"""Unique keys: statements that ignore them, keys that are forgotten, roles, and other ways to enqueue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import pytest

import notifyq
from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.errors import DatabaseError

from ..helpers import verbs
from ..helpers.databases import admin, grants
from ..helpers.processes import Process
from ..helpers.steps import Steps
from ..helpers.uniques import KEY, KEYED, WAITING, Known, Whole, put
from .test_unique import STATES
from .test_unique_sql import count


async def test_a_retry_ignores_the_unique_key(app: notifyq.App, db: Any) -> None:
    """A person retries a dead task beside a new one with its key. Afterwards the newest task is the one that prevents
    others."""
    old = await put(db, "dead")
    new = await app.enqueue(Known(), unique="k")
    assert not new.existed
    assert await db.fetchval("SELECT notifyq.retry($1)", old)
    assert await count(db) == 2
    assert (await app.enqueue(Known(), unique="k")).id == new.id
    assert await db.fetchval("SELECT notifyq.cancel($1) AND notifyq.cancel($2)", old, new.id)
    assert not (await app.enqueue(Known(), unique="k")).existed


async def test_a_return_to_the_queue_ignores_the_unique_key(app: notifyq.App, db: Any) -> None:
    """Two tasks have one key, as the first had begun when the second came: both return to the queue, and both run."""
    for give in (verbs.later, verbs.hand_back, verbs.release_unhandled):
        await db.execute("TRUNCATE notifyq.task, notifyq.unique_key")
        [job] = await verbs.held(db, options=KEY)
        new = await app.enqueue(Known(), unique="k", unique_states=WAITING)
        assert not new.existed
        assert await give(db, [job]) == [job.id]
        assert await count(db) == 2


async def test_killed_workers(app: notifyq.App, dsn: str, db: Any, spawn: Callable[..., Process]) -> None:
    """A worker that runs two tasks with one key is killed: both are rescued, both run again, and they prevent a
    third."""

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


async def keys(db: Any) -> list[str]:
    return [row[0] for row in await db.fetch("SELECT key FROM notifyq.unique_key ORDER BY key")]


async def test_prune_keys(app: notifyq.App, db: Any) -> None:
    """A key is forgotten when its task is over and its time has passed; a few are at a time."""
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
    """The second caller asks for an hour, and finds the task of the first; so does the third."""
    old = await app.enqueue(Known(), unique="k", unique_for=60)
    assert (await app.enqueue(Known(), unique="k", unique_for=3600)).existed
    await verbs.finish(db, await verbs.claim(db, await verbs.register(db)))
    await db.fetch(SQL["advance_clock"], 120.0)
    await db.fetchval(SQL["prune_unique_keys"], 100)
    again = await app.enqueue(Known(), unique="k", unique_for=3600)
    assert (again.id, again.existed) == (old.id, True)


async def test_pruning_keys_waits_for_no_enqueuer_and_forgets_no_new_task(s: Steps) -> None:
    """The old task of a key is over, and an enqueuer uses the key: its row is locked, so the prune skips it."""
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
    """The new task was inserted before the prune took its snapshot, and committed after: the prune sees that the old
    one is over, and doesn't see the new one at all."""
    a, p, holder = await s.session("a"), await s.session("p"), await s.session("holder")
    [old] = await verbs.insert(s.db, options=KEY)
    assert await s.db.fetchval("SELECT notifyq.cancel($1)", old)
    await holder("SELECT pg_advisory_lock(7)")
    await a("BEGIN")
    await a(KEYED)
    stopped = SQL["prune_unique_keys"].replace(
        "ORDER BY k.until", "AND pg_advisory_xact_lock(7)::text = '' ORDER BY k.until"
    )
    assert stopped != SQL["prune_unique_keys"]
    waiting = await p.blocked_by(holder, stopped, 10)
    await a("COMMIT")
    await holder("SELECT pg_advisory_unlock(7)")
    assert [row[0] for row in await waiting] == [0]
    assert await a(f"{KEYED} RETURNING id") == []
    assert await count(s.db) == 1


NEVER = ("SELECT payload FROM notifyq.task", "DELETE FROM notifyq.unique_key", "DELETE FROM notifyq.task")
ONLY_TO_REPLACE = ("UPDATE notifyq.task SET expires_at = '-infinity'", "UPDATE notifyq.task SET payload = '7'")


async def refused(conn: Any, *statements: str) -> None:
    for statement in statements:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await conn.execute(statement)


async def test_the_grants(server: Server, template: str, roles: Any) -> None:
    """An enqueuer without the grants for keys enqueues plain tasks, and an error names what is missing. With them it
    sees no payload."""
    await admin(server, "DROP ROLE IF EXISTS keyed", "CREATE ROLE keyed LOGIN")
    owner = await connection.connect(server.dsn("roles"), role="test")
    to_keep, to_replace = grants("keys")[:3], grants("keys")[3:]
    for grant in (*grants("enqueuer"), *to_keep):
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
        conn = await connection.connect(keyed, role="test")
        for _ in range(2):
            await app.enqueue(Known(), unique="k", expires=60)
            await app.enqueue_many([Known(), Whole(user="a")])
        await refused(conn, *NEVER, *ONLY_TO_REPLACE)
        for grant in to_replace:
            await owner.execute(grant.replace("TO keys;", "TO keyed;"))
        for conflict in ("keep", "replace", "move"):
            await app.enqueue(Known(), unique="k", on_conflict=conflict, expires=60)
    await refused(conn, *NEVER)
    for statement in ONLY_TO_REPLACE:  # docs/security.md says what comes of it
        await conn.execute(statement)
    await conn.close()
    await owner.execute("DROP OWNED BY keyed")
    await owner.close()
    await admin(server, "DROP ROLE keyed")


async def test_sync_and_other_drivers(app: notifyq.App, dsn: str, db: Any) -> None:
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
