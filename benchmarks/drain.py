"""100,000 ready tasks, worked off by 1, 2 and 4 processes with no-op handlers, history kept and not kept.

A process runs `app.run_worker(drain=True)`. The clock runs from the moment at which all of them are told to go, before
they connect, until the last has returned. Every outcome is committed and flushed by then.

Two floors are measured beside it, in turns, each a process with one connection: the same statements without a framework
(claim 500, decode, call, settle 500); and the same loop over one plain table that keeps no history and settles by
DELETE.
"""

from __future__ import annotations

import sys
import time

import msgspec

from notifyq.database import connection
from notifyq.worker import job as claims

from .children import child, children, say, told
from .common import TASK, Bench, Line, Mail, Result, app, mail, median, ratio

TASKS, ROUNDS, BATCH = 100_000, 3, 500
PROCESSES = (1, 2, 4)
SAME, PLAIN = "the same statements, no framework", "one table, no history, DELETE"


async def run(bench: Bench) -> Result:
    tasks = bench.work(TASKS)
    conn = await connection.connect(bench.dsn)
    await conn.execute(
        """CREATE SCHEMA IF NOT EXISTS bench; DROP TABLE IF EXISTS bench.floor;
           CREATE TABLE bench.floor (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, type text, payload jsonb,
                                     processing_at timestamptz);
           CREATE INDEX floor_ready ON bench.floor (id) WHERE processing_at IS NULL"""
    )
    rates: dict[str, list[float]] = {}

    async def measure(name: str, processes: int, what: str, history: str = "") -> None:
        table = "bench.floor" if what == "plain" else "notifyq.task"
        await fill(bench, conn, table, tasks)
        with children(processes, "drain", bench.dsn, what, history) as running:
            begin = time.perf_counter()
            for one in running:
                one.tell()
            done = [one.read() for one in running]
            seconds = time.perf_counter() - begin
        assert all(done)
        assert not await conn.fetchval(f"SELECT count(*) FROM {table} WHERE processing_at IS NULL")
        kept = await conn.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'")
        assert kept == (tasks if history == "kept" else 0)
        rates.setdefault(name, []).append(tasks / seconds)

    for _ in range(bench.rounds(ROUNDS)):
        for history in ("kept", "none"):
            await measure(f"{SAME}, {history}", 1, "same", history)
            for processes in PROCESSES:
                await measure(f"{processes}, {history}", processes, "notifyq", history)
        await measure(PLAIN, 1, "plain")
    await conn.execute("DROP SCHEMA bench CASCADE")
    await conn.close()

    lines: list[Line] = []
    for history, words in (("kept", "history kept"), ("none", "no history")):
        one, floor = rates[f"1, {history}"], rates[f"{SAME}, {history}"]
        least = 0.8 if history == "kept" else None
        lines.append(Line(f"drain, 1 process, {words}", median(one), "/s", SAME, ratio(one, floor), least))
        for processes in PROCESSES[1:]:
            several = rates[f"{processes}, {history}"]
            least = 1.0 if processes == 2 else None
            what = f"drain, {processes} processes, {words}"
            lines.append(Line(what, median(several), "/s", "1 process", ratio(several, one), least))
        lines.append(Line(f"floor: {SAME}, {words}", median(floor), "/s"))
    lines.append(Line(f"floor: {PLAIN}", median(rates[PLAIN]), "/s"))
    return Result(lines, {"tasks": tasks, "rates": rates})


async def fill(bench: Bench, conn: connection.Connection, table: str, tasks: int) -> None:
    """`tasks` ready ones, and nothing else."""
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    await conn.execute(f"TRUNCATE {table}")
    if bench.server:
        await conn.execute("CHECKPOINT")  # so that WAL files are used again; before, so that no page is logged whole
    payload = msgspec.json.encode(TASK)
    insert = f"INSERT INTO {table} (type, payload) SELECT 'Mail', $1::jsonb FROM generate_series(1, $2)"
    await conn.execute(insert, payload, tasks)
    await conn.execute(f"VACUUM ANALYZE {table}")


# In the children. They connect when told to.


async def work() -> bool:
    dsn, what, history = sys.argv[1:]
    say("ready")
    await told()
    if what == "notifyq":
        await app.run_worker(dsn=dsn, drain=True, history=86400.0 if history == "kept" else 0.0)
    elif what == "same":
        await same_statements(dsn, keep=history == "kept")
    else:
        await plain_table(dsn)
    return True


async def same_statements(dsn: str, *, keep: bool) -> None:
    conn = await connection.connect_worker(dsn, "floor")
    worker = await conn.fetchval(
        """INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)
           VALUES ('floor', '{default}', '{Mail}', '{10}', 1, '1 hour') RETURNING id"""
    )
    decode = msgspec.json.Decoder(Mail).decode
    while jobs := await claims.claim(conn, worker, {"default": BATCH}, BATCH):
        for job in jobs:
            assert job.payload is not None
            await mail(decode(job.payload))
        ids, attempts = [job.id for job in jobs], [job.attempt for job in jobs]
        done = await conn.fetch(connection.SQL["finish"], worker, ids, attempts, ["done"] * len(jobs), [], [], keep)
        assert len(done) == len(jobs)
    await conn.execute("DELETE FROM notifyq.worker WHERE id = $1", worker)
    await conn.close()


async def plain_table(dsn: str) -> None:
    conn = await connection.connect_worker(dsn, "floor")
    decode = msgspec.json.Decoder(Mail).decode
    while rows := await conn.fetch(
        """UPDATE bench.floor SET processing_at = clock_timestamp() WHERE id = ANY(ARRAY(
               SELECT id FROM bench.floor WHERE processing_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED))
           RETURNING id, payload""",
        BATCH,
    ):
        for row in rows:
            await mail(decode(row["payload"]))
        await conn.execute("DELETE FROM bench.floor WHERE id = ANY($1)", [row["id"] for row in rows])
    await conn.close()


if __name__ == "__main__":
    child(work)
