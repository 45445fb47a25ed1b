"""Faults of worker processes: killed, at random or at a named point; frozen; told to stop."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

from . import Hit, Missed, fault

if TYPE_CHECKING:
    from ..fleet import Member
    from ..stage import Stage

TURN = """SELECT a.usename FROM pg_locks l JOIN pg_stat_activity a USING (pid)
          WHERE l.locktype = 'advisory' AND l.classid = 1852990836 AND l.granted ORDER BY random() LIMIT 1"""
ARMING = """SELECT a.usename FROM pg_locks l JOIN pg_stat_activity a USING (pid)
            WHERE l.relation = 'notifyq.bell'::regclass AND l.mode = 'ShareLock' AND NOT l.granted LIMIT 1"""
SETTLING = """SELECT usename FROM pg_stat_activity
              WHERE application_name = 'notifyq settle' AND wait_event_type = 'Lock' LIMIT 1"""

BUSIEST = """SELECT l.who FROM notifyq.task t JOIN chaos.ledger l ON l.op = 'W' AND l.id = t.worker
             GROUP BY l.who ORDER BY count(*) DESC"""


def some(stage: Stage) -> Member:
    if not stage.fleet.members:
        raise Missed
    return stage.random.choice(stage.fleet.members)


async def found(stage: Stage, query: str, seconds: float = 3.0) -> Member:
    """Wait for a worker whose session the query finds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        rows = await stage.sql(query)
        if rows and (member := stage.fleet.named(rows[0][0])):
            return member
        await asyncio.sleep(0.002)
    raise Missed


def kill(member: Member, hit: Hit) -> None:
    hit.who.add(member.who)
    member.signal(signal.SIGKILL)


@fault("worker killed")
async def killed(stage: Stage, hit: Hit) -> None:
    kill(some(stage), hit)


@fault("worker killed with the turn")
async def killed_with_turn(stage: Stage, hit: Hit) -> None:
    kill(await found(stage, TURN), hit)


@fault("worker killed while arming")
async def killed_arming(stage: Stage, hit: Hit) -> None:
    """An open transaction that was told that no worker sleeps keeps the worker from falling asleep, until after its
    death."""
    async with stage.open_enqueue("arming"):
        kill(await found(stage, ARMING), hit)
        await asyncio.sleep(0.5)


@fault("worker killed in mid-settle")
async def killed_settling(stage: Stage, hit: Hit) -> None:
    async with stage.session() as conn, conn.transaction():
        await conn.execute("LOCK TABLE notifyq.finished IN SHARE MODE")
        kill(await found(stage, SETTLING), hit)


FORKED = """SELECT l.who FROM notifyq.task t JOIN chaos.ledger l ON l.op = 'W' AND l.id = t.worker
            WHERE t.type = 'Forks' LIMIT 1"""


@fault("worker killed with living children")
async def killed_with_children(stage: Stage, hit: Hit) -> None:
    """The children outlive it by seconds, and have copies of its sockets."""
    await stage.insert("Forks", 4, seconds=8.0)
    member = await found(stage, FORKED)
    await asyncio.sleep(1.0)  # for the children to be there
    kill(member, hit)


@fault("two workers killed")
async def two_killed(stage: Stage, hit: Hit) -> None:
    kill(some(stage), hit)
    kill(some(stage), hit)


@fault("worker frozen for a moment")
async def frozen(stage: Stage, hit: Hit) -> None:
    await freeze(some(stage), stage.random.uniform(0.5, 3.0), hit)


@fault("worker frozen with the turn")
async def frozen_with_turn(stage: Stage, hit: Hit) -> None:
    await freeze(await found(stage, TURN), 2.5, hit)


@fault("worker frozen past its lease")
async def frozen_long(stage: Stage, hit: Hit) -> None:
    """Workers with a lease of 6 s are frozen for longer. A task ends while its worker is frozen, so the worker tries to
    settle it when it goes on."""
    await stage.insert("Slow", 100, seconds=4.0)
    await asyncio.sleep(0.5)
    for row in await stage.sql(BUSIEST):
        member = stage.fleet.named(row[0])
        if member and not member.place.cli:
            return await freeze(member, 9.5, hit)
    raise Missed


async def freeze(member: Member, seconds: float, hit: Hit) -> None:
    hit.who.add(member.who)
    member.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        member.signal(signal.SIGCONT)


@fault("rolling deploy")
async def deploy(stage: Stage, hit: Hit) -> None:
    """Each is told to stop, one after the other; its successor is started when it has."""
    for member in list(stage.fleet.members):
        hit.who.add(member.who)
        member.signal(signal.SIGTERM)
        await asyncio.sleep(0.7)


@fault("stopped, and at once again")
async def forced(stage: Stage, hit: Hit) -> None:
    """The second signal: hand back now."""
    member = some(stage)
    hit.who.add(member.who)
    member.signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    member.signal(signal.SIGTERM)
