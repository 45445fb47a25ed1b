"""What an idle worker with 20 queues costs: its statements a second, and the CPU seconds of its process and backends."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from notifyq import store

from .common import Line

SECONDS = 20.0


async def run(dsn: str) -> list[Line]:
    conn = await store.connect(dsn)
    queues = [argument for n in range(20) for argument in ("-q", f"queue{n}")]
    command = [sys.executable, "-m", "notifyq", "worker", "benchmarks.common:app", "--dsn", dsn, *queues]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while (
            await conn.fetchval("SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'")
            == 0
        ):
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        pids = [
            row[0]
            for row in await conn.fetch(
                "SELECT pid FROM pg_stat_activity WHERE application_name ~ '^notifyq (door|claims|settle|keeper)'"
            )
        ]
        before, backends = cpu(process.pid), sum(map(cpu, pids))
        # Each of an idle worker's transactions is one statement, but for the one that sleeps: three in 30 s.
        count = (
            "SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database WHERE datname = current_database()"
        )
        await conn.execute("SELECT pg_stat_clear_snapshot()")
        first = await conn.fetchval(count)
        await asyncio.sleep(SECONDS)
        await asyncio.sleep(1.5)  # the statistics of an idle backend are flushed once a second
        last = await conn.fetchval(count)
        share = (cpu(process.pid) - before) / (SECONDS + 1.5)
        server = (sum(map(cpu, pids)) - backends) / (SECONDS + 1.5)
    finally:
        process.terminate()
        process.wait()
        await conn.close()
    return [
        Line(
            "idle worker, 20 queues: transactions a second",
            float(last - first - 2) / (SECONDS + 1.5),
            "/s",
            aim="about 1",
        ),
        Line("idle worker, 20 queues: CPU of its process", share * 100, "%"),
        Line("idle worker, 20 queues: CPU of its backends", server * 100, "%"),
    ]


def cpu(pid: int) -> float:
    """CPU seconds so far (Linux)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
