"""One run: a server, workers and enqueuers; rounds of a fault or two, and the quiet after; then the last tasks end."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from notifyq.database import errors
from notifyq.embedded import Server

from ..helpers.machine import limit
from . import ledger
from .faults import FAULTS, Fault, Hit, Missed
from .fleet import PLACES, PROJECT, Place
from .history import History, Window, read_events
from .producers import WAYS, Producer
from .stage import Say, Stage

PATIENCE = 0.4  # the share of rounds after which all may heal, before the next,
QUIET_SECONDS = 2.5  # and so much longer; in that time nothing may be late
DRAIN_SECONDS = 60.0
SETTINGS = {"track_commit_timestamp": "on", "max_connections": "80", "log_min_messages": "fatal"}
ENDED = "SELECT count(*) = 0 FROM notifyq.task WHERE type <> 'Unknown'"


async def play(
    seed: int,
    seconds: float,
    folder: Path,
    *,
    faults: Sequence[Fault] = FAULTS,
    places: Sequence[Place] = PLACES,
    patience: float = PATIENCE,
    project: Path = PROJECT,
    say: Say = print,
) -> History:
    """The history of a run whose schedule the seed makes; what comes of it is up to the machine, too."""
    with Server(settings=SETTINGS) as server:
        stage = Stage(server, project, folder, seed, say)
        await stage.install()
        producers = [Producer(way, f"{seed} {i}", stage.dsn, stage.psql, stage.number) for i, way in enumerate(WAYS)]
        stop = asyncio.Event()
        async with _canary(folder / "canary"), asyncio.TaskGroup() as group:
            for place in places:
                group.create_task(stage.fleet.keep(place))
            try:
                at_work = f"SELECT count(*) >= {len(places)} FROM notifyq.worker"
                assert await stage.until(at_work, limit()), "the workers didn't start"
                for producer in producers:
                    group.create_task(producer.run(stop))
                begin = time.time() + 1.5  # a heartbeat
                await _rounds(stage, faults, seconds, patience)
                stop.set()
                stage.history.cron = begin, time.time()
                await stage.until("SELECT notifyq.cron_pause('tick')", limit(DRAIN_SECONDS))
                await stage.until(ENDED, limit(DRAIN_SECONDS))
            finally:
                stop.set()
                await stage.fleet.close()
        await producers[WAYS.index("unique")].each_key()
        history = stage.history
        async with stage.session() as conn:
            history.rows = await ledger.read(conn)
            history.left = dict(await conn.fetch("SELECT id, type FROM notifyq.task"))
    history.processes = [member.seen for member in stage.fleet.all]
    history.batches += [batch for producer in producers for batch in producer.batches]
    read_events(folder, history)
    return history


async def _rounds(stage: Stage, faults: Sequence[Fault], seconds: float, patience: float) -> None:
    """Each fault once, in any order, then again; every third round two at once, every seventh none."""
    until = time.monotonic() + seconds
    waiting: list[Fault] = []
    await _calm(stage, 0)
    for number in itertools.count(1):
        if time.monotonic() >= until:
            return
        if number % 7 == 0:
            await _calm(stage, number)
            continue
        chosen: list[Fault] = []
        for _ in range(2 if number % 3 == 0 else 1):
            if not waiting:
                waiting = list(faults)
                stage.random.shuffle(waiting)
            chosen.append(waiting.pop())
        stage.say(f"{max(0, until - time.monotonic()):4.0f} s to go: {' + '.join(fault.name for fault in chosen)}")
        delays = [stage.random.choice([0.0, 0.0, 0.3, 1.0]) for _ in chosen]
        await asyncio.gather(*[_inject(stage, number, *pair) for pair in zip(chosen, delays, strict=True)])
        patient = stage.random.random() < patience
        await asyncio.sleep(max(fault.heal for fault in chosen) + QUIET_SECONDS if patient else 1.0)


async def _calm(stage: Stage, number: int) -> None:
    """Nothing is done: what is late here is late by itself."""
    since = time.time()
    await asyncio.sleep(QUIET_SECONDS)
    nothing = Window(name="(no fault)", since=since, until=since, who=set(), round=number, heal=0.0)
    stage.history.windows.append(nothing)


async def _inject(stage: Stage, number: int, fault: Fault, delay: float) -> None:
    await asyncio.sleep(delay)
    hit, since = Hit(), time.time()
    try:
        async with asyncio.timeout(limit(40)):
            await fault.act(stage, hit)
    except Missed:
        stage.say(f"  {fault.name}: nothing to hit")
        return
    except asyncpg.SyntaxOrAccessError:
        raise  # a mistake of ours
    except errors.TRANSIENT as error:
        # The other fault of a pair got in its way; it has begun, so it counts as one.
        stage.say(f"  {fault.name}: cut short, {type(error).__name__}")
    who = None if fault.everybody else hit.who
    stage.history.windows.append(
        Window(name=fault.name, since=since, until=time.time(), who=who, round=number, heal=fault.heal)
    )


@asynccontextmanager
async def _canary(path: Path) -> AsyncIterator[None]:
    argv = ["-m", "tests.chaos.canary", str(path)]
    canary = await asyncio.create_subprocess_exec(sys.executable, *argv, cwd=PROJECT)
    try:
        yield
    finally:
        canary.kill()
        await canary.wait()
