"""What a worker does from time to time: prune, reclaim, and look again at keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from notifyq.worker import heartbeat, maintenance

from ..helpers import verbs
from ..helpers.lifecycle import Bench
from ..helpers.rows import state
from ..helpers.running import working
from ..helpers.waiting import eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    """Connected, so that tests and handlers can enqueue."""
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


# What a worker sees to now and then. All of it is due at once here.


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for chore in (*maintenance.PRUNING, maintenance.RECLAIM_UNOWNED, maintenance.RECHECK_WAITING):
        monkeypatch.setattr(chore, "every", 0.0)
    for name in ("ASK_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(heartbeat, name, 0.02)


@pytest.mark.usefixtures("at_once")
async def test_a_worker_forgets_what_ended_long_ago(bench: Bench, db: Any, dsn: str) -> None:
    await verbs.finish(db, await verbs.held(db, 2))
    old, new = [row[0] for row in await db.fetch("SELECT id FROM notifyq.finished ORDER BY id")]
    await db.execute("UPDATE notifyq.finished SET processed_at = now() - interval '1 h' WHERE id = $1", old)
    async with working(bench.app, dsn, history=60):
        await eventually(lambda: db.fetchval("SELECT array_agg(id) FROM notifyq.finished"), [new])


@pytest.mark.usefixtures("at_once")
async def test_a_worker_finds_tasks_of_workers_that_are_gone(bench: Bench, db: Any, dsn: str) -> None:
    """Such a worker was rescued while its claim was under way, and no heartbeat tells of the task."""
    await db.execute("INSERT INTO notifyq.task (type, payload, worker) VALUES ('Note', '{\"name\": \"a\"}', 4711)")
    async with working(bench.app, dsn):
        assert await bench.seen.reach(1) == ["a"]


@pytest.mark.usefixtures("at_once")
async def test_a_worker_looks_again_at_keys_where_tasks_wait(bench: Bench, db: Any, dsn: str) -> None:
    """A task waits for a slot, and nothing has told that the slot is free."""
    options = '{"limit_key": "k", "limit_running": 1}'
    jobs = await verbs.held(db, 2, type="Note", options=options)
    assert [why for _, why in await verbs.admit(db, jobs)] == [None, "limit"]
    await verbs.finish(db, jobs[:1])
    await db.execute("DELETE FROM notifyq.slot_released")
    async with working(bench.app, dsn):
        await eventually(lambda: state(db, jobs[1].id), "done")
