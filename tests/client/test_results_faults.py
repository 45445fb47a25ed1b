"""Waiting for a result while rows are locked, connections break, servers restart and notifications are made up."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.client import results
from notifyq.client.results import Results
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server

from ..helpers import verbs, workers
from ..helpers.databases import Sessions, admin, database, grants
from ..helpers.garbage import GARBAGE
from ..helpers.machine import limit
from ..helpers.payments import Pay, Receipt, app, marked, wait, waiting
from ..helpers.processes import Process
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually


async def test_a_row_that_is_locked_is_marked_later(
    connected: notifyq.App, connect: Sessions, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No caller waits for the session that has locked the row, and the other tasks are marked."""
    monkeypatch.setattr(results, "LOOK_SECONDS", 3600.0)
    locked, other = await app.enqueue(Pay(cents=1)), await app.enqueue(Pay(cents=2))
    someone = await connect()
    await someone.execute("BEGIN")
    await someone.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", locked.id)
    async with working(app, dsn), wait(locked) as got:
        assert await other.result(timeout=limit()) == Receipt(2)
        assert not got
        await someone.execute("COMMIT")
    assert got == [Receipt(1)]


async def test_a_row_that_stays_locked_is_asked_about_ever_more_rarely(
    connected: notifyq.App, connect: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause is twice as long as the one before: a lock of an hour costs two statements a second."""
    monkeypatch.setattr(results, "LOOK_SECONDS", 3600.0)
    asked = Seen()

    async def tell(self: Results, conn: Any, ids: Sequence[int]) -> None:
        asked.add(time.monotonic())
        await real(self, conn, ids)

    real, _ = Results._look_at, monkeypatch.setattr(Results, "_look_at", tell)
    locked = await app.enqueue(Pay())
    someone = await connect()
    await someone.execute("BEGIN")
    await someone.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", locked.id)
    async with wait(locked):
        times = (await asked.reach(7))[:7]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert all(pause > 0.001 * 2**n for n, pause in enumerate(pauses[1:])), pauses
        await someone.execute("COMMIT")
        await app.cancel(locked.id)


async def test_what_ends_between_the_snapshot_and_the_lock(connect: Sessions, db: Any) -> None:
    """The statement is held up between the two. It answers "ask again", and not that there is nothing to wait for."""
    (job,) = await verbs.held(db)
    ender, asker = await connect(), await connect()
    await ender.execute("BEGIN")
    await verbs.finish(ender, [job])
    row = await asker.fetchrow(SQL["read_and_await"], [job.id])
    assert (row["state"], row["marked"]) == ("running", False)
    await ender.execute("COMMIT")
    row = await asker.fetchrow(SQL["read_and_await"], [job.id])
    assert (row["state"], row["marked"]) == ("done", True)


@pytest.mark.slow
async def test_a_worker_is_killed(connected: notifyq.App, spawn: Callable[..., Process], db: Any) -> None:
    """Its task is rescued, and ends elsewhere; that is an end like any other."""
    first = spawn()
    await first.line("started")
    ref = await app.enqueue(workers.Sleep(seconds=3600))
    await first.line("ran")
    async with wait(ref) as got:
        await marked(db)
        second = spawn()
        await second.line("started")
        first.signal(signal.SIGKILL)
        await second.line("ran")
        assert not got
        await db.execute("UPDATE notifyq.task SET worker = NULL, run_at = now(), payload = '{\"seconds\": 0}'")
        await second.line("cancelled")
        await second.line("ended")
    assert got == [None]


async def test_a_lost_notification_is_made_up_for(
    connected: notifyq.App, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LOOK_SECONDS", 0.2)
    (job,) = await verbs.held(db)
    async with wait(app.ref(job.id)) as got:
        await marked(db)
        await db.execute("ALTER TABLE notifyq.task DISABLE TRIGGER on_task_deleted")
        await verbs.finish(db, [job])
    assert got == [None]


async def test_the_connection_is_lost(connected: notifyq.App, db: Any, logged: Any) -> None:
    """What ended meanwhile is read when it is back."""
    one, other = await verbs.held(db, 2)
    async with wait(app.ref(one.id)) as first, wait(app.ref(other.id)) as second:
        await marked(db, 2)
        async with db.transaction():
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'notifyq results'"
            assert await db.fetchval(ended)
            await verbs.finish(db, [one])
        await eventually(lambda: asyncio.sleep(0, first), [None])
        assert not second
        await verbs.finish(db, [other])
    assert second == [None]
    assert len(logged("lost the database, trying again")) == len(logged("the database is back")) == 1


@pytest.mark.slow
async def test_the_server_restarts_while_thousands_wait() -> None:
    with Server() as server:
        dsn = server.dsn("postgres")
        db: Any = await connection.connect(dsn)
        await schema.migrate(db)
        async with app.connect(dsn), anyio.create_task_group() as group:
            ids = await app.enqueue_many([Pay(cents=n) for n in range(2000)])
            got: list[Any] = []

            async def one(id: int) -> None:
                got.append(await app.ref(id).result())

            for id in ids:
                group.start_soon(one, id)
            await marked(db, 2000)
            await anyio.to_thread.run_sync(server.restart)
            assert not got
            with anyio.fail_after(limit()):
                async with working(app, dsn):
                    await eventually(lambda: asyncio.sleep(0, len(got)), 2000)
        assert sorted(receipt.number for receipt in got) == list(range(2000))


async def test_a_role_that_may_not_await_is_told(server: Server, dsn: str, db: Any) -> None:
    """That caller doesn't try again. One that may await, by the GRANTs as documented, gets results."""
    await admin(server, "DROP ROLE IF EXISTS client", "CREATE ROLE client LOGIN")
    try:
        for grant in grants("enqueuer"):
            await db.execute(grant.replace("TO enqueuer", "TO client"))
        async with app.connect(dsn.replace("://notifyq@", "://client@")), working(app, dsn):
            ref = await app.enqueue(Pay())
            with pytest.raises(notifyq.DatabaseError, match=r"may not await results: permission denied .*GRANTs"):
                await ref.result(timeout=limit())
            with pytest.raises(notifyq.DatabaseError, match=r"may not cancel: permission denied .*GRANTs"):
                await ref.cancel()
            for grant in grants("awaiter"):
                await db.execute(grant.replace("TO awaiter", "TO client"))
            assert await ref.result(timeout=limit()) == Receipt(1)
    finally:
        await db.execute("DROP OWNED BY client")
        await admin(server, "DROP ROLE client")


async def test_without_the_schema(empty_dsn: str) -> None:
    async with app.connect(empty_dsn):
        with pytest.raises(notifyq.SchemaError, match="notifyq migrate"):
            await app.ref(1).result(timeout=limit())


async def test_forged_notifications(connected: notifyq.App, connect: Sessions, dsn: str, db: Any) -> None:
    """Any role can NOTIFY. Of an id that isn't waited for nothing comes, of one that is, a look."""
    (job,) = await verbs.held(db)
    stranger = await connect()
    async with wait(app.ref(job.id)) as got:
        await marked(db)
        for channel in (results.DONE, results.PROGRESS):
            for payload in (*GARBAGE, str(job.id), str(job.id + 1)):
                await stranger.execute("SELECT pg_notify($1, $2)", channel, payload)
            await stranger.execute("SELECT pg_notify($1, i::text) FROM generate_series(1, 20000) AS i", channel)
        assert not got
        assert waiting() == 1
        await verbs.finish(db, [job])
    assert got == [None]


@pytest.mark.slow
async def test_a_result_that_can_not_be_sent(connected: notifyq.App, db: Any) -> None:
    """The caller that waits for it gets the error, and the others get their results."""
    huge = "(SELECT jsonb_agg(1e131071::numeric) FROM generate_series(1, 10000))"
    await db.execute(f"""
        INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, state, queue, type,
                                      payload, result)
        SELECT 1000 + i, now(), now(), now(), 0, 1, 'done', 'default', 'T', '{{}}',
               CASE i WHEN 1 THEN {huge} ELSE '5' END
        FROM generate_series(1, 2) AS i""")
    async with wait(app.ref(1001)) as bad, wait(app.ref(1002)) as good:
        pass
    assert good == [5]
    assert "PostgreSQL can't read out the result of task 1001" in str(bad[0])


async def test_pooled(connected: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no notification arrives, the app looks more often. (test_servers has a real pooler.)"""
    monkeypatch.setattr(results, "is_pooled", lambda conn: True)
    monkeypatch.setattr(results, "POOLED_SECONDS", 0.05)
    async with working(app, dsn):
        assert await (await app.enqueue(Pay())).result(timeout=limit()) == Receipt(1)
    conn = await connection.connect(dsn)
    listened = await conn.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query ILIKE 'LISTEN%done%'")
    await conn.close()
    assert not listened


async def test_two_apps_wait_for_the_same(server: Server, template: str) -> None:
    others = [notifyq.App() for _ in range(3)]
    async with database(server, template) as dsn, app.connect(dsn):
        ref = await app.enqueue(Pay())
        got: list[Any] = []

        async def one(other: notifyq.App) -> None:
            async with other.connect(dsn):
                got.append(await other.ref(ref.id).result(Receipt))

        async with anyio.create_task_group() as group:
            for other in others:
                group.start_soon(one, other)
            async with working(app, dsn):
                await eventually(lambda: asyncio.sleep(0, len(got)), 3)
    assert got == [Receipt(1)] * 3
