"""Results: whoever waits is told of a task's end, once, whatever happens to the worker, the server or the way there."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

import notifyq
from notifyq.client import results
from notifyq.client.results import Results
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server

from ..helpers import verbs, workers
from ..helpers.databases import Sessions, admin, database, grants
from ..helpers.machine import Probe, limit
from ..helpers.processes import Process
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

app = notifyq.App()


class Receipt(msgspec.Struct):
    number: int


class Pay(notifyq.Task):
    backoff = 0.001
    cents: int = 1
    fails: int = 0
    dies: bool = False
    cancels: bool = False


class Untyped(notifyq.Task):
    pass


class Gone(notifyq.Task):
    """Nobody here handles it."""


@app.handler
async def pay(task: Pay, ctx: notifyq.Context) -> Receipt | notifyq.Dead:
    if ctx.attempt <= task.fails:
        raise ValueError("not yet")
    if task.cancels:
        raise notifyq.Cancel("changed my mind")
    if task.dies:
        return notifyq.Dead("refused")
    return Receipt(task.cents)


@app.handler
def untyped(task: Untyped):  # type: ignore[no-untyped-def]
    return {"a": [1, None]}


@pytest.fixture
async def connected(dsn: str) -> AsyncIterator[notifyq.App]:
    async with app.connect(dsn):
        yield app


def waiting() -> int:
    """How many tasks the app knows to be waited for."""
    return len(app.results._waiting)


async def marked(db: Any, count: int = 1) -> None:
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE awaited"), count)


@asynccontextmanager
async def wait(ref: notifyq.Ref, *args: Any, **options: Any) -> AsyncIterator[list[Any]]:
    """Begin to wait; at the block's end it must be over, and the list has the result, or the error."""
    got: list[Any] = []

    async def run() -> None:
        try:
            got.append(await ref.result(*args, **options))
        except Exception as error:
            got.append(error)

    with anyio.fail_after(limit()):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            yield got


# --- What it gives


async def test_before_and_after_the_end(connected: notifyq.App, dsn: str, db: Any) -> None:
    ref = await app.enqueue(Pay(cents=5))
    async with wait(ref) as early:
        await marked(db)
        await app.run_worker(drain=True)
    assert early == [Receipt(5)]
    assert await ref.result() == Receipt(5)
    assert await app.ref(ref.id).result(timeout=limit()) == Receipt(5)
    assert waiting() == 0


async def test_as_the_type_that_is_asked_for(connected: notifyq.App, dsn: str) -> None:
    pays, plain = await app.enqueue(Pay(cents=5)), await app.enqueue(Untyped())
    async with working(app, dsn):
        number: int = (await pays.result(Receipt)).number
        assert number == 5
        assert await pays.result(dict[str, int]) == {"number": 5}
        assert await pays.result(Receipt | None) == Receipt(5)
        assert await plain.result() == {"a": [1, None]}
        with pytest.raises(
            notifyq.NotifyqError, match=rf"result of task {pays.id} \(Pay\) is not what .* got `object`"
        ):
            await pays.result(int)


async def test_what_another_apps_task_gives_is_plain_json(connected: notifyq.App, dsn: str) -> None:
    ref, other = await app.enqueue(Pay(cents=5)), notifyq.App()
    async with working(app, dsn), other.connect(dsn):
        assert await other.ref(ref.id).result() == {"number": 5}


async def test_a_retry_is_no_end(connected: notifyq.App, dsn: str) -> None:
    async with working(app, dsn):
        assert await (await app.enqueue(Pay(fails=3))).result(timeout=limit()) == Receipt(1)


async def test_dead_and_cancelled_raise(connected: notifyq.App, dsn: str, db: Any) -> None:
    async with working(app, dsn):
        ref = await app.enqueue(Pay(fails=2), max_attempts=2)
        with pytest.raises(notifyq.TaskDead, match=rf"^task {ref.id} \(Pay\) is dead: ValueError: not yet$") as dead:
            await ref.result()
        assert (dead.value.id, dead.value.type, dead.value.error) == (ref.id, "Pay", "ValueError: not yet")
        with pytest.raises(notifyq.TaskDead, match="refused"):
            await (await app.enqueue(Pay(dies=True))).result()
        with pytest.raises(notifyq.TaskCancelled, match="was cancelled: changed my mind"):
            await (await app.enqueue(Pay(cancels=True))).result()
        later = await app.enqueue(Pay(), delay=3600)
        async with wait(later) as got:
            await marked(db)
            assert await later.cancel() is True
        assert str(got[0]) == f"task {later.id} (Pay) was cancelled"
        assert await later.cancel() is False
        assert isinstance(got[0], notifyq.TaskFailed)


async def test_a_timeout_ends_the_wait_and_not_the_task(connected: notifyq.App, dsn: str) -> None:
    ref = await app.enqueue(Pay())
    with pytest.raises(TimeoutError, match=f"task {ref.id} hasn't ended within 0.05 s"):
        await ref.result(timeout=0.05)
    assert waiting() == 0
    async with working(app, dsn):
        assert await ref.result() == Receipt(1)


async def test_a_task_that_is_not_there(connected: notifyq.App, db: Any, dsn: str) -> None:
    with pytest.raises(notifyq.NotifyqError, match=r"there is no task 12345; it was pruned, or .* rolled back"):
        await app.ref(12345).result()
    conn: Any = await connection.connect(dsn)
    async with conn.transaction():
        ref = await app.enqueue(Pay(), conn=conn)
        with pytest.raises(notifyq.NotifyqError, match="conn= can be waited for once that is"):
            await ref.result()
    with pytest.raises(TimeoutError):  # now it is there
        await ref.result(timeout=0.05)
    await conn.close()


