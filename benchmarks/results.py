"""From before the enqueue call until the caller has the result: one at a time, and thousands side by side.

The worker is a process of its own. One at a time, three ways are measured in turns:

    result  `await ref.result()`
    poll    a look at the row every 0.2 s, which is what people do without it
    floor   bare asyncpg on both sides: INSERT and pg_notify in one statement, a claim by UPDATE, and a DELETE that
            notifies the caller that waits. As with ours, its DELETE waits for the disk, and its claim doesn't

Side by side: 5,000 tasks are enqueued at once, until the results of all are here. Against that: until all rows are in
notifyq.finished while no caller waits for a result.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import anyio

import notifyq
from notifyq.database import connection

from .children import child, children, say, told
from .common import FLOOR, Bench, Line, Result, median, percentile, ratio

ROUNDS, TASKS, GAP_SECONDS = 4, 50, 0.02
WARM_UP = 10
POLL_SECONDS = 0.2
MANY = 5000

clock = time.perf_counter
app = notifyq.App()


class Ask(notifyq.Task):
    n: int


@app.handler
async def answer(task: Ask) -> int:
    return task.n


async def run(bench: Bench) -> Result:
    conn = await connection.connect(bench.dsn)
    await conn.execute(FLOOR)
    over = asyncio.Event()
    await conn.add_listener("bench_done", lambda *_: over.set())

    async def pushed(n: int) -> None:
        assert await (await app.enqueue(Ask(n))).result(int) == n

    async def polled(n: int) -> None:
        id = (await app.enqueue(Ask(n))).id
        while not await conn.fetchval("SELECT state = 'done' FROM notifyq.all_tasks WHERE id = $1", id):
            await asyncio.sleep(POLL_SECONDS)

    async def bare(n: int) -> None:
        over.clear()
        await conn.execute(
            "WITH i AS (INSERT INTO bench.floor (type, payload) VALUES ('Ask', $1)) SELECT pg_notify('bench', '')",
            b"%d" % n,
        )
        await over.wait()

    times: dict[str, list[float]] = {"ours": [], "poll": [], "floor": []}
    seconds: dict[str, list[float]] = {"awaited": [], "not awaited": []}
    with children(1, "results", bench.dsn, "worker"), children(1, "results", bench.dsn, "floor"):
        async with app.connect(bench.dsn):
            for round in range(-1, bench.rounds(ROUNDS)):
                for name, ask in (("ours", pushed), ("poll", polled), ("floor", bare)):
                    for n in range(WARM_UP if round < 0 else bench.work(TASKS)):
                        await asyncio.sleep(GAP_SECONDS)
                        begin = clock()
                        await ask(n)
                        if round >= 0:
                            times[name].append((clock() - begin) * 1000)
            for _ in range(bench.rounds(ROUNDS)):
                for name, awaited in (("awaited", True), ("not awaited", False)):
                    seconds[name].append(await many(bench, conn, awaited=awaited))
    await conn.execute("DROP SCHEMA bench CASCADE")
    await conn.close()

    floor = percentile(times["floor"], 0.5)
    lines: list[Line] = []
    for name, what in (("ours", "ref.result()"), ("poll", "a look every 0.2 s"), ("floor", "floor")):
        half = percentile(times[name], 0.5)
        lines.append(Line(f"{what}: p50", half, "ms", *(() if name == "floor" else ("floor", half / floor))))
        lines.append(Line(f"{what}: p99", percentile(times[name], 0.99), "ms"))
    tasks = bench.work(MANY)
    lines.append(
        Line(f"{tasks:,} at once, all results here", median(seconds["awaited"]), "s", "the same, not awaited",
             ratio(seconds["awaited"], seconds["not awaited"]))
    )  # fmt: skip
    lines.append(Line(f"{tasks:,} at once, not awaited", median(seconds["not awaited"]), "s"))
    return Result(lines, {"times": times, "seconds": seconds})


async def many(bench: Bench, conn: connection.Connection, *, awaited: bool) -> float:
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    tasks = [Ask(n) for n in range(bench.work(MANY))]
    begin = clock()
    ids = await app.enqueue_many(tasks)
    if awaited:
        async with anyio.create_task_group() as group:
            for id in ids:
                group.start_soon(app.ref(id).result)
    else:
        while await conn.fetchval("SELECT count(*) FROM notifyq.finished") < len(tasks):
            await asyncio.sleep(0.005)
    return clock() - begin


# In the children.


async def work() -> None:
    dsn, what = sys.argv[1:]
    async with anyio.create_task_group() as group:
        if what == "worker":

            async def worker(*, task_status: Any) -> None:
                await app.run_worker(dsn=dsn, task_status=task_status)

            await group.start(worker)
        else:
            await group.start(floor, dsn)
        say("ready")
        await told()


async def floor(dsn: str, *, task_status: Any) -> None:
    """The least that two NOTIFYs, a claim and its end take with asyncpg."""
    claims, ends = (
        await connection.connect_worker(dsn, "floor", relaxed=True),
        await connection.connect_worker(dsn, "floor"),
    )
    rung = asyncio.Event()
    await claims.add_listener("bench", lambda *_: rung.set())
    task_status.started()
    while True:
        await rung.wait()
        rung.clear()
        for row in await claims.fetch(
            """UPDATE bench.floor SET processing_at = clock_timestamp() WHERE id = ANY(ARRAY(
                   SELECT id FROM bench.floor WHERE processing_at IS NULL ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED))
               RETURNING id"""
        ):
            await ends.execute(
                """WITH d AS (DELETE FROM bench.floor WHERE id = $1 RETURNING id)
                   SELECT pg_notify('bench_done', id::text) FROM d""",
                row["id"],
            )


if __name__ == "__main__":
    child(work)
