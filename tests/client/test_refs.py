"""A Ref that was kept while its id became another task's: after a failover to a standby that lagged, or a TRUNCATE."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import anyio
import msgspec
import psycopg
import pytest

import notifyq
from notifyq.client import results

from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import eventually


class Job(notifyq.Task):
    name: str = ""


@pytest.fixture
def app() -> notifyq.App:
    app = notifyq.App()

    @app.handler
    async def job(task: Job) -> str:
        return task.name

    return app


async def lose(db: Any) -> None:
    """Delete every task, and set the ids back."""
    await db.execute("TRUNCATE notifyq.task, notifyq.finished")
    await db.execute("ALTER SEQUENCE notifyq.task_id_seq RESTART WITH 1")


async def kept(app: notifyq.App, dsn: str, how: str) -> notifyq.Ref:
    """A Ref as this way of enqueuing returns it."""
    if how == "enqueue":
        return await app.enqueue(Job())
    if how == "unique":
        return await app.enqueue(Job(), unique="key")
    if how == "existed":
        await app.enqueue(Job(), unique="key")
        again = await app.enqueue(Job(), unique="key")
        assert again.existed
        return again
    if how == "group":
        return (await app.enqueue_many([], then=Job()))[1]
    if how == "conn":
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            return await app.enqueue(Job(), conn=conn)
    with notifyq.SyncClient(app).connect(dsn) as client:
        if how == "sync group":
            return client.enqueue_many([], then=Job())[1]
        return client.enqueue(Job())


WAYS = ("enqueue", "unique", "existed", "group", "conn", "sync", "sync group")


@pytest.mark.parametrize("how", WAYS)
async def test_a_kept_ref_is_refused_for_another_task(app: notifyq.App, dsn: str, db: Any, how: str) -> None:
    async with app.connect(dsn):
        ref = await kept(app, dsn, how)
        row = await db.fetchrow("SELECT id, created_at FROM notifyq.task")
        assert (ref.id, ref.created_at) == tuple(row)
        await lose(db)
        other = await app.enqueue(Job(name="other"))
        assert other.id == ref.id == 1
        assert other != ref
        refused = pytest.raises(
            notifyq.NotifyqError, match=r"task 1 isn't the one that this Ref is of: .* and that one"
        )
        with refused:
            await ref.cancel()
        with refused:
            await ref.result(timeout=limit())
        with refused:
            async for _ in ref.progress():
                raise AssertionError
        assert await db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = 1") == "ready"
        async with working(app, dsn):
            assert await other.result(timeout=limit()) == "other"
        with refused:
            await ref.result(timeout=limit())  # the other one has ended
        with refused:
            await ref.cancel()


async def test_a_wait_that_has_begun_is_refused_too(
    app: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other task isn't marked as awaited, so its end notifies no one: the slow look finds it."""
    monkeypatch.setattr(results, "LOOK_SECONDS", 0.2)
    async with app.connect(dsn):
        ref = await app.enqueue(Job())
        failed: list[BaseException] = []

        async def wait() -> None:
            try:
                await ref.result(timeout=limit())
            except notifyq.NotifyqError as error:
                failed.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await eventually(lambda: db.fetchval("SELECT awaited FROM notifyq.task"), True)
            async with db.transaction():
                await lose(db)
                await app.enqueue(Job(), conn=db)
            async with working(app, dsn):
                await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), 1)
        assert "isn't the one that this Ref is of" in str(failed[0])


async def test_its_own_task_is_answered_for(app: notifyq.App, dsn: str) -> None:
    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Job(name="mine"))
        assert await ref.result(timeout=limit()) == "mine"
        assert not await ref.cancel()
        late = await app.enqueue(Job(), delay=3600)
        assert await app.ref(late.id, late.created_at).cancel()
        assert not await app.ref(99999, datetime.now(UTC)).cancel()
        assert await app.ref(ref.id).result(timeout=limit()) == "mine"  # without the time, any task with this id


async def test_it_is_compared_encoded_and_pickled(app: notifyq.App, dsn: str) -> None:
    async with app.connect(dsn):
        ref = await app.enqueue(Job())
        for copy in (
            pickle.loads(pickle.dumps(ref)),
            msgspec.json.decode(msgspec.json.encode(ref), type=notifyq.Ref),
            app.ref(ref.id, ref.created_at),
        ):
            assert (copy, copy.created_at) == (ref, ref.created_at)
        another = app.ref(ref.id, datetime.now(UTC))
        for same in (True, False):  # each operator has code of its own
            left = app.ref(ref.id) if same else another
            assert (left == ref) is same
            assert (left != ref) is not same
        assert hash(app.ref(ref.id)) == hash(ref)
        assert ref != ref.id
        assert msgspec.json.encode(app.ref(ref.id)) == b'{"id":%d}' % ref.id
        for wrong in ("2026-01-01", datetime.now(UTC).replace(tzinfo=None), 5):
            with pytest.raises(notifyq.ConfigError, match="expected a datetime with a timezone"):
                app.ref(1, wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
