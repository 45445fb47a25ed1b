"""Tasks that wait for others, while workers are killed."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from ..helpers.predecessors import INSERT, LEFT, Bench, where
from ..helpers.processes import Process, started
from ..helpers.rows import insert, state
from ..helpers.waiting import eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


@pytest.mark.slow
async def test_killed(spawn: Callable[..., Process], db: Any, bench: Bench) -> None:
    """A worker is killed with what it ran, predecessors of other tasks among it: a chain goes on, and a fan-in has all
    its results."""
    workers = [await started(spawn, 'queues=["default"]') for _ in range(2)]
    before = await insert(db, "Sleep", 20)
    waits = await db.fetchval(INSERT, "Quick", before, None)
    await eventually(lambda: where(db, waits), ["after"])
    names = "SELECT DISTINCT worker FROM notifyq.all_tasks WHERE state = 'running'"
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"), 20)
    [pid] = [int(row[0].rpartition(":")[2]) for row in await db.fetch(names)]
    victim, heir = sorted(workers, key=lambda story: story.process.pid != pid)
    victim.process.signal(signal.SIGKILL)
    await heir.reach(20, "ran", attempt=2)
    assert await where(db, waits) == ["after"]
    for id in before:
        assert await db.fetchval("SELECT notifyq.cancel($1)", id)
    await eventually(lambda: where(db, waits), ["cancelled"])
    assert not await db.fetchval(LEFT)


@pytest.mark.slow
async def test_killed_at_random(spawn: Callable[..., Process], db: Any) -> None:
    """One of three workers is killed again and again, while chains and fans run: every task ends, and none begins
    before what it waits for has ended."""
    ids: list[int] = []
    for n in range(1500):
        # The one before it, and the one that is ten before, if there is one.
        after = (ids[-1:] if n % 4 else []) + (ids[-10:-9] if n % 3 else [])
        ids.append(await db.fetchval(INSERT, "Quick", after or None, "run" if after else None))
    last = await db.fetchval(INSERT, "Quick", ids, "run")
    workers = [await started(spawn, "concurrency=5") for _ in range(3)]
    for _ in range(5):
        await anyio.sleep(0.05)
        workers[0].process.signal(signal.SIGKILL)
        workers.append(await started(spawn, "concurrency=5"))
        workers.pop(0)
    await eventually(lambda: state(db, last), "done", 40)
    assert set(await where(db, *ids)) == {"done"}
    assert not await db.fetch(
        """SELECT t.id, f.id FROM notifyq.finished t CROSS JOIN jsonb_array_elements_text(t.options -> 'after') a (id)
           JOIN notifyq.finished f ON f.id = a.id::bigint
           WHERE t.xmin::text::bigint <= f.xmin::text::bigint"""
    ), "by the transactions that wrote their ends, whatever the clock has done meanwhile"
    await eventually(lambda: db.fetchval(LEFT), 0)
