"""Does a queue slow down while somebody holds a snapshot (a backup, a report), so that no dead row can go?

One session holds a REPEATABLE READ snapshot from before the first task until after the last; the same without it, in
turns. Two ways: continuous, where a process of its own enqueues and keeps some thousands ready while one worker works
them off; and backlog, where all are enqueued first. Throughput by tenths of the tasks in the order of their outcomes,
by the database's clock.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

from notifyq import store
from notifyq.codec import encode_payload

from .common import TASK, Bench, Line, Plot, Result, median, worker_process

TASKS, READY, BATCH, ROUNDS = 300_000, 5_000, 1_000, 1
LIMIT_SECONDS = 120.0  # for one run

ENQUEUE = "INSERT INTO notifyq.task (type, payload) SELECT 'Mail', $2 FROM generate_series(1, $1)"


async def run(bench: Bench) -> Result:
    tasks = bench.work(TASKS)
    conn = await store.connect(bench.dsn)
    await conn.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple")
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for _ in range(ROUNDS):
        for way in ("continuous", "backlog"):
            for held in (True, False):
                runs.setdefault((way, held), []).append(await one(conn, bench.dsn, way, held, tasks))
    await conn.close()
    lines, plots = list[Line](), list[Plot]()
    for way in ("continuous", "backlog"):
        series: dict[str, list[tuple[float, float]]] = {}
        for held in (True, False):
            name = "snapshot held" if held else "no snapshot"
            what = f"{way}, {name}"
            rates = [median(tenth) for tenth in zip(*(run["tenths"] for run in runs[way, held]), strict=True)]
            series[name] = [(n * tasks / 10, rate) for n, rate in enumerate(rates, 1)]
            ratio = median(run["tenths"][-1] / run["tenths"][0] for run in runs[way, held])
            lines.append(
                Line(f"{what}: last tenth", rates[-1], "/s", "first tenth", ratio, least=0.9 if held else None)
            )
            for key, unit in (("dead", "rows"), ("table_mb", "MB"), ("index_mb", "MB")):
                lines.append(Line(f"{what}: {key}", median(run[key] for run in runs[way, held]), unit))
        title = f"{tasks:,} tasks, {'enqueued and worked off' if way == 'continuous' else 'enqueued, then worked off'}"
        plots.append(Plot(f"bloat-{way}", title, "tasks", "tasks/s", series))
    data = {f"{way}, {'held' if held else 'free'}": found for (way, held), found in runs.items()}
    return Result(lines, data, plots)


async def one(conn: store.Connection, dsn: str, way: str, held: bool, tasks: int) -> dict[str, Any]:
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished RESTART IDENTITY")
    holder = await store.connect(dsn)
    if held:
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.fetchval("SELECT count(*) FROM notifyq.task")
    if way == "backlog":
        await conn.execute(ENQUEUE, tasks, encode_payload(TASK))
    with worker_process(dsn), enqueuing(dsn, tasks) if way == "continuous" else nullcontext():
        limit = time.monotonic() + LIMIT_SECONDS
        while await conn.fetchval("SELECT count(*) FROM notifyq.finished") < tasks:
            await asyncio.sleep(0.5)
            if time.monotonic() > limit:
                raise SystemExit(f"bloat: {way} is not at its end after {LIMIT_SECONDS:.0f} s")
    dead, table, index = await conn.fetchrow(
        """SELECT (pgstattuple('notifyq.task')).dead_tuple_count, pg_table_size('notifyq.task') / 1048576.0::float8,
                  pg_indexes_size('notifyq.task') / 1048576.0::float8"""
    ) or (0, 0, 0)
    await holder.execute("ROLLBACK")
    await holder.close()
    ends = await conn.fetch(
        """SELECT extract(epoch FROM max(processed_at) - (SELECT min(processing_at) FROM notifyq.finished))::float8
           FROM (SELECT processed_at, ntile(10) OVER (ORDER BY processed_at, id) AS tenth FROM notifyq.finished) AS f
           GROUP BY tenth ORDER BY tenth"""
    )
    at = [0.0, *(row[0] for row in ends)]
    return {
        "tenths": [tasks / 10 / (end - begin) for begin, end in pairwise(at)],
        "dead": dead,
        "table_mb": table,
        "index_mb": index,
    }


@contextmanager
def enqueuing(dsn: str, tasks: int) -> Generator[None]:
    process = subprocess.Popen([sys.executable, "-m", __name__, dsn, str(tasks)])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def enqueue(dsn: str, tasks: int) -> None:
    """The enqueuing process. What is ready is told by ids: of the last one inserted, and the last one finished."""
    conn = await store.connect(dsn)
    done = 0
    while done < tasks:
        if done - await conn.fetchval("SELECT coalesce(max(id), 0) FROM notifyq.finished") < READY:
            await conn.execute(ENQUEUE, BATCH, encode_payload(TASK))
            done += BATCH
        else:
            await asyncio.sleep(0.005)
    await conn.close()


if __name__ == "__main__":
    asyncio.run(enqueue(sys.argv[1], int(sys.argv[2])))
