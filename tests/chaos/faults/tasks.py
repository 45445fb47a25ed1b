"""Faults of handlers and rows: tasks that block, kill, leak, swallow, and those that can't be decoded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import Hit, fault

if TYPE_CHECKING:
    from ..stage import Stage


@fault("handler blocks the loop")
async def block(stage: Stage, hit: Hit) -> None:
    """The loop is blocked for 2 s. The checker itself adds the worker to those that were touched."""
    await stage.insert("Block", 1, seconds=2.0)
    await asyncio.sleep(2.2)


@fault("handler kills its worker")
async def kamikaze(stage: Stage, hit: Hit) -> None:
    """It comes among the producers' tasks, and others that are long and have two attempts. Each time it crashes those
    beside it with it. When it has run alone twice, it is dead, and no other is."""
    await stage.insert("Bystander", 20, seconds=3.0)
    await stage.until("SELECT count(*) = 0 FROM notifyq.task WHERE type = 'Bystander' AND worker IS NULL", 3)
    await stage.insert("Kamikaze", 1)
    await stage.until("SELECT count(*) = 0 FROM notifyq.task WHERE type = 'Kamikaze' OR parked = 'crashed'", 90)


@fault("handler swallows cancellation")
async def stubborn(stage: Stage, hit: Hit) -> None:
    await stage.insert("Stubborn", 3, seconds=2.0)
    await asyncio.sleep(0.5)
    await stage.sql("SELECT notifyq.cancel(id) FROM notifyq.task WHERE type = 'Stubborn' LIMIT 1")
    await asyncio.sleep(1.5)


@fault("handlers leak", heal=0.5)
async def leak(stage: Stage, hit: Hit) -> None:
    await stage.insert("Leak", 200)


@fault("handlers raise SystemExit and worse", heal=0.5)
async def rude(stage: Stage, hit: Hit) -> None:
    for what in range(5):
        await stage.insert("Rude", 2, what=what)


@fault("poison rows")
async def poison(stage: Stage, hit: Hit) -> None:
    """2,000 tasks that can't be decoded, and 200 of a type that no worker knows, before all others."""
    await stage.sql(
        """INSERT INTO notifyq.task (type, payload, priority)
           SELECT 'Quick', CASE g % 4 WHEN 0 THEN '[]' WHEN 1 THEN '{"n": "x"}' WHEN 2 THEN 'null'
                                      ELSE '{"n": {"n": 1e400}}' END::jsonb, 9
           FROM generate_series(1, 2000) AS g"""
    )
    await stage.sql(
        """INSERT INTO notifyq.task (type, priority, run_at)
           SELECT 'Unknown', 9, '-infinity' FROM generate_series(1, 200)"""
    )


@fault("a burst")
async def burst(stage: Stage, hit: Hit) -> None:
    """Tasks in all queues that are all settled at once."""
    for queue in ("default", "mail", "narrow"):
        await stage.insert("Quick", 1000, queue=queue)


BIG = """
WITH noise AS MATERIALIZED (SELECT string_agg(md5(random()::text), '') AS blob FROM generate_series(1, 32768))
INSERT INTO notifyq.task (type, priority, queue, payload)
SELECT CASE WHEN size > 16 THEN 'Huge' ELSE 'Big' END, n % 3, CASE n % 2 WHEN 0 THEN 'default' ELSE 'mail' END,
       jsonb_build_object('n', n, 'result', (n % 2) * size << 20,
                          'blob', CASE size WHEN 1 THEN noise.blob ELSE repeat('x', size << 20) END || ' ' || n)
FROM unnest($1::bigint[], $2::integer[]) AS o (n, size), noise
"""


@fault("large payloads and results")
async def large(stage: Stage, hit: Hit) -> None:
    """Tasks of 1 MB, and of 15 MB that compress; a few are above the limit. Half of them return as much."""
    sizes = [1] * 30 + [15] * 8 + [17] * 2
    stage.random.shuffle(sizes)
    batch = stage.batch("fault", len(sizes))
    await stage.sql(BIG, batch.numbers, sizes)
    batch.outcome = "committed"
    await stage.until("SELECT count(*) = 0 FROM notifyq.task WHERE type IN ('Big', 'Huge')", 30)


@fault("more plain handlers than threads", heal=0.5)
async def threads(stage: Stage, hit: Hit) -> None:
    """A worker claims none beyond its threads, so it hands none back."""
    await stage.insert("Thread", 100, seconds=0.3)
    await stage.until("SELECT count(*) = 0 FROM notifyq.task WHERE type = 'Thread'", 15)


@fault("handlers fork, and signal their children")
async def fork(stage: Stage, hit: Hit) -> None:
    """No worker is touched by it."""
    await stage.insert("Forks", 6, seconds=0.3)
    await stage.until("SELECT count(*) = 0 FROM notifyq.task WHERE type = 'Forks'", 15)
