"""Does a claim cost more when more is waiting, when more has been finished, or when more is due some day?

Each case has a database. A claim is the worker's own statement for 100 tasks, timed from Python. The tasks are claimed
and deleted for good, in turns with the other cases. Throughput is of one worker's first 10,000 tasks, from the first
claim to the last outcome by the database's clock. It includes the worker's ramp, so compare it between cases, and not
with `drain`. The server is of its own, with autovacuum off, so that autovacuum doesn't run in one case and not in
another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import NamedTuple
from urllib.parse import urlsplit

from notifyq.codec import encode_payload
from notifyq.database import connection, schema
from notifyq.database.connection import SQL, Connection
from notifyq.embedded import Server
from notifyq.worker import job as claims

from .common import TASK, Bench, Line, Plot, Result, median, ratio, worker_process

# Filling a table that the same transaction emptied needs no WAL.
SETTINGS = {
    "wal_level": "minimal", "max_wal_senders": "0", "max_wal_size": "16GB", "checkpoint_timeout": "1h",
    "autovacuum": "off", "shared_buffers": "512MB",
}  # fmt: skip
ROUNDS, CLAIMS, BATCH, WARM = 5, 16, 100, 7  # a prepared statement finds its final plan at its sixth run
DRAINS, DRAINED = 3, 10_000


class Case(NamedTuple):
    ready: int
    history: int = 0
    future: int = 0
    queues: int = 1
    used: int = 0  # queues that the tasks are in; 0: all

    def __str__(self) -> str:
        parts = [f"{self.ready:,} ready"]
        parts += [f"{self.history:,} finished"] if self.history else []
        parts += [f"{self.future:,} scheduled"] if self.future else []
        parts += [f"{self.queues} queues, {self.used or self.queues} in use"] if self.queues > 1 else []
        return ", ".join(parts)


BASE = Case(10_000)
READY = (BASE, Case(100_000), Case(1_000_000), Case(10_000_000))
CASES = (
    *READY, Case(10_000, history=10_000_000), Case(10_000, future=1_000_000), Case(10_000, queues=10),
    Case(10_000, queues=50), Case(10_000, queues=200), Case(10_000, queues=200, used=1),
)  # fmt: skip


class Place:
    """A case's database, and the worker that claims there."""

    conn: Connection
    worker: int

    def __init__(self, case: Case, dsn: str) -> None:
        self.case = case
        self.dsn = dsn
        self.rooms = {f"q{n}": BATCH for n in reversed(range(case.queues))}  # the one in use last
        self.claims: list[float] = []  # ms, the median of each round
        self.rates: list[float] = []  # tasks a second

    async def fill(self) -> None:
        case = self.case
        self.conn = conn = await connection.connect_worker(self.dsn, "claims", relaxed=True)
        await schema.migrate(conn)
        await conn.execute("SET search_path = pg_catalog")
        async with conn.transaction():
            await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
            await self.enqueue(case.ready)
            await conn.execute(
                """INSERT INTO notifyq.task (type, queue, payload, run_at)
                   SELECT 'Mail', 'q0', $2, now() + interval '1 day' + n * interval '1 s'
                   FROM generate_series(1, $1) AS n""",
                case.future, encode_payload(TASK), timeout=600,
            )  # fmt: skip
            # Of the last hours: what is older than a day would be pruned while this measures.
            await conn.execute(
                """INSERT INTO notifyq.finished (id, created_at, run_at, processing_at, processed_at, priority,
                                                 attempts, state, queue, type, worker, payload)
                   SELECT -n, at, at, at, at, 0, 1, 'done', 'q0', 'Mail', 'host:1', $2
                   FROM generate_series(1, $1) AS n
                   CROSS JOIN LATERAL (SELECT now() - (n / $1::float8) * interval '5 hours' AS at) AS t""",
                case.history, encode_payload(TASK), timeout=600,
            )  # fmt: skip
        await conn.execute("VACUUM ANALYZE notifyq.task", timeout=600)
        await conn.execute("ANALYZE notifyq.finished")
        types = ["Mail"]
        self.worker = await conn.fetchval(SQL["register_worker"], "host:1", [*self.rooms], types, [10], 100, 3600.0)

    async def enqueue(self, tasks: int) -> None:
        await self.conn.execute(
            """INSERT INTO notifyq.task (type, queue, payload)
               SELECT 'Mail', 'q' || n % $3, $2 FROM generate_series(1, $1) AS n""",
            tasks, encode_payload(TASK), self.case.used or self.case.queues, timeout=600,
        )  # fmt: skip

    async def claim(self, times: int) -> list[float]:
        took = list[float]()
        for _ in range(times):
            begin = time.perf_counter()
            jobs = await claims.claim(self.conn, self.worker, self.rooms, BATCH)
            took.append((time.perf_counter() - begin) * 1000)
            assert len(jobs) == BATCH
            await self.conn.execute("DELETE FROM notifyq.task WHERE id = ANY ($1)", [job.id for job in jobs])
        return took

    async def drain(self) -> float:
        """Of the first 10,000 tasks that a worker process takes, so many a second."""
        if self.case.ready <= DRAINED:
            left = "SELECT count(*) FROM notifyq.task WHERE run_at <= created_at"
            await self.enqueue(DRAINED - await self.conn.fetchval(left))
        since: datetime = await self.conn.fetchval("SELECT clock_timestamp()")
        ends = (
            "SELECT processed_at FROM notifyq.finished WHERE processed_at > $1 AND state <> 'dead' ORDER BY 1 LIMIT $2"
        )
        done: Sequence[object] = ()
        with worker_process(self.dsn, *(word for queue in self.rooms for word in ("-q", queue))):
            while len(done) < DRAINED:
                await asyncio.sleep(0.1)
                done = await self.conn.fetch(ends, since, DRAINED)
        seconds = await self.conn.fetchval(
            f"""SELECT extract(epoch FROM max(processed_at)
                       - (SELECT min(processing_at) FROM notifyq.finished WHERE processed_at > $1))::float8
                FROM ({ends}) AS f""",
            since, DRAINED,
        )  # fmt: skip
        return float(DRAINED / seconds)


