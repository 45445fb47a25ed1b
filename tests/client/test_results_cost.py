"""What waiting for results costs: one connection for thousands, and nothing without a waiter."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.client import results

from ..helpers.machine import Probe, limit
from ..helpers.payments import Pay, Receipt, app, marked, wait, waiting
from ..helpers.running import working
from ..helpers.waiting import eventually


async def test_a_task_that_is_awaited_at_once_is_not_delayed(
    connected: notifyq.App, dsn: str, monkeypatch: pytest.MonkeyPatch, probe: Probe
) -> None:
    """Marking it as awaited locks the row for a moment, and a claim skips it just then. The fallback poll is off, and
    so is the slow look."""
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


async def test_a_cancelled_caller_leaves_nothing(connected: notifyq.App, db: Any) -> None:
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


async def test_an_app_that_never_waits_has_no_connection(connected: notifyq.App, dsn: str, db: Any) -> None:
    async with working(app, dsn):
        await app.enqueue(Pay())
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), 1)
    assert app.results._task is None


async def test_nor_has_an_app_that_has_not_waited_for_long(
    connected: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "IDLE_SECONDS", 0.1)
    found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
    async with working(app, dsn):
        for _ in range(2):
            assert await (await app.enqueue(Pay())).result() == Receipt(1)
            await eventually(lambda: db.fetchval(found, "notifyq results"), 0)


async def test_outcomes_are_kept_for_callers_without_history(connected: notifyq.App, dsn: str, db: Any) -> None:
    """Without history, a task for whose result no caller waits leaves no row. If a caller waits, its outcome stays."""
    plain, waited = await app.enqueue(Pay()), await app.enqueue(Pay(cents=7))
    async with wait(waited) as got:
        await marked(db)
        await app.run_worker(drain=True, history=0)
    assert got == [Receipt(7)]
    rows = await db.fetch("SELECT id FROM notifyq.all_tasks")
    assert waited.id in [row[0] for row in rows]
    assert plain.id not in [row[0] for row in rows]
