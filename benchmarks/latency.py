"""From before the enqueue call to the first line of the handler: on idle workers, and under load.

Every worker is a process of its own, and so is the enqueuer. All of them read the system's one monotonic clock.

Idle: one task every 50 ms by `app.enqueue`, with 1 and with 16 idle workers. The floor beside it, in turns: a bare
asyncpg connection enqueues by INSERT and pg_notify in one statement; in a process of its own, another hears it,
claims one row with an UPDATE, and is there.

Load: 25, 50 and 75 % of the drain rate, as measured here a moment before. The enqueuer keeps to a schedule: every 4 ms
a batch by INSERT ... SELECT, which takes it the least CPU. The clock starts when a batch is due, so a delay of the
enqueuer counts too.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import anyio
import asyncpg
import msgspec

import notifyq
from notifyq.database import connection

from .children import Child, child, children, say, told
from .common import FLOOR, Bench, Line, Plot, Result, median, percentile
from .drain import fill

ROUNDS, TASKS, GAP_SECONDS = 4, 50, 0.05
WARM_UP = 10
LOAD_SECONDS, BATCH_SECONDS, CONNECTIONS = 8.0, 0.004, 8
SHARES = (0.25, 0.5, 0.75)
DRAINED = 100_000
ONE, MANY = "idle, 1 worker", "idle, 16 workers"

clock = time.perf_counter  # of the whole system, so it means the same in each process
app = notifyq.App()
taken: list[float] = []  # ms, in a worker


class Against(NamedTuple):
    """What a figure is divided by, and the aim."""

    what: str
    value: float
    most: float | None = None


NOTHING = Against("", 1)


class Ping(notifyq.Task):
    sent: float  # 0: to warm up


@app.handler
async def ping(task: Ping) -> None:
    record(task.sent)


def record(sent: float) -> None:
    if sent:
        taken.append((clock() - sent) * 1000)


async def run(bench: Bench) -> Result:
    conn = await connection.connect(bench.dsn)
    await conn.execute(FLOOR)
    times: dict[str, list[float]] = {}
    for name, count in ((ONE, 1), (MANY, 16)):
        times[name], times[f"floor, {name}"] = await idle(bench, conn, count)
    rate = median([await drain_rate(bench, conn) for _ in range(bench.rounds(3))])
    load = {f"{share:.0%} of the drain rate": share for share in SHARES}
    for name, share in load.items():
        times[name] = await under_load(bench, conn, share * rate)
    await conn.execute("DROP SCHEMA bench CASCADE")
    await conn.close()

    at_rest = percentile(times[ONE], 0.5)
    lines: list[Line] = []
    for name, most50, most99 in ((ONE, 1.2, 2.5), (MANY, None, None)):
        floor = times[f"floor, {name}"]
        lines += described(
            name,
            times[name],
            p50=Against("floor", percentile(floor, 0.5), most50),
            p99=Against("its p50", percentile(times[name], 0.5), most99),
        )
        lines += [line for line in described(f"floor, {name}", floor) if line.what.endswith(("p50", "p99"))]
    lines.append(Line("drain rate, 1 process", rate, "/s"))
    for name, share in load.items():
        lines += described(name, times[name], p99=Against(f"p50 of {ONE}", at_rest, 10 if share == 0.5 else None))
    plot = Plot(
        "latency",
        "Enqueue call to handler start",
        "tasks that took longer (%)",
        "latency (ms)",
        {name: tail(values) for name, values in times.items() if name != f"floor, {MANY}"},
        log_x=True,
        log_y=True,
    )
    return Result(lines, {"drain_rate": rate, "tail": {name: tail(values) for name, values in times.items()}}, [plot])


def described(name: str, times: Sequence[float], *, p50: Against = NOTHING, p99: Against = NOTHING) -> list[Line]:
    half, most = percentile(times, 0.5), percentile(times, 0.99)
    return [
        Line(f"{name}: p50", half, "ms", p50.what, half / p50.value if p50.what else None, most=p50.most),
        Line(f"{name}: p95", percentile(times, 0.95), "ms"),
        Line(f"{name}: p99", most, "ms", p99.what, most / p99.value if p99.what else None, most=p99.most),
        Line(f"{name}: max", max(times), "ms"),
        Line(f"{name}: above 100 ms, of {len(times):,}", sum(t > 100 for t in times), "tasks"),
    ]


def tail(times: Sequence[float]) -> list[tuple[float, float]]:
    """(per cent of the tasks, ms that those took longer than), as far as there are enough of them."""
    shares = [50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1]
    return [(share, percentile(times, 1 - share / 100)) for share in shares if len(times) * share >= 100]


async def idle(bench: Bench, conn: connection.Connection, workers: int) -> tuple[list[float], list[float]]:
    """Ours and the floor's, in turns, one task at a time."""
    with ExitStack() as stack:
        ours = stack.enter_context(children(workers, "latency", bench.dsn, "worker"))
        floor = stack.enter_context(children(1, "latency", bench.dsn, "floor"))
        async with app.connect(bench.dsn):
            for round in range(-1, bench.rounds(ROUNDS)):
                for enqueue in (enqueue_ours, lambda sent: enqueue_floor(conn, sent)):
                    for _ in range(WARM_UP if round < 0 else bench.work(TASKS)):
                        await asyncio.sleep(GAP_SECONDS)
                        await enqueue(clock() if round >= 0 else 0.0)
        await asyncio.sleep(GAP_SECONDS * 4)  # for the last to start
        found, least = collect(ours), collect(floor)
        sent = bench.rounds(ROUNDS) * bench.work(TASKS)
        assert len(found) == len(least) == sent, (len(found), len(least), sent)
        return found, least