@pytest.mark.parametrize("id", [0, -1, 2**63, "5", None, True, 1.0])
async def test_what_is_no_id(id: Any) -> None:
    with pytest.raises(notifyq.ConfigError, match="expected a task's id"):
        app.ref(id)


async def test_without_an_app_or_a_connection() -> None:
    with pytest.raises(notifyq.ConfigError, match=r"Ref\(5\) belongs to no app here; make one .*app.ref\(5\)"):
        await notifyq.Ref(5).result()
    with pytest.raises(notifyq.ConfigError, match="not connected: wait for results inside"):
        await app.ref(5).result()
    with pytest.raises(notifyq.ConfigError, match="not connected: cancel inside"):
        await app.ref(5).cancel()


def test_a_ref_is_its_id() -> None:
    assert app.ref(5) == notifyq.Ref(5)
    assert msgspec.json.encode(app.ref(5)) == b'{"id":5}'


async def test_an_app_that_is_disconnected_tells_who_waits(dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And closes the connection at once."""
    monkeypatch.setattr(results, "IDLE_SECONDS", 3600.0)
    async with anyio.create_task_group() as group, app.connect(dsn):
        ref = await app.enqueue(Pay())

        async def waits() -> None:
            with pytest.raises(notifyq.ConfigError, match="the app was disconnected while this waited"):
                await ref.result()

        group.start_soon(waits)
        await marked(db)
    found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
    await eventually(lambda: db.fetchval(found, "notifyq results"), 0)


# --- What it costs


async def test_a_task_that_is_awaited_at_once_is_not_delayed(
    connected: notifyq.App, dsn: str, monkeypatch: pytest.MonkeyPatch, probe: Probe
) -> None:
    """The mark locks the row for a moment, and a claim steps over it just then. The fallback poll is off, and so is the
    slow look."""
    monkeypatch.setattr(results, "LOOK_SECONDS", 3600.0)
    async with working(app, dsn):
        await (await app.enqueue(Pay())).result()
        times, first = [], time.monotonic()
        for _ in range(300):
            begin = time.perf_counter()
            await (await app.enqueue(Pay())).result(timeout=limit())
            times.append(time.perf_counter() - begin)
    times.sort()
    print(f"enqueue to result: p50 {times[150] * 1e3:.1f} ms, p99 {times[296] * 1e3:.1f}, worst {times[-1] * 1e3:.1f}")
    assert times[150] < 0.1 + probe.late(first)


async def test_thousands_wait_on_one_connection(connected: notifyq.App, dsn: str, db: Any) -> None:
    ids = await app.enqueue_many([Pay(cents=n) for n in range(5000)])
    got: dict[int, Any] = {}

    async def one(n: int, id: int) -> None:
        got[n] = await app.ref(id).result()

    with anyio.fail_after(limit()):
        async with anyio.create_task_group() as group:
            for n, id in enumerate(ids):
                group.start_soon(one, n, id)
            await marked(db, 5000)
            count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
            assert await db.fetchval(count, "notifyq results") == 1
            async with working(app, dsn):
                await eventually(lambda: asyncio.sleep(0, len(got)), 5000)
    assert got == {n: Receipt(n) for n in range(5000)}
    assert waiting() == 0


async def test_one_who_is_cancelled_leaves_nothing(connected: notifyq.App, db: Any) -> None:
    ref = await app.enqueue(Pay())
    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(ref.result)
        await marked(db)
        assert waiting() == 1
        group.cancel_scope.cancel()
    kept = app.results
    assert not kept._waiting
    assert not kept._ask
    assert not kept._again


async def test_who_never_waits_has_no_connection(connected: notifyq.App, dsn: str, db: Any) -> None:
    async with working(app, dsn):
        await app.enqueue(Pay())
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), 1)
    assert app.results._task is None


async def test_nor_who_has_not_waited_for_long(
    connected: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "IDLE_SECONDS", 0.1)
    found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
    async with working(app, dsn):
        for _ in range(2):
            assert await (await app.enqueue(Pay())).result() == Receipt(1)
            await eventually(lambda: db.fetchval(found, "notifyq results"), 0)


async def test_outcomes_are_kept_for_who_waits_without_history(connected: notifyq.App, dsn: str, db: Any) -> None:
    """Without history, a task that nobody waits for leaves nothing; one that is waited for, its outcome."""
    plain, waited = await app.enqueue(Pay()), await app.enqueue(Pay(cents=7))
    async with wait(waited) as got:
        await marked(db)
        await app.run_worker(drain=True, history=0)
    assert got == [Receipt(7)]
    rows = await db.fetch("SELECT id FROM notifyq.all_tasks")
    assert waited.id in [row[0] for row in rows]
    assert plain.id not in [row[0] for row in rows]


# --- What may go wrong


async def test_a_row_that_is_locked_is_marked_later(
    connected: notifyq.App, connect: Sessions, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has locked the row isn't waited for, and the others aren't kept."""
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

    real, _ = Results._tell, monkeypatch.setattr(Results, "_tell", tell)
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
    """Held up between the two, it says "ask again", and not that nothing is to be waited for."""
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


async def test_who_may_not_await_is_told(server: Server, dsn: str, db: Any) -> None:
    """And who is told doesn't keep trying; one who may, by the GRANTs as documented, gets results."""
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


GARBAGE = [
    "",
    "x",
    "-1",
    "0",
    "1e3",
    "１",
    "9" * 7000,
    "99999999999999999999",
    "\n1",
    "1; DROP TABLE notifyq.task",
    "☃",
]


async def test_notifications_that_nobody_meant(connected: notifyq.App, connect: Sessions, dsn: str, db: Any) -> None:
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
    """It is told to who waits for it, and keeps nobody else."""
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
    """Where no notification arrives, it looks more often. (The real thing: test_servers.)"""
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
