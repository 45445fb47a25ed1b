"""What the doorbell costs the clients that enqueue, and how fast they can enqueue.

Single-row INSERTs by pgbench, 1 to 64 clients, a worker draining, on the local disk and on one that takes 1 ms longer
for each fsync. Clock: pgbench's own, over transactions that have committed. Each round runs every variant once:

    no trigger             no enqueuer rings, so the worker polls, every 2 ms; it has as much to do as the busy one
    always, per row        a trigger that calls pg_notify for each row, as most queues ship
    always, per statement  the same, once a statement
    notifyq, busy worker   tasks come in all the while, 500 a second beside pgbench's, so it never sleeps
    notifyq, idle worker   it sleeps when the run begins

Then from Python, until it has returned, which is after the commit: `enqueue_many` of 100,000, and `app.enqueue` by 16
coroutines.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from itertools import product

import anyio
import msgspec

from notifyq.database import connection, schema

from .common import TASK, Bench, Line, Plot, Result, app, median, ratio, warm_up, worker_process
from .slow_disk import missing, slow_server

ROUNDS, SECONDS = 3, 1
CLIENTS = (1, 4, 16, 64)
PLAIN, ROW, STATEMENT = "no trigger", "always, per row", "always, per statement"
BUSY, IDLE = "notifyq, busy worker", "notifyq, idle worker"
LOCAL, SLOW = "local disk", "fsync + 1 ms"
BULK, COROUTINES, PYTHON_SECONDS = 100_000, 16, 2.0

INSERT = f"INSERT INTO notifyq.task (type, payload) VALUES ('Mail', '{msgspec.json.encode(TASK).decode()}');\n"
ALWAYS = """CREATE SCHEMA bench;
CREATE FUNCTION bench.always() RETURNS trigger LANGUAGE plpgsql AS
$$BEGIN PERFORM pg_notify('notifyq', ''); RETURN NULL; END$$;
CREATE TRIGGER always_row AFTER INSERT ON notifyq.task FOR EACH ROW EXECUTE FUNCTION bench.always();
CREATE TRIGGER always_statement AFTER INSERT ON notifyq.task FOR EACH STATEMENT EXECUTE FUNCTION bench.always();"""
TRIGGERS = {PLAIN: "", ROW: "always_row", STATEMENT: "always_statement", BUSY: "ring", IDLE: "ring"}
ASLEEP = (
    "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'notifyq.bell'::regclass AND mode = 'ShareLock' AND granted)"
)

Rates = dict[tuple[str, int], list[float]]  # of a variant with so many clients, in each round


async def run(bench: Bench) -> Result:
    disks = {LOCAL: await curve(bench, bench.dsn)}
    if bench.server is None or (why := missing()):
        why = "it needs the embedded server" if bench.server is None else why
        print(f"  skipped: {SLOW}: {why}")
    else:
        with slow_server() as server:
            conn = await connection.connect(server.dsn())
            await schema.migrate(conn)
            if not bench.quick:
                await warm_up(conn)
            await conn.close()
            disks[SLOW] = await curve(bench, server.dsn())
            slowed = max(disks[SLOW][PLAIN, 1])
            if slowed > 1000:
                raise RuntimeError(f"one client commits {slowed:,.0f} times a second: fsync isn't slower")
    lines = [line for disk, rates in disks.items() for line in described(disk, rates)]
    lines += await from_python(bench)
    plots = [
        Plot(
            "enqueue",
            {LOCAL: "The cost of NOTIFY, local disk", SLOW: "with 1 ms more for each fsync"}[disk],
            "clients that enqueue",
            "committed INSERTs a second",
            {name: [(n, median(rates[name, n])) for n in CLIENTS] for name in TRIGGERS},
            log_x=True,
            log_y=True,
        )
        for disk, rates in disks.items()
    ]
    data = {
        disk: {f"{name}, {n} clients": found for (name, n), found in rates.items()} for disk, rates in disks.items()
    }
    return Result(lines, {"rates": data}, plots)


def described(disk: str, rates: Rates) -> list[Line]:
    lines: list[Line] = []
    for clients in (16, 64):
        for name in TRIGGERS:
            reference, least = (STATEMENT, None) if name == IDLE else (PLAIN, None)
            if name == IDLE and clients == 16:
                least = 3.0
            if name == BUSY and disk == SLOW:
                least = 0.9
            elif name == BUSY and clients == 16:
                least = 0.85
            ours = rates[name, clients]
            found = None if name == PLAIN else ratio(ours, rates[reference, clients])
            what = f"INSERTs, {disk}, {clients} clients: {name}"
            lines.append(Line(what, median(ours), "/s", reference, found, least))
    return lines


async def curve(bench: Bench, dsn: str) -> Rates:
    """Every variant with every number of clients, in turns."""
    rates: Rates = {}
    conn = await connection.connect(dsn)
    await conn.execute(ALWAYS)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(INSERT)
            script.flush()
            for _ in range(bench.rounds(ROUNDS)):
                # By the number of clients, so that what is divided by each other is seconds apart.
                for clients, names in product(CLIENTS, ((PLAIN,), (ROW, STATEMENT, BUSY, IDLE))):
                    with worker_process(dsn, "--poll-interval", "0.002" if PLAIN in names else "5"):
                        for name in names:
                            await use_trigger(conn, TRIGGERS[name])
                            async with prepared(conn, name):
                                found = await pgbench(bench, dsn, script.name, clients)
                            rates.setdefault((name, clients), []).append(found)
                            await drained(conn)
    finally:  # it may be a user's database
        await use_trigger(conn, "ring")
        await conn.execute("DROP SCHEMA bench CASCADE")
        await conn.close()
    return rates


async def use_trigger(conn: connection.Connection, which: str) -> None:
    """That one alone."""
    for trigger in ("always_row", "always_statement", "ring"):
        does = "ENABLE" if trigger == which else "DISABLE"
        await conn.execute(f"ALTER TABLE notifyq.task {does} TRIGGER {trigger}")


@asynccontextmanager
async def prepared(conn: connection.Connection, name: str) -> AsyncGenerator[None]:
    """The worker as this variant wants it, meanwhile."""
    if name == IDLE:
        with anyio.fail_after(10):
            while not await conn.fetchval(ASLEEP):
                await asyncio.sleep(0.01)
        yield
    elif name in (PLAIN, BUSY):
        async with anyio.create_task_group() as group:
            group.start_soon(feed, conn)
            await asyncio.sleep(0.1)
            yield
            group.cancel_scope.cancel()
    else:
        yield


async def feed(conn: connection.Connection) -> None:
    """500 tasks a second."""
    due = time.perf_counter()
    insert = "INSERT INTO notifyq.task (type, payload) SELECT 'Mail', $1::jsonb FROM generate_series(1, 6)"
    while True:
        due += 0.012
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        with anyio.CancelScope(shield=True):
            await conn.execute(insert, msgspec.json.encode(TASK))


async def pgbench(bench: Bench, dsn: str, script: str, clients: int) -> float:
    """Transactions a second."""
    length = ("-t", "20") if bench.quick else ("-T", str(SECONDS))
    options = ("-n", "-M", "prepared", "-f", script, "-c", str(clients), "-j", str(min(clients, 2)), *length, dsn)
    process = await asyncio.create_subprocess_exec(
        bench.program("pgbench"), *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    found = re.search(rb"tps = ([0-9.]+) \(without", out)
    if process.returncode or not found:
        raise RuntimeError(f"pgbench: {err.decode().strip() or out.decode()}")
    return float(found[1])


async def drained(conn: connection.Connection) -> None:
    with anyio.fail_after(60):
        while await conn.fetchval("SELECT EXISTS (SELECT FROM notifyq.task)"):
            await asyncio.sleep(0.02)
    await conn.execute("TRUNCATE notifyq.finished")


async def from_python(bench: Bench) -> list[Line]:
    bulk: list[float] = []
    consumed: dict[bool, list[float]] = {True: [], False: []}
    tasks = bench.work(BULK)
    conn = await connection.connect(bench.dsn)
    async with app.connect(bench.dsn):
        for _ in range(bench.rounds(ROUNDS)):
            begin = time.perf_counter()
            await app.enqueue_many([TASK] * tasks)
            bulk.append(tasks / (time.perf_counter() - begin))
            await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
            for consuming, found in consumed.items():
                with worker_process(bench.dsn) if consuming else nullcontext():
                    found.append(await coroutines(PYTHON_SECONDS / 10 if bench.quick else PYTHON_SECONDS))
                await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    await conn.close()
    one, alone = f"app.enqueue by {COROUTINES} coroutines", "nobody consuming"
    return [
        Line(f"enqueue_many of {tasks:,}", median(bulk), "rows/s", least=150_000),
        Line(f"{one}, a worker consuming", median(consumed[True]), "/s", least=4000),
        Line(f"{one}, {alone}", median(consumed[False]), "/s"),
    ]


async def coroutines(seconds: float) -> float:
    """Enqueued a second, by all of them."""
    done = 0
    begin = time.perf_counter()

    async def enqueue() -> None:
        nonlocal done
        while time.perf_counter() - begin < seconds:
            await app.enqueue(TASK)
            done += 1

    async with anyio.create_task_group() as group:
        for _ in range(COROUTINES):
            group.start_soon(enqueue)
    return done / (time.perf_counter() - begin)
