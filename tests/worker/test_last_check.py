"""What a drain does about tasks that other workers hold: dead ones, frozen ones, and those without a handler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from notifyq.database.connection import connect_worker
from notifyq.worker import isolate
from notifyq.worker.last_check import RESCUE_SECONDS, Rescues

from ..helpers.lifecycle import Bench
from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.rows import insert, states
from ..helpers.running import working
from ..helpers.statements import register
from ..helpers.waiting import eventually

HELD = "UPDATE notifyq.task SET worker = $1, attempts = 1 WHERE id = ANY ($2::bigint[])"


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench


async def drain(bench: Bench, dsn: str) -> None:
    async with working(bench.app, dsn, drain=True) as worker:
        with anyio.fail_after(limit()):
            await worker.done.wait()


async def test_a_drain_takes_tasks_whose_worker_is_not_registered(
    bench: Bench, db: Any, dsn: str, logged: Logged
) -> None:
    """As in a restored dump. No worker waits for them: the drain takes them at once."""
    ids = await insert(db, "Note", 3)
    await db.execute(HELD, 7, ids)
    await drain(bench, dsn)
    assert await states(db, ids) == {("done", 2): 3}
    assert logged("took back tasks of workers that are gone")[0]["tasks"] == 3
    assert not logged("waiting until")


async def test_a_drain_waits_until_a_dead_workers_tasks_are_rescued(
    bench: Bench, db: Any, dsn: str, logged: Logged
) -> None:
    ids = await insert(db, "Note", 3)
    dead = await register(db)
    await db.execute(HELD, dead, ids)
    await drain(bench, dsn)
    assert await states(db, ids) == {("done", 2): 3}
    assert [line["workers"] for line in logged("waiting until the tasks of dead workers are rescued")] == [[dead]]
    assert len(logged("rescued the tasks of a dead worker")) == 1


async def test_a_drain_waits_for_no_frozen_worker_and_for_no_tasks_of_others(
    bench: Bench, db: Any, dsn: str, logged: Logged
) -> None:
    """A frozen worker has its sessions. A dead worker's tasks of other types and queues are for other workers."""
    frozen, dead = await register(db), await register(db, "host:2")
    ids, strange = await insert(db, "Note"), await insert(db, "Strange") + await insert(db, "Note", queue="other")
    await db.execute(HELD, frozen, ids)
    await db.execute(HELD, dead, strange)
    session = await connect_worker(dsn, "settle", worker=frozen)
    try:
        await drain(bench, dsn)
    finally:
        session.terminate()
    assert await states(db, ids) == {("running", 1): 1}
    assert not logged("waiting until")


async def test_a_rescuer_at_work_is_no_sign_of_life(
    bench: Bench, db: Any, dsn: str, connect: Any, logged: Logged
) -> None:
    """It has the dead worker's lock until it commits. The tasks are ready then, and the drain runs them."""
    ids = await insert(db, "Note")
    dead = await register(db)
    await db.execute(HELD, dead, ids)
    rescuer = await connect()
    transaction = rescuer.transaction()
    await transaction.start()
    assert await rescuer.fetchval("SELECT pg_try_advisory_xact_lock(1852990827, $1::integer)", dead)
    await rescuer.execute("DELETE FROM notifyq.worker WHERE id = $1", dead)
    await rescuer.execute("UPDATE notifyq.task SET worker = NULL WHERE id = ANY ($1::bigint[])", ids)

    async def waits() -> bool:
        return bool(logged("waiting until the tasks of dead workers are rescued"))

    async with working(bench.app, dsn, drain=True) as worker:
        try:
            await eventually(waits)
        finally:
            await transaction.commit()
        with anyio.fail_after(limit()):
            await worker.done.wait()
    assert await states(db, ids) == {("done", 2): 1}


def test_a_rescue_is_expected_of_a_worker_that_stays_silent_and_not_for_ever() -> None:
    """A worker behind a pooler has no lock, and lives by its heartbeat."""
    rescues = Rescues()
    assert rescues.expected([(1, 5.0), (2, 5.0)], 100.0) == [1, 2]
    assert rescues.expected([(1, 5.0), (2, 6.5), (3, 5.0)], 101.0) == [1, 3]
    assert rescues.expected([(1, 5.0), (2, 6.5), (3, 5.0)], 100.0 + RESCUE_SECONDS) == [3]
    assert rescues.expected([], 102.0) == []


@pytest.mark.parametrize("lacks", [True, False])
async def test_a_drain_looks_again_beside_a_worker_that_lacks_a_handler(
    bench: Bench, db: Any, dsn: str, monkeypatch: pytest.MonkeyPatch, lacks: bool
) -> None:
    """That worker has claimed a task for a moment. It releases the task when the drain has looked for all that may be
    left, and the drain hears of no notification."""
    isolation = isolate.Isolation.run
    types = ["Strange"] if lacks else bench.app.registry.types
    other = await register(db, types=types, allowed=[10] * len(types))
    ids = await insert(db, "Note")
    await db.execute(HELD, other, ids)
    looks = 0

    async def run(*args: Any) -> int:
        nonlocal looks
        begun = await isolation(*args)
        looks += 1
        await db.execute(
            "UPDATE notifyq.task SET worker = NULL, attempts = 0, withheld = true WHERE id = ANY ($1) AND worker = $2",
            ids, other,
        )  # fmt: skip
        return begun

    monkeypatch.setattr(isolate.Isolation, "run", run)
    session = await connect_worker(dsn, "settle", worker=other)
    try:
        await drain(bench, dsn)
    finally:
        session.terminate()
    assert await states(db, ids) == ({("done", 1): 1} if lacks else {("ready", 0): 1})
    assert (looks > 1) is lacks