async def enqueue_ours(sent: float) -> None:
    await app.enqueue(Ping(sent))


async def enqueue_floor(conn: connection.Connection, sent: float) -> None:
    await conn.execute(
        "WITH i AS (INSERT INTO bench.floor (type, payload) VALUES ($1, $2::jsonb)) SELECT pg_notify('bench', '')",
        "Ping",
        msgspec.json.encode({"sent": sent}),
    )


async def drain_rate(bench: Bench, conn: connection.Connection) -> float:
    tasks = bench.work(DRAINED)
    await fill(bench, conn, "notifyq.task", tasks)
    with children(1, "drain", bench.dsn, "notifyq", "kept") as (one,):
        begin = clock()
        one.tell()
        one.read()
        return tasks / (clock() - begin)


async def under_load(bench: Bench, conn: connection.Connection, rate: float) -> list[float]:
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    size, batches = round(rate * BATCH_SECONDS), int(bench.work(int(LOAD_SECONDS)) / BATCH_SECONDS)
    with children(1, "latency", bench.dsn, "worker") as workers:
        pool: Any
        async with (
            asyncpg.create_pool(bench.dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool,
            anyio.create_task_group() as group,
        ):
            begin = clock()
            for n in range(batches):
                due = begin + n * BATCH_SECONDS
                if (early := due - clock()) > 0:
                    await asyncio.sleep(early)
                group.start_soon(enqueue_batch, pool, due, size)
        while await conn.fetchval("SELECT EXISTS (SELECT FROM notifyq.task)"):
            await asyncio.sleep(0.05)
        found = collect(workers)
    assert len(found) == size * batches, (len(found), size * batches)
    return found


async def enqueue_batch(pool: Any, sent: float, size: int) -> None:
    await pool.execute(
        "INSERT INTO notifyq.task (type, payload) SELECT 'Ping', $1::text::jsonb FROM generate_series(1, $2)",
        msgspec.json.encode({"sent": sent}).decode(),
        size,
    )


def collect(workers: Sequence[Child]) -> list[float]:
    for worker in workers:
        worker.tell()
    return [ms for worker in workers for ms in worker.read()]


# In the children.


async def work() -> list[float]:
    dsn, what = sys.argv[1:]
    if what == "floor":
        await floor(dsn)
    else:
        stop = anyio.Event()
        async with anyio.create_task_group() as group:

            async def worker(*, task_status: Any) -> None:
                await app.run_worker(dsn=dsn, stop=stop, task_status=task_status)

            await group.start(worker)
            say("ready")
            await told()
            stop.set()
    return [round(ms, 3) for ms in taken]


async def floor(dsn: str) -> None:
    """The least that NOTIFY and a claim take with asyncpg."""
    conn = await connection.connect_worker(dsn, "floor", relaxed=True)
    rung = asyncio.Event()
    ring: Callable[..., None] = lambda *_: rung.set()  # noqa: E731
    await conn.add_listener("bench", ring)

    async def serve() -> None:
        while True:
            await rung.wait()
            rung.clear()
            for row in await conn.fetch(
                """UPDATE bench.floor SET processing_at = clock_timestamp() WHERE id = ANY(ARRAY(
                       SELECT id FROM bench.floor WHERE processing_at IS NULL ORDER BY id LIMIT 1
                       FOR UPDATE SKIP LOCKED))
                   RETURNING payload"""
            ):
                record(msgspec.json.decode(row["payload"], type=Ping).sent)

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        say("ready")
        await told()
        group.cancel_scope.cancel()
    await conn.close()


if __name__ == "__main__":
    child(work)
