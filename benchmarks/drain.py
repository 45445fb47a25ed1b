"""100,000 ready tasks, one worker process, no-op handlers, history kept: from its start until all outcomes are durable.

The floor beside it, in turns: a bare asyncpg loop over one connection and a table without history: claim 500 with an
UPDATE, decode with msgspec, call an empty coroutine, settle with a DELETE.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from notifyq import store

from .common import TASK, Line, Mail, app, median

TASKS, ROUNDS = 100_000, 3


async def run(dsn: str) -> list[Line]:
    ours, floor, bulk = [], [], []
    conn = await store.connect(dsn)
    await conn.execute(
        """CREATE SCHEMA IF NOT EXISTS bench; DROP TABLE IF EXISTS bench.floor;
           CREATE TABLE bench.floor (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, type text, payload jsonb,
                                     processing_at timestamptz);
           CREATE INDEX floor_ready ON bench.floor (id) WHERE processing_at IS NULL"""
    )
    for _ in range(ROUNDS):
        await conn.execute("TRUNCATE notifyq.task, notifyq.finished, bench.floor")
        async with app.connect(dsn):
            begin = time.perf_counter()
            await app.enqueue_many([TASK] * TASKS)
            bulk.append(TASKS / (time.perf_counter() - begin))
        await conn.execute("INSERT INTO bench.floor (type, payload) SELECT type, payload FROM notifyq.task")
        await conn.execute("VACUUM ANALYZE notifyq.task; ".rstrip("; "))
        begin = time.perf_counter()
        await app.run_worker(dsn=dsn, drain=True)
        ours.append(TASKS / (time.perf_counter() - begin))
        assert await conn.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'") == TASKS
        begin = time.perf_counter()
        await bare(dsn)
        floor.append(TASKS / (time.perf_counter() - begin))
    await conn.execute("DROP SCHEMA bench CASCADE; TRUNCATE notifyq.task, notifyq.finished")
    await conn.close()
    ratio = median(a / b for a, b in zip(ours, floor, strict=True))
    return [
        Line("drain 100,000, one process, history kept", median(ours), "/s", "floor", ratio, ">= 40,000/s"),
        Line("floor: a bare asyncpg loop, no history", median(floor), "/s"),
        Line("enqueue_many of 100,000", median(bulk), "/s"),
    ]


async def bare(dsn: str) -> None:
    conn = await store.connect_worker(dsn, "floor")
    decode = msgspec.json.Decoder(Mail).decode

    async def handler(task: Mail) -> None: ...

    while True:
        rows = await conn.fetch(
            """UPDATE bench.floor SET processing_at = clock_timestamp() WHERE id = ANY(ARRAY(
                   SELECT id FROM bench.floor WHERE processing_at IS NULL ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED))
               RETURNING id, payload"""
        )
        if not rows:
            break
        for row in rows:
            await handler(decode(row["payload"]))
        await conn.execute("DELETE FROM bench.floor WHERE id = ANY($1)", [row["id"] for row in rows])
        await asyncio.sleep(0)
    await conn.close()
