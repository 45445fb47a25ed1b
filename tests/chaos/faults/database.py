"""Faults of the server: crashed, frozen, crowded, vacuumed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from notifyq import NotifyqError
from notifyq.database import connection

from . import Hit, Missed, fault

if TYPE_CHECKING:
    from ..stage import Stage


@fault("server crashes and restarts", everybody=True)
async def restart(stage: Stage, hit: Hit) -> None:
    await asyncio.to_thread(stage.server.restart, "immediate")


@fault("a backend is killed", everybody=True)
async def backend_killed(stage: Stage, hit: Hit) -> None:
    """kill -9 of one backend: PostgreSQL then ends all the others and recovers."""
    rows = await stage.sql("SELECT pid FROM pg_stat_activity WHERE usename LIKE 'w%' ORDER BY random() LIMIT 1")
    if not rows:
        raise Missed
    os.kill(rows[0][0], signal.SIGKILL)
    await stage.until("SELECT true", 15)


@fault("clock step")
async def clock_step(stage: Stage, hit: Hit) -> None:
    """The clock is stepped by hours, forward or back, and then back to where it was. What workers write in between is
    wrong by that much. Under a clock that is ahead they write slots of crons, and starts of tasks that have a rate."""
    hours = stage.random.choice((-5, -1, 1, 5))
    async with stage.session() as conn:
        ahead = f"interval '{abs(hours)} hours'"
        await conn.execute(f"UPDATE notifyq.cron SET next_at = next_at + {ahead}")
        await conn.execute(f"UPDATE notifyq.rate_log SET at = at + {ahead}")
        await conn.execute(
            f"""CREATE OR REPLACE FUNCTION chaos.step() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN NEW.seen_at := NEW.seen_at + interval '{hours} hours'; RETURN NEW; END $$"""
        )
        await conn.execute(
            "CREATE OR REPLACE TRIGGER step BEFORE UPDATE ON notifyq.worker FOR EACH ROW EXECUTE FUNCTION chaos.step()"
        )
    try:
        await asyncio.sleep(stage.random.uniform(2.0, 6.0))
    finally:
        async with stage.session() as conn:
            await conn.execute("DROP TRIGGER IF EXISTS step ON notifyq.worker")


@fault("server frozen", everybody=True)
async def server_frozen(stage: Stage, hit: Hit) -> None:
    pids = [stage.server.pid, *_children(stage.server.pid)]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(stage.random.uniform(1.0, 4.0))
    finally:
        for pid in reversed(pids):
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass  # it was on its way out


def _children(parent: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(after_name[1]) == parent:
            found.append(int(stat.parent.name))
    return found


@fault("connections exhausted", everybody=True)
async def exhausted(stage: Stage, hit: Hit) -> None:
    """A stranger takes all connections, and then some sessions of ours have to come back."""
    dsn = stage.dsn.replace("//notifyq@", "//chaos_stranger@", 1)
    taken: list[asyncpg.Connection[asyncpg.Record]] = []

    async def take() -> None:
        try:
            while True:
                taken.append(await connection.connect(dsn, role="stranger", timeout=3))
        except NotifyqError:
            pass  # that was the last one

    try:
        await take()
        await stage.sql(
            """SELECT pg_terminate_backend(pid) FROM
               (SELECT pid FROM pg_stat_activity WHERE usename LIKE 'w%' ORDER BY random() LIMIT 3) AS picked"""
        )
        await take()
        await asyncio.sleep(2)
    finally:
        for conn in taken:
            conn.terminate()


@fault("VACUUM FULL")
async def vacuum_full(stage: Stage, hit: Hit) -> None:
    for table in ("task", "finished", "worker"):
        await stage.sql(f"VACUUM FULL notifyq.{table}")


@fault("publication", heal=0.5)
async def publication(stage: Stage, hit: Hit) -> None:
    """A publication of all tables, as change data capture makes it: a table without a key can't be updated or deleted
    from. It stays until this fault's next turn."""
    if await stage.sql("SELECT FROM pg_publication"):
        await stage.sql("DROP PUBLICATION IF EXISTS chaos")
    else:
        try:
            await stage.sql("CREATE PUBLICATION chaos FOR ALL TABLES")
        except asyncpg.DuplicateObjectError:
            raise Missed from None  # the other one of a pair was quicker


@fault("REINDEX, ANALYZE, VACUUM")
async def reindex(stage: Stage, hit: Hit) -> None:
    """All the indexes are made anew, and plans are made in the middle of it."""
    for statement in ("REINDEX TABLE notifyq.task", "ANALYZE notifyq.task", "VACUUM notifyq.task"):
        await stage.sql(statement)
        await asyncio.sleep(0.2)
