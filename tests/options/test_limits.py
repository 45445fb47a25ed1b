"""Limits: how many tasks of a key run at once and start in a time, over all workers."""

from __future__ import annotations

import time
from typing import Any

import pytest

import notifyq
from notifyq.options import parse_rate

from ..helpers.limits import STARTS, Bench, begun, closest, idle
from ..helpers.machine import Probe
from ..helpers.running import working
from ..helpers.waiting import eventually


async def test_at_most_so_many_of_a_key(dsn: str, db: Any) -> None:
    """Over two workers as many run as the limit allows, and no more. Other tasks pass, and each key counts by
    itself."""
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        for key, limit in (("a", 1), ("b", 3)):
            tasks = [bench.Job(key=key, seconds=0.02) for _ in range(12)]
            await app.enqueue_many(tasks, limit_key=key, limit=limit)
        await app.enqueue_many([bench.Job(key="free", seconds=0.02) for _ in range(12)])
        await bench.ended.reach(36)
        await idle(db)
    assert (bench.most["a"], bench.most["b"]) == (1, 3)
    assert bench.most["free"] > 3


async def test_a_released_slot_is_taken_at_once(dsn: str, db: Any, probe: Probe) -> None:
    """A notification tells of it, not a poll: 20 tasks without duration run one at a time, in a small part of a
    second."""
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        began = time.monotonic()
        await app.enqueue_many([bench.Job(key="a") for _ in range(20)], limit_key="a", limit=1)
        await bench.ended.reach(20)
        took = time.monotonic() - began
    print(f"{took / 20 * 1000:.1f} ms a task")
    assert took < 3 + probe.lost(began)


@pytest.mark.usefixtures("quick_heart")
async def test_what_fails_and_what_is_cancelled_leaves_its_slot(dsn: str, db: Any) -> None:
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn):
        first = await app.enqueue(bench.Job(key="a", seconds=60), limit_key="a", limit=1)
        await bench.begun.reach(1)
        await app.enqueue_many([bench.Job(key="a", fails=2) for _ in range(3)], limit_key="a", limit=1)
        parked = "SELECT count(*) FROM notifyq.all_tasks WHERE waits_for = 'limit'"
        await eventually(lambda: db.fetchval(parked), 3)
        assert await db.fetchval("SELECT notifyq.cancel($1)", first.id)
        await bench.ended.reach(3)
        await idle(db)
    assert len(bench.begun.items) == 1 + 9


async def test_a_rate(dsn: str, db: Any, probe: Probe) -> None:
    """5 in half a second: in no half second do more start, by the database's clock, and none waits longer than it
    must."""
    bench = Bench()
    await db.execute(STARTS)
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        began = time.monotonic()
        tasks = [bench.Job(key="a") for _ in range(18)]
        await db.execute(
            """INSERT INTO notifyq.task (type, payload, options)
               SELECT 'Job', '{"key": "a"}', '{"limit_key": "a", "limit_rate": 5, "limit_seconds": 0.5}'
               FROM generate_series(1, $1::integer)""",
            len(tasks),
        )
        await bench.ended.reach(18)
        took = time.monotonic() - began
        await idle(db)
    assert took < 3 * 0.5 + 0.4 + probe.lost(began)
    starts = await begun(db, "limit:a")
    assert len(starts) == 18
    assert closest(starts, 5) > 0.5 - 0.000_001


async def test_one_key_with_many_tasks_costs_each_a_few_writes(dsn: str, db: Any) -> None:
    """Each task is parked once and granted once. It isn't written again while it waits, and it holds up no other."""
    bench = Bench()
    many = 1000
    async with bench.app.connect(dsn) as app:
        await app.enqueue_many([bench.Job(key="a") for _ in range(many)], limit_key="a", limit=3)
        plain = await app.enqueue(bench.Job(key="free"))
        before = await updates(db)
        began = time.monotonic()
        async with working(app, dsn), working(app, dsn):
            while plain.id not in bench.ended.items:
                await bench.ended.reach(len(bench.ended.items) + 1)
            behind = time.monotonic() - began
            await bench.ended.reach(many + 1)
            await idle(db)
            took = time.monotonic() - began
    each = (await updates(db) - before) / many
    print(f"{each:.2f} updates a task, {took / many * 1e6:.0f} µs each; the plain one behind them after {behind:.2f} s")
    assert bench.most["a"] <= 3
    assert each < 6.5  # claimed, parked; granted, claimed, admitted


@pytest.mark.parametrize(
    ("rate", "parsed"),
    [("100/minute", (100, 60.0)), ("5/s", (5, 1.0)), ("20/10s", (20, 10.0)), ("1 / 2 day", (1, 172_800.0))],
)
def test_a_rate_in_words(rate: str, parsed: tuple[int, float]) -> None:
    assert parse_rate(rate) == parsed


@pytest.mark.parametrize("rate", ["100", "0/s", "5/0s", "5/week", "-5/s", "1.5/s", "", 5, "5/99999d"])
def test_a_rate_that_is_none(rate: Any) -> None:
    with pytest.raises(notifyq.ConfigError, match="rate is"):
        parse_rate(rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_key": "a"}, "limit_key is 'a', and no limit; add limit=3"),
        ({"limit": 3}, "limit= and rate= are of tasks with the same limit_key; add limit_key="),
        ({"limit_key": "a", "limit": 0}, "limit is 0; expected how many may run at once"),
        ({"limit_key": "a", "limit": True}, "limit is True; expected how many may run at once"),
        ({"limit_key": "a", "rate": "often"}, "rate is 'often'; expected how many in what time"),
        ({"order_key": ""}, "order_key ''"),
        ({"order_key": "a" * 201}, "expected 1 to 200 characters"),
    ],
)
async def test_options_that_cannot_be(dsn: str, options: Any, message: str) -> None:
    bench = Bench()
    async with bench.app.connect(dsn) as app:
        with pytest.raises(notifyq.ConfigError, match=message):
            await app.enqueue(bench.Job(key="a"), **options)


async def updates(db: Any) -> int:
    await db.execute("SELECT pg_stat_clear_snapshot()")
    return int(await db.fetchval("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relid = 'notifyq.task'::regclass"))
