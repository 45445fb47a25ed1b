"""Queues at run time: paused, resumed and limited for every worker there is, within a moment."""

from __future__ import annotations

import json
import time
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.database.connection import SQL, prove_alive
from notifyq.testing import drain

from ..helpers import verbs
from ..helpers.limits import ONE, Bench, idle
from ..helpers.logs import Logged
from ..helpers.machine import Probe, limit
from ..helpers.running import working
from ..helpers.waiting import eventually, heartbeats


async def test_paused_and_resumed(dsn: str, db: Any, probe: Probe) -> None:
    """A task of the paused queue doesn't start. Tasks of others do, and a running one goes on. When the queue is
    resumed, its task starts at once, without a poll."""
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn, queues=["mail", "default"]):
        running = await app.enqueue(bench.Job(key="a", seconds=0.3), queue="mail")
        await bench.begun.reach(1)
        assert await db.fetchval("SELECT notifyq.pause('mail')")
        assert not await db.fetchval("SELECT notifyq.pause('mail')")
        await anyio.sleep(limit(0.25))  # the workers hear of it
        waits = await app.enqueue(bench.Job(key="a"), queue="mail")
        other = await app.enqueue(bench.Job(key="a"))
        assert await bench.ended.reach(2) in ([running.id, other.id], [other.id, running.id])
        with probe.within(0.25):
            assert await db.fetchval("SELECT notifyq.resume('mail')")
            await bench.ended.reach(3)
        assert bench.ended.items[2] == waits.id


@pytest.mark.usefixtures("quick_heart")
async def test_paused_with_all_its_queues(dsn: str, db: Any) -> None:
    """Two workers still hear the bell: one has the turn and one hasn't."""
    bench = Bench()
    await db.execute("SELECT notifyq.pause('default')")
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        await app.enqueue_many([bench.Job(key="a") for _ in range(5)])
        await heartbeats(db)
        assert not bench.begun.items
        await db.execute("SELECT notifyq.resume('default')")
        await bench.ended.reach(5)


async def test_paused_under_a_backlog(dsn: str, db: Any, probe: Probe) -> None:
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn, concurrency=5), working(app, dsn, concurrency=5):
        await app.enqueue_many([bench.Job(key="a", seconds=0.01) for _ in range(5000)])
        await bench.ended.reach(100)
        await db.execute("SELECT notifyq.pause('default')")
        paused = time.monotonic()
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"), 0)
        last = max(at for _, at in bench.begun.items) - paused
        print(f"the last one started {last * 1000:.0f} ms after")
        assert last < 0.6 + probe.late(paused)
        assert await db.fetchval("SELECT count(*) FROM notifyq.task") > 1000


async def test_limited_and_limited_otherwise(dsn: str, db: Any) -> None:
    """Over two workers. Running tasks that had started before count. A higher limit, a lower one and none are in force
    at once."""
    bench = Bench()
    running = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        before = await app.enqueue(bench.Job(key="a", seconds=60))
        await bench.begun.reach(1)
        await db.execute("SELECT notifyq.limit_queue('default', 3)")
        await app.enqueue_many([bench.Job(key="a", seconds=60) for _ in range(10)])
        await bench.begun.reach(3)
        queued = "SELECT count(*) FROM notifyq.all_tasks WHERE waits_for = 'queue'"
        await eventually(lambda: db.fetchval(queued), 8)
        await db.execute("SELECT notifyq.limit_queue('default', 5)")
        await bench.begun.reach(5)
        await db.execute("SELECT notifyq.limit_queue('default', 4)")
        await db.execute("SELECT notifyq.cancel($1)", before.id)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.slot_released"), 0)
        assert await db.fetchval(running) == 4
        await db.execute("SELECT notifyq.limit_queue('default')")
        await bench.begun.reach(11)
        assert await db.fetchval(running) == 10
        await db.execute("SELECT notifyq.cancel(id) FROM notifyq.all_tasks WHERE state = 'running'")
        await idle(db)
    assert len(bench.begun.items) == 11


async def test_a_queue_with_a_rate(dsn: str, db: Any, probe: Probe) -> None:
    bench = Bench()
    await db.execute("SELECT notifyq.limit_queue('default', rate => 4, seconds => 0.3)")
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        began = time.monotonic()
        await app.enqueue_many([bench.Job(key="a") for _ in range(14)])
        await bench.ended.reach(14)
        took = time.monotonic() - began
        await idle(db)
    assert 0.9 < took < 1.4 + probe.lost(began)
    assert not await db.fetchval("SELECT n FROM notifyq.rate_log WHERE n > 4")


async def test_draining_leaves_a_paused_queue_alone(dsn: str, db: Any) -> None:
    """It leaves parked tasks alone too: neither can run."""
    bench = Bench()
    await db.execute("SELECT notifyq.pause('mail')")
    worker = await verbs.register(db)
    assert await prove_alive(db, worker)  # or else a drain waits for its rescue
    await verbs.insert(db, type="Job", queue="default", payload='{"key": "a"}', **ONE)
    [held] = await verbs.claim(db, worker)
    await db.execute("SELECT notifyq.admit($1, ARRAY[$2::bigint], ARRAY[$3::smallint])", worker, held.id, held.attempt)
    async with bench.app.connect(dsn) as app:
        await app.enqueue(bench.Job(key="a"), queue="mail")
        await app.enqueue(bench.Job(key="a"), limit_key="a", limit=1)
        free = await app.enqueue(bench.Job(key="a"))
        assert (await drain(app, timeout=limit())).done == 1
        assert bench.ended.items == [free.id]
        await app.run_worker(["mail", "default"], dsn=dsn, drain=True)
    assert bench.ended.items == [free.id]
    waits = await db.fetch("SELECT state, waits_for FROM notifyq.all_tasks WHERE state <> 'done' ORDER BY id")
    assert [tuple(row) for row in waits] == [("running", None), ("ready", None), ("scheduled", "limit")]
    stats = json.loads(await db.fetchval(SQL["read_stats"]))
    assert stats["oldest_ready_seconds"] is None
    assert not stats["unserved"]


async def test_a_worker_that_is_silent_serves_no_queue(db: Any) -> None:
    """Of two workers of a queue one hasn't been seen for longer than its lease."""
    await verbs.register(db)
    gone = await verbs.register(db)
    await db.execute("UPDATE notifyq.worker SET seen_at = seen_at - 2 * lease WHERE id = $1", gone)
    assert await db.fetchval("SELECT workers FROM notifyq.all_queues WHERE name = 'default'") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'q', 0", "violates check constraint"),
        ("'q', rate => 5", "rate and seconds go together"),
        ("'q', rate => 5, seconds => 'NaN'", "violates check constraint"),
    ],
)
async def test_limits_that_are_none(db: Any, arguments: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        await db.execute(f"SELECT notifyq.limit_queue({arguments})")


async def test_a_worker_says_which_queues_of_its_tasks_it_leaves(dsn: str, logged: Logged) -> None:
    class Mail(notifyq.Task):
        queue = "mailq"

    app = notifyq.App()

    @app.handler
    async def mail(task: Mail) -> None: ...

    async with working(app, dsn, queues=["mailq"]):
        pass
    assert logged("this worker doesn't serve") == []
    async with working(app, dsn):
        pass
    assert [fields["queues"] for fields in logged("this worker doesn't serve")] == [["mailq"]]