async def run(bench: Bench) -> Result:
    cases = [case for case in CASES if not bench.quick or max(case) < 10_000_000]
    with ExitStack() as stack:
        server = stack.enter_context(Server(durable=True, settings=SETTINGS)) if bench.server else None
        admin = await connection.connect(server.dsn() if server else bench.dsn)
        places = list[Place]()
        for number, case in enumerate(cases):
            name = f"notifyq_scale_{number}"
            await admin.execute(f"DROP DATABASE IF EXISTS {name}")
            await admin.execute(f"CREATE DATABASE {name}")
            places.append(
                Place(case, urlsplit(server.dsn() if server else bench.dsn)._replace(path=f"/{name}").geturl())
            )
            await places[-1].fill()
        await admin.execute("CHECKPOINT")
        for place in places:
            await place.claim(WARM)
        for _ in range(bench.rounds(ROUNDS)):
            for place in places:
                place.claims.append(median(await place.claim(CLAIMS)))
        for _ in range(bench.rounds(DRAINS)):
            for place in places:
                place.rates.append(await place.drain())
        for number, place in enumerate(places):
            await place.conn.close()
            await admin.execute(f"DROP DATABASE notifyq_scale_{number}")
        await admin.close()
    return _result(places)


def _result(places: list[Place]) -> Result:
    base = places[0]
    lines = [
        Line(
            f"claim of {BATCH}, {place.case}", median(place.claims), "ms",
            str(base.case), ratio(place.claims, base.claims),
            most=None if place is base or place.case.queues > 1 else 1.3,
        )
        for place in places
    ]  # fmt: skip
    lines += [
        Line(f"drain, {place.case}", median(place.rates), "/s", str(base.case), ratio(place.rates, base.rates))
        for place in places
    ]
    ready = [place for place in places if place.case in READY]
    plots = [
        Plot(
            "scale", f"A claim of {BATCH}", "ready tasks", "ms",
            {"claim": [(place.case.ready, median(place.claims)) for place in ready]}, log_x=True,
        ),
        Plot(
            "scale", "One worker", "ready tasks", "tasks/s",
            {"drain": [(place.case.ready, median(place.rates)) for place in ready]}, log_x=True,
        ),
    ]  # fmt: skip
    data = {str(place.case): {"claim_ms": place.claims, "drain": place.rates} for place in places}
    return Result(lines, data, plots)
