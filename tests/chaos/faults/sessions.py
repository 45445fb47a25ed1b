"""Faults of sessions: ours that are ended or cancelled, and strangers' that hold locks, snapshots and transactions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import Hit, Missed, fault

if TYPE_CHECKING:
    from ..stage import Stage

TERMINATE = """SELECT usename, pg_terminate_backend(pid) FROM
               (SELECT pid, usename FROM pg_stat_activity WHERE application_name LIKE $1 AND usename <> 'postgres'
                ORDER BY random() LIMIT $2) AS picked"""
CANCEL = """SELECT pg_cancel_backend(pid) FROM pg_stat_activity
            WHERE application_name LIKE 'notifyq %' AND usename LIKE 'w%' AND random() < 0.5"""


async def terminate(stage: Stage, hit: Hit, role: str, count: int = 1) -> None:
    rows = await stage.sql(TERMINATE, f"notifyq {role}%", count)
    if not rows:
        raise Missed
    hit.who.update(row[0] for row in rows)


@fault("connection ended: bell")
async def bell(stage: Stage, hit: Hit) -> None:
    await terminate(stage, hit, "bell")


@fault("connection ended: claims")
async def claims(stage: Stage, hit: Hit) -> None:
    await terminate(stage, hit, "claims")


@fault("connection ended: settle")
async def settle(stage: Stage, hit: Hit) -> None:
    await terminate(stage, hit, "settle")


@fault("connection ended: heartbeat")
async def heartbeat(stage: Stage, hit: Hit) -> None:
    await terminate(stage, hit, "heartbeat")


@fault("connection ended: enqueuers", heal=0.5)
async def enqueuers(stage: Stage, hit: Hit) -> None:
    for _ in range(10):
        await stage.sql(TERMINATE, "notifyq app%", 10)
        await stage.sql(TERMINATE, "notifyq chaos %", 2)
        await asyncio.sleep(0.1)


@fault("all connections ended, for 2 s", everybody=True)
async def everything(stage: Stage, hit: Hit) -> None:
    for _ in range(10):
        await stage.sql(TERMINATE, "notifyq %", 100)
        await asyncio.sleep(0.2)


@fault("statements cancelled, for 2 s")
async def cancelled(stage: Stage, hit: Hit) -> None:
    for _ in range(100):
        await stage.sql(CANCEL)
        await asyncio.sleep(0.02)
    hit.who.update(member.who for member in stage.fleet.members)


@fault("snapshot held", heal=0.5)
async def snapshot(stage: Stage, hit: Hit) -> None:
    async with stage.session() as conn, conn.transaction(isolation="repeatable_read"):
        await conn.fetchval("SELECT count(*) FROM notifyq.task")
        await asyncio.sleep(3)


@fault("enqueuer idle in transaction", heal=0.5)
async def idle_in_transaction(stage: Stage, hit: Hit) -> None:
    """The tasks that it enqueued start when it commits, and no other session waits for it."""
    async with stage.open_enqueue("idle in transaction"):
        await asyncio.sleep(stage.random.uniform(1, 4))


@fault("enqueuer killed in its transaction", heal=0.5)
async def psql_killed(stage: Stage, hit: Hit) -> None:
    if stage.psql is None:
        raise Missed
    batch = stage.batch("killed psql")
    insert = f"""INSERT INTO notifyq.task (type, payload) VALUES ('Quick', '{{"n": {batch.numbers[0]}}}')"""
    argv = ["-X", "-q", "-c", "BEGIN", "-c", insert, "-c", r"\echo done", "-c", "SELECT pg_sleep(60)", stage.dsn]
    process = await asyncio.create_subprocess_exec(
        stage.psql, *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.kill()
    await process.wait()
    batch.outcome = "rolled back"
    await stage.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)%'")


@fault("stranger listens in a transaction", heal=0.5)
async def stranger(stage: Stage, hit: Hit) -> None:
    """A session that listens and hears nothing, so that the queue of notifications can't be emptied."""
    async with stage.session() as conn:
        await conn.execute("LISTEN notifyq")
        async with conn.transaction():
            await conn.execute("LISTEN other")
            await asyncio.sleep(3)


@fault("task table locked for 1 s")
async def table_locked(stage: Stage, hit: Hit) -> None:
    """A user's migration would lock it so."""
    async with stage.session() as conn, conn.transaction():
        await conn.execute("LOCK TABLE notifyq.task IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(1)


@fault("bell locked for 2 s")
async def bell_locked(stage: Stage, hit: Hit) -> None:
    """No worker can fall asleep, and every enqueuer rings."""
    async with stage.session() as conn, conn.transaction():
        await conn.execute("LOCK TABLE notifyq.bell IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(2)


@fault("rows locked for 2 s", heal=6.5)
async def rows_locked(stage: Stage, hit: Hit) -> None:
    """A stranger locks rows with FOR UPDATE. Claims skip them, and no ring comes when they are unlocked: the fallback
    poll finds tasks that became ready meanwhile."""
    async with stage.session() as conn, conn.transaction():
        for _ in range(20):
            await conn.fetch("SELECT FROM notifyq.task ORDER BY id FOR UPDATE SKIP LOCKED")
            await asyncio.sleep(0.1)
