"""One task, many idle workers: what it costs with 1, 8 and 32 worker processes.

Each size has 200 tasks, one every 20 to 50 ms. What the same workers do and use without tasks is measured just before,
over as long a time, and subtracted: that is the price of having them, see `idle`. One worker comes first and last.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from typing import NamedTuple

from notifyq.codec import encode_payload
from notifyq.database import connection
from notifyq.database.connection import SQL, Connection
from notifyq.worker.doorbell import CHANNEL

from .common import TASK, Bench, Line, Plot, Result, median, worker_process
from .counting import backends_cpu, calls, counting, cpu

SIZES, TASKS = (1, 32, 8, 1), 200
WARM_SECONDS = 10.0  # a new worker's first polls and plans are not what it costs later
GAP_SECONDS = (0.020, 0.050)


class Used(NamedTuple):
    """So far, or a task."""

    claims: float
    rings: float  # that a listener heard
    server: float  # CPU ms of all backends, the enqueuer's included
    workers: float  # CPU ms of the worker processes


async def run(bench: Bench) -> Result:
    found: dict[int, list[Used]] = {size: [] for size in sorted(SIZES)}
    idle: dict[int, list[Used]] = {size: [] for size in sorted(SIZES)}
    tasks = bench.work(TASKS)
    async with counting(bench) as (dsn, conn):
        enqueuer, rings = await connection.connect(dsn), list[object]()
        await conn.add_listener(CHANNEL, lambda *said: rings.append(said) if said[-1] == "" else None)
        with ExitStack() as stack:
            workers: list[tuple[ExitStack, int]] = []
            for size in SIZES:
                more = size > len(workers)
                while len(workers) < size:  # one after the other
                    own = stack.enter_context(ExitStack())
                    workers.append((own, own.enter_context(worker_process(dsn))))
                while len(workers) > size:
                    workers.pop()[0].close()
                await asyncio.sleep(WARM_SECONDS if more else 1.0)
                marks = [await _used(conn, rings, workers)]
                for busy in (False, True):
                    for _ in range(tasks):
                        await asyncio.sleep(random.uniform(*GAP_SECONDS))
                        if busy:
                            await enqueuer.execute(
                                "INSERT INTO notifyq.task (type, payload) VALUES ('Mail', $1)", encode_payload(TASK)
                            )
                    marks.append(await _used(conn, rings, workers))
                before, middle, after = marks
                quiet = [b - a for a, b in zip(before, middle, strict=True)]
                idle[size].append(Used(*quiet))
                each = [(b - a - c) / tasks for a, b, c in zip(middle, after, quiet, strict=True)]
                found[size].append(Used(*each))
        done = await conn.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'")
        assert done == len(SIZES) * tasks
        assert await calls(conn, SQL["claim"]) >= done, "its statements are counted by another text"
        await enqueuer.close()

    def values(size: int, field: str) -> list[float]:
        return [getattr(used, field) for used in found[size]]

    lines, one = list[Line](), median(values(1, "server"))
    for size in found:
        who, largest = f"{size} idle worker{'s' if size > 1 else ''}", size == max(SIZES)
        lines += [
            Line(f"{who}: claim statements", median(values(size, "claims")), "/task", most=2 if largest else None),
            Line(f"{who}: NOTIFYs", median(values(size, "rings")), "/task"),
            Line(
                f"{who}: server CPU", median(values(size, "server")), "ms/task", "1 worker",
                median(values(size, "server")) / one, most=1.3 if largest else None,
            ),
            Line(f"{who}: workers' CPU", median(values(size, "workers")), "ms/task"),
        ]  # fmt: skip
    series = {
        name: [(size, median(values(size, field))) for size in found]
        for name, field in (("claim statements", "claims"), ("NOTIFYs", "rings"), ("server CPU, ms", "server"))
    }
    plot = Plot("herd", "What one task costs", "idle workers", "a task", series, log_x=True)
    return Result(lines, {"a task": _told(found), "idle, in all": _told(idle)}, [plot])


async def _used(conn: Connection, rings: list[object], workers: list[tuple[ExitStack, int]]) -> Used:
    await asyncio.sleep(0.2)  # what was begun is settled
    used = sum(cpu(pid) for _, pid in workers)
    return Used(await calls(conn, SQL["claim"]), len(rings), 1000 * await backends_cpu(conn), 1000 * used)


def _told(found: dict[int, list[Used]]) -> dict[str, list[dict[str, float]]]:
    return {str(size): [used._asdict() for used in uses] for size, uses in found.items()}
