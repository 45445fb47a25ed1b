"""What an idle worker with 20 queues costs: its statements a second, and the CPU of its process and backends.

On a server of its own, which counts statements (pg_stat_statements); with --dsn that extension must be there.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from notifyq import schema, store
from notifyq.embedded import Server

from .common import Bench, Line, Result, worker_process

SECONDS = 30.0
BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name ~ '^notifyq (door|claims|settle|keeper)'"


async def run(bench: Bench) -> Result:
    with ExitStack() as stack:
        preload = {"shared_preload_libraries": "pg_stat_statements"}
        dsn = bench.dsn if bench.server is None else stack.enter_context(Server(durable=True, settings=preload)).dsn()
        return await measure(dsn)


async def measure(dsn: str) -> Result:
    conn = await store.connect(dsn)
    await schema.migrate(conn)
    await conn.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    queues = [argument for n in range(20) for argument in ("-q", f"queue{n}")]
    with worker_process(dsn, *queues) as pid:
        await asyncio.sleep(2)
        pids = [row[0] for row in await conn.fetch(BACKENDS)]
        before, backends = cpu(pid), sum(map(cpu, pids))
        await conn.execute("SELECT pg_stat_statements_reset()")
        await asyncio.sleep(SECONDS)
        statements = await conn.fetchval("SELECT sum(calls) - 1 FROM pg_stat_statements")
        process, server = cpu(pid) - before, sum(map(cpu, pids)) - backends
    await conn.close()
    return Result(
        [
            Line("idle worker, 20 queues: statements a second", float(statements) / SECONDS, "/s", most=1),
            Line("idle worker, 20 queues: CPU of its process", process / SECONDS * 100, "%"),
            Line("idle worker, 20 queues: CPU of its backends", server / SECONDS * 100, "%"),
        ]
    )


def cpu(pid: int) -> float:
    """CPU seconds so far (Linux)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
