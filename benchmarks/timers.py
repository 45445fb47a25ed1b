"""Lateness of 1,000 tasks due at random moments of ten seconds, with a million more in the table that are due some day.

processing_at - run_at, both by the database's clock.
"""

from __future__ import annotations

from datetime import timedelta

from notifyq.codec import encode_payload
from notifyq.database import connection

from .common import TASK, Bench, Line, Plot, Result, percentile, worker_process

FUTURE, TASKS, SECONDS = 1_000_000, 1_000, 10.0
ENQUEUE = """INSERT INTO notifyq.task (type, payload, run_at)
SELECT 'Mail', $4, clock_timestamp() + $2 + random() * $3 * interval '1 second'
FROM generate_series(1, $1)"""


async def run(bench: Bench) -> Result:
    future, tasks, payload = bench.work(FUTURE), bench.work(TASKS), encode_payload(TASK)
    conn = await connection.connect(bench.dsn)
    await conn.execute(ENQUEUE, future, timedelta(days=1), 30 * 86400.0, payload)
    await conn.execute("VACUUM ANALYZE notifyq.task")
    with worker_process(bench.dsn):
        await conn.execute(ENQUEUE, tasks, timedelta(seconds=1), SECONDS * tasks / TASKS, payload)
        while await conn.fetchval("SELECT count(*) FROM notifyq.finished") < tasks:
            await conn.execute("SELECT pg_sleep(0.2)")
    rows = await conn.fetch(
        "SELECT extract(epoch FROM processing_at - run_at)::float8 * 1000 FROM notifyq.finished ORDER BY 1"
    )
    await conn.close()
    late = [row[0] for row in rows]
    assert len(late) == tasks
    assert late[0] >= 0, "one started before it was due"
    return Result(
        [
            Line("scheduled tasks, lateness p50", percentile(late, 0.5), "ms", most=2.0),
            Line("scheduled tasks, lateness p99", percentile(late, 0.99), "ms"),
            Line(f"scheduled tasks, lateness max of {tasks:,}", late[-1], "ms", most=25.0),
        ],
        {"tasks": tasks, "future": future, "late_ms": late},
        [
            Plot(
                "timers",
                f"Lateness of scheduled tasks, {future:,} others waiting",
                "share of tasks",
                "ms",
                {"notifyq": [(n / tasks, value) for n, value in enumerate(late, 1)]},
                log_y=True,
            )
        ],
    )
