"""Results: a caller that waits is told of a task's end once, whatever happens to the worker, the server or the
network."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

import notifyq
from notifyq.client import results
from notifyq.database import connection

from ..helpers.machine import limit
from ..helpers.payments import Pay, Receipt, Untyped, app, marked, wait, waiting
from ..helpers.running import working
from ..helpers.waiting import eventually


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
            notifyq.NotifyqError, match=rf"result of task {pays.id} \(Pay\) isn't of the wanted type.* got `object`"
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


async def test_without_an_app_or_a_connection(dsn: str) -> None:
    with pytest.raises(notifyq.ConfigError, match=r"Ref\(5\) belongs to no app here; make one .*app.ref\(5\)"):
        await notifyq.Ref(5).result()
    with pytest.raises(notifyq.ConfigError, match="not connected: wait for results inside"):
        await app.ref(5).result()
    with (
        notifyq.SyncClient(app).connect(dsn) as client,
        pytest.raises(notifyq.ConfigError, match=r"A SyncClient can't wait for results; .*notifyq\.all_tasks"),
    ):
        await client.enqueue(Untyped()).result()
    with pytest.raises(notifyq.ConfigError, match="not connected: cancel inside"):
        await app.ref(5).cancel()


def test_a_ref_is_its_id() -> None:
    assert app.ref(5) == notifyq.Ref(5)
    assert msgspec.json.encode(app.ref(5)) == b'{"id":5}'


async def test_an_app_that_is_disconnected_tells_its_callers(
    dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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
