"""What an idle worker costs with 1 and with 50 queues, and how much memory one keeps after a million tasks.

For 30 s of idling each: statements (pg_stat_statements), and CPU of the process and of its backends. Then a new worker
works off 100,000 no-op tasks, and 900,000 more. Its memory is read when it has been idle again for a second.
"""

from __future__ import annotations

import asyncio

from notifyq.codec import encode_payload
from notifyq.database.connection import Connection

from .common import TASK, Bench, Line, Result, worker_process
from .counting import backends_cpu, calls, counting, cpu, resident

SECONDS, QUEUES = 30, (1, 50)
TASKS = (100_000, 1_000_000)


async def run(bench: Bench) -> Result:
    lines = list[Line]()
    async with counting(bench) as (dsn, conn):
        for queues in QUEUES:
            lines += await _idle(conn, dsn, queues, bench.work(SECONDS))
        with worker_process(dsn) as pid:
            found = [await _memory(conn, pid, tasks) for tasks in map(bench.work, TASKS)]
    for tasks, memory in zip(map(bench.work, TASKS), found, strict=True):
        lines.append(Line(f"memory of a worker after {tasks:,} tasks", memory, "MB", most=80))
    lines.append(Line("what it grew by from the one to the other", found[1] - found[0], "MB", most=5))
    return Result(lines)


async def _idle(conn: Connection, dsn: str, queues: int, seconds: int) -> list[Line]:
    names = [word for n in range(queues) for word in ("-q", f"queue{n}")]
    with worker_process(dsn, *names) as pid:
        await asyncio.sleep(3)  # until it sleeps
        before = await calls(conn), cpu(pid), await backends_cpu(conn)
        await asyncio.sleep(seconds)
        after = await calls(conn), cpu(pid), await backends_cpu(conn)
        memory = resident(pid)
    statements, process, backends = ((b - a) / seconds for a, b in zip(before, after, strict=True))
    who = f"idle worker, {queues} queue{'s' if queues > 1 else ''}"
    return [
        Line(f"{who}: statements", statements, "/s", most=1),
        Line(f"{who}: CPU of its process", process * 100, "%"),
        Line(f"{who}: CPU of its backends", backends * 100, "%"),
        Line(f"{who}: memory of its process", memory, "MB"),
    ]


async def _memory(conn: Connection, pid: int, tasks: int) -> float:
    """MB after so many tasks, those it has worked off before included."""
    finished = "SELECT count(*) FROM notifyq.finished"
    more = tasks - await conn.fetchval(finished)
    enqueue = "INSERT INTO notifyq.task (type, payload) SELECT 'Mail', $2 FROM generate_series(1, $1)"
    await conn.execute(enqueue, more, encode_payload(TASK))
    while await conn.fetchval(finished) < tasks:
        await conn.execute("SELECT pg_sleep(0.5)")
    await asyncio.sleep(1)
    return resident(pid)
