"""Does a queue slow down while a session holds a snapshot (a backup, a report), so that no dead row can be removed?

One session holds a REPEATABLE READ snapshot from before the first task until after the last. The same without it is
measured in turns. There are two ways:

    continuous  a process of its own enqueues and keeps some thousands ready, while one worker works them off
    backlog     all are enqueued first

Throughput is by tenths of the tasks in the order of their outcomes, by the database's clock.
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

from notifyq.codec import encode_payload
from notifyq.database import connection

from .common import TASK, Bench, Line, Plot, Result, median, ratio, worker_process

TASKS, READY, BATCH, ROUNDS = 300_000, 5_000, 1_000, 3
# Counting is for the end: it would take a share of the machine that grows with the history.
ALL_DONE = """SELECT CASE WHEN (SELECT max(id) FROM notifyq.finished) >= $1
                          THEN (SELECT count(*) FROM notifyq.finished) = $1 ELSE false END"""
DEAD_EXACT = "SELECT (pgstattuple('notifyq.task')).dead_tuple_count"
DEAD_ABOUT = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = 'notifyq.task'::regclass"
LIMIT_SECONDS = 120.0  # for one run

ENQUEUE = "INSERT INTO notifyq.task (type, payload) SELECT 'Mail', $2 FROM generate_series(1, $1)"


async def run(bench: Bench) -> Result:
    tasks = bench.work(TASKS)
    conn = await connection.connect(bench.dsn)
    exact = bool(await conn.fetchval("SELECT 1 FROM pg_available_extensions WHERE name = 'pgstattuple'"))
    if exact:
        await conn.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple")
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for _ in range(bench.rounds(ROUNDS)):
        for way in ("continuous", "backlog"):
            for held in (True, False):
                runs.setdefault((way, held), []).append(await one(conn, bench.dsn, way, held, tasks, exact))
    await conn.close()
    lines, plots = list[Line](), list[Plot]()
    for way in ("continuous", "backlog"):
        under, free = ([run["tenths"] for run in runs[way, snapshot]] for snapshot in (True, False))
        first, last = [tenths[0] for tenths in under], [tenths[-1] for tenths in under]
        first_free, last_free = [tenths[0] for tenths in free], [tenths[-1] for tenths in free]
        lines += [
            Line(f"{way}, snapshot held: last tenth", median(last), "/s", "first", ratio(last, first), least=0.9),
            Line(f"{way}, snapshot held: last tenth", median(last), "/s", "no snapshot's", ratio(last, last_free)),
            Line(f"{way}, no snapshot: last tenth", median(last_free), "/s", "first", ratio(last_free, first_free)),
        ]
        for name, snapshot in (("snapshot held", True), ("no snapshot", False)):
            for key, unit in (("dead rows", ""), ("table", "MB"), ("indexes", "MB")):
                lines.append(Line(f"{way}, {name}: {key}", median(run[key] for run in runs[way, snapshot]), unit))
        series = {
            name: [(n * tasks / 10, median(rates)) for n, rates in enumerate(zip(*tenths, strict=True), 1)]
            for name, tenths in (("snapshot held", under), ("no snapshot", free))
        }
        title = "enqueued and worked off" if way == "continuous" else "enqueued, then worked off"
        plots.append(Plot("bloat", f"{tasks:,} tasks {title}", "tasks", "tasks/s", series))
    data = {f"{way}, {'held' if held else 'free'}": found for (way, held), found in runs.items()}
    return Result(lines, data, plots)


async def one(conn: connection.Connection, dsn: str, way: str, held: bool, tasks: int, exact: bool) -> dict[str, Any]:
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished RESTART IDENTITY")
    holder = await connection.connect(dsn)
    if held:
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.fetchval("SELECT count(*) FROM notifyq.task")
    if way == "backlog":
        await conn.execute(ENQUEUE, tasks, encode_payload(TASK))
    with worker_process(dsn), enqueuing(dsn, tasks) if way == "continuous" else nullcontext():
        limit = time.monotonic() + LIMIT_SECONDS
        while not await conn.fetchval(ALL_DONE, tasks):
            await asyncio.sleep(0.2)
            if time.monotonic() > limit:
                raise SystemExit(f"bloat: {way} is not at its end after {LIMIT_SECONDS:.0f} s")
    dead = await conn.fetchval(DEAD_EXACT if exact else DEAD_ABOUT)
    sizes = await conn.fetchrow("SELECT pg_table_size('notifyq.task'), pg_indexes_size('notifyq.task')")
    assert sizes is not None
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
        "dead rows": dead,
        "table": sizes[0] / 2**20,
        "indexes": sizes[1] / 2**20,
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
    conn = await connection.connect(dsn)
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
