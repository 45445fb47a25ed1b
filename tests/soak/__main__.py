"""A million tasks through one worker process: nothing it or the database holds grows. `make soak`; minutes.

Of twenty tasks twelve are done, two fail once, two fail twice and are dead, one cancels itself, one runs in a thread,
one is cancelled while it is scheduled, one has a payload that doesn't fit. One in 5,000 never ends, and is cancelled
while it runs. Finished ones aren't kept, and the dead are pruned as they come, so that every size has to stay what it
is after the first tenth.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import asyncpg

import notifyq
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server

BATCH, AHEAD = 1000, 5000  # tasks inserted at once, and waiting at most
POINTS = (0.1, 0.5, 1.0)  # of the tasks: when to measure
MB = 1024 * 1024

# How much more than after the first tenth there may be at the end.
BOUNDS = {
    "memory MB": 12.0,
    "files": 0,
    "threads": 20,  # as many as there are slots
    "asyncio tasks": 0,
    "connections": 0,
    "statements": 6,  # prepared: some kinds of outcomes are rare
    "task MB": 8.0,  # table, indexes and TOAST
    "finished MB": 2.0,
    "worker MB": 0.2,
}


class Quick(notifyq.Task):
    n: int = 0


class InThread(notifyq.Task):
    pass


class Flaky(notifyq.Task):
    backoff = 0.01


class Doomed(notifyq.Task):
    backoff = 0.01
    max_attempts = 2


class Unwanted(notifyq.Task):
    pass


class Endless(notifyq.Task):
    pass


INSERT = """
    INSERT INTO notifyq.task (type, payload, run_at)
    SELECT CASE WHEN n % 5000 = 6 THEN 'Endless' WHEN n % 20 < 2 THEN 'Flaky' WHEN n % 20 < 4 THEN 'Doomed'
                WHEN n % 20 = 4 THEN 'Unwanted' WHEN n % 20 = 5 THEN 'InThread' ELSE 'Quick' END,
           CASE WHEN n % 20 = 6 THEN '{"n": "x"}' ELSE '{}' END::jsonb,
           CASE WHEN n % 20 = 7 THEN now() + interval '1 hour' ELSE now() END
    FROM generate_series($1::integer, $1::integer + $2::integer - 1) n"""
RUNS = {"Quick": 12, "Flaky": 4, "Doomed": 4, "Unwanted": 1, "InThread": 1}  # of twenty tasks


async def work(dsn: str) -> None:
    """The worker process: a line of JSON for each SIGUSR1 and at the end."""
    app, ran = notifyq.App(), Counter[str]()

    @app.handler
    async def quick(task: Quick) -> str:
        ran["Quick"] += 1
        return "a result"

    @app.handler
    def in_thread(task: InThread) -> None:
        ran["InThread"] += 1

    @app.handler
    async def flaky(task: Flaky, ctx: notifyq.Context) -> None:
        ran["Flaky"] += 1
        if ctx.attempt == 1:
            raise OSError("not yet")

    @app.handler
    async def doomed(task: Doomed) -> None:
        ran["Doomed"] += 1
        raise ValueError("never")

    @app.handler
    async def unwanted(task: Unwanted) -> notifyq.Cancel:
        ran["Unwanted"] += 1
        return notifyq.Cancel("not wanted")

    @app.handler
    async def endless(task: Endless) -> None:
        await anyio.sleep_forever()

    def tell() -> None:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        conns: list[Any] = [
            thing for thing in gc.get_objects() if type(thing) is asyncpg.Connection and not thing.is_closed()
        ]
        told: dict[str, Any] = {
            "memory MB": int(status.split("VmRSS:")[1].split()[0]) / 1024,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "asyncio tasks": len(asyncio.all_tasks()),
            "connections": len(conns),
            "statements": sum(len(conn._stmt_cache._entries) for conn in conns),
            "ran": ran,
        }
        os.write(1, json.dumps(told).encode() + b"\n")

    loop, stop = asyncio.get_running_loop(), anyio.Event()
    loop.add_signal_handler(signal.SIGUSR1, tell)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with anyio.create_task_group() as group:

        async def run(*, task_status: Any) -> None:
            await app.run_worker(dsn=dsn, concurrency=20, history=0, stop=stop, task_status=task_status)

        await group.start(run)
        tell()


async def soak(dsn: str, tasks: int, *, vacuum: bool = False) -> tuple[list[dict[str, float]], dict[str, int]]:
    """What there was at each of POINTS, and how often each handler ran. vacuum: autovacuum is too slow for so few."""
    db = await connection.connect(dsn, role="test")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.soak", "--worker", dsn, stdout=asyncio.subprocess.PIPE, env=env
    )
    assert worker.stdout is not None
    try:
        await worker.stdout.readline()  # it works
        samples: list[dict[str, float]] = []
        sent, ran = 0, dict[str, int]()
        for point in POINTS:
            while sent < tasks * point:
                await db.execute(INSERT, sent, BATCH)
                sent += BATCH
                await _tidy(db)
                if vacuum:
                    await db.execute("VACUUM notifyq.task, notifyq.finished")
                while await db.fetchval("SELECT count(*) FROM notifyq.task") > AHEAD:
                    await asyncio.sleep(0.01)
            while await db.fetchval("SELECT count(*) FROM notifyq.task"):
                await asyncio.sleep(0.02)
                await _tidy(db)
            worker.send_signal(signal.SIGUSR1)
            told = json.loads(await worker.stdout.readline())
            ran = told.pop("ran")
            for name in ("task", "finished", "worker"):
                told[f"{name} MB"] = await db.fetchval(f"SELECT pg_total_relation_size('notifyq.{name}')") / MB
            samples.append(told)
        worker.terminate()
        assert await worker.wait() == 0
        return samples, ran
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
        await db.close()


async def _tidy(db: connection.Connection) -> None:
    """Cancel what waits for its hour and what never ends; prune the dead."""
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task WHERE run_at > now() + interval '30 minutes'")
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task WHERE type = 'Endless' AND worker IS NOT NULL")
    await db.fetchval(SQL["prune_finished"], 0.0, 0.0, 5000, None)


def grown(samples: list[dict[str, float]]) -> list[str]:
    """What grew by more than its bound, in words."""
    first, last = samples[0], samples[-1]
    return [
        f"{name} grew from {first[name]:.1f} to {last[name]:.1f}, by more than {bound:g}"
        for name, bound in BOUNDS.items()
        if last[name] > first[name] + bound
    ]


def show(samples: list[dict[str, float]]) -> str:
    lines = [f"{'':14}" + "".join(f"{f'{point:.0%}':>10}" for point in POINTS) + f"{'may grow':>12}"]
    for name, bound in BOUNDS.items():
        lines.append(f"{name:14}" + "".join(f"{sample[name]:10.4g}" for sample in samples) + f"{bound:12g}")
    return "\n".join(lines)


async def main(tasks: int) -> int:
    with Server(settings={"autovacuum_naptime": "1s", "synchronous_commit": "off"}) as server:
        conn = await connection.connect(server.dsn(), role="test")
        await schema.migrate(conn)
        await conn.close()
        began = time.monotonic()
        samples, ran = await soak(server.dsn(), tasks)
    print(f"{tasks:,} tasks in {time.monotonic() - began:.0f} s; runs: {ran}")
    print(show(samples))
    problems = grown(samples) + wrong(tasks, ran)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def wrong(tasks: int, ran: dict[str, int]) -> list[str]:
    """Whose handlers ran more or less often than they should: with no fault, exactly."""
    return [
        f"{type} ran {ran[type]} times, not {n * tasks // 20}"
        for type, n in RUNS.items()
        if ran[type] != n * tasks // 20
    ]


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        asyncio.run(work(sys.argv[2]))
    else:
        sys.exit(asyncio.run(main(int(sys.argv[1]))))
