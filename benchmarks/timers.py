"""Lateness of 300 tasks due at random moments of 6 seconds: processing_at - run_at, both by the database's clock."""

from __future__ import annotations

from notifyq import store

from .common import Bench, Line, Result, percentile, worker_process


async def run(bench: Bench) -> Result:
    dsn = bench.dsn
    conn = await store.connect(dsn)
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    with worker_process(dsn):
        await conn.execute(
            """INSERT INTO notifyq.task (type, payload, run_at)
               SELECT 'Mail', '{"user": {"id": "1", "email": "a@b.c"}, "key": "k"}',
                      clock_timestamp() + (1 + random() * 6) * interval '1 s'
               FROM generate_series(1, 300)"""
        )
        while await conn.fetchval("SELECT count(*) FROM notifyq.task"):
            await conn.execute("SELECT pg_sleep(0.2)")
    rows = await conn.fetch("SELECT extract(epoch FROM processing_at - run_at)::float8 * 1000 FROM notifyq.finished")
    await conn.close()
    late = [row[0] for row in rows]
    return Result(
        [
            Line("scheduled lateness, p50", percentile(late, 0.5), "ms", most=2),
            Line("scheduled lateness, max of 300", max(late), "ms", most=25),
        ]
    )
