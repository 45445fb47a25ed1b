"""One run: a server, workers and enqueuers; rounds of a fault or two, and the quiet after; then the last tasks end."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from notifyq import store
from notifyq.demo.psql import find_psql
from notifyq.embedded import Server

from . import ledger
from .faults import FAULTS, Fault, Hit, Missed
from .fleet import PLACES, PROJECT, Fleet, Place
from .history import Batch, History, Lag, Run, Window
from .producers import WAYS, Producer

PATIENCE = 0.4  # the share of rounds after which all may heal, before the next,
QUIET_SECONDS = 2.5  # and so much longer; in that time nothing may be late
DRAIN_SECONDS = 60.0
SETTINGS = {"track_commit_timestamp": "on", "max_connections": "80", "log_min_messages": "fatal"}


class Stage:
    """What faults act on. A seed makes the schedule; what comes of it is up to the machine, too."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        *,
        faults: list[Fault] = FAULTS,
        places: tuple[Place, ...] = PLACES,
        patience: float = PATIENCE,
        project: Path = PROJECT,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.random = random.Random(seed)
        self.psql = find_psql()
        self.history = History(rows=[], runs=[], batches=[], windows=[], processes=[], lags=[], logs=[], left={})
        self._seed = seed
        self._folder = folder
        self._faults = faults
        self._places = places
        self._patience = patience
        self._project = project
        self._say = say
        self._numbers = itertools.count(1)
        self._producers: list[Producer] = []

    async def run(self, seconds: float) -> History:
        with Server(settings=SETTINGS) as self.server:
            self.dsn = self.server.dsn()
            await self._install()
            self.fleet = Fleet(self.dsn, self._folder, self._role, self._project)
            canary = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.chaos.canary", str(self._folder / "canary"), cwd=PROJECT
            )
            stop = asyncio.Event()
            try:
                async with asyncio.TaskGroup() as group:
                    for place in self._places:
                        group.create_task(self.fleet.keep(place))
                    try:
                        at_work = f"SELECT count(*) >= {len(self._places)} FROM notifyq.worker"
                        assert await self.until(at_work, 30), "the workers didn't start"
                        for number, way in enumerate(WAYS):
                            if way != "psql" or self.psql:
                                seed = f"{self._seed} {number}"
                                producer = Producer(way, seed, self.dsn, self.psql, self._number)
                                self._producers.append(producer)
                                group.create_task(producer.run(stop))
                        await self._rounds(seconds)
                        stop.set()
                        await self.until("SELECT count(*) = 0 FROM notifyq.task WHERE type <> 'Unknown'", DRAIN_SECONDS)
                    finally:
                        stop.set()
                        await self.fleet.close()
            finally:
                canary.kill()
                await canary.wait()
            await self._collect()
        return self.history

    async def _rounds(self, seconds: float) -> None:
        """Each fault once, in any order, then again; every third round two at once, every seventh none."""
        until = time.monotonic() + seconds
        waiting: list[Fault] = []
        await self._calm(0)
        for number in itertools.count(1):
            if time.monotonic() >= until:
                return
            if number % 7 == 0:
                await self._calm(number)
                continue
            chosen: list[Fault] = []
            for _ in range(2 if number % 3 == 0 else 1):
                if not waiting:
                    waiting = list(self._faults)
                    self.random.shuffle(waiting)
                chosen.append(waiting.pop())
            self._say(f"{max(0, until - time.monotonic()):4.0f} s to go: {' + '.join(fault.name for fault in chosen)}")
            delays = [self.random.choice([0.0, 0.0, 0.3, 1.0]) for _ in chosen]
            await asyncio.gather(*[self._inject(number, *pair) for pair in zip(chosen, delays, strict=True)])
            patient = self.random.random() < self._patience
            await asyncio.sleep(max(fault.heal for fault in chosen) + QUIET_SECONDS if patient else 1.0)

    async def _calm(self, number: int) -> None:
        """Nothing is done: what is late here is late by itself."""
        since = time.time()
        await asyncio.sleep(QUIET_SECONDS * min(1.0, self._patience * 4))
        nothing = Window(name="(no fault)", since=since, until=since, who=set(), round=number, heal=0.0)
        self.history.windows.append(nothing)

    async def _inject(self, number: int, fault: Fault, delay: float) -> None:
        await asyncio.sleep(delay)
        hit, since = Hit(), time.time()
        try:
            async with asyncio.timeout(40):
                await fault.act(self, hit)
        except Missed:
            self._say(f"  {fault.name}: nothing to hit")
            return
        except asyncpg.SyntaxOrAccessError:
            raise
        except store.TRANSIENT as error:
            # The other fault of a pair got in its way; it has begun, so it counts as a fault.
            self._say(f"  {fault.name}: cut short, {type(error).__name__}")
        who = None if fault.everybody else hit.who
        self.history.windows.append(
            Window(name=fault.name, since=since, until=time.time(), who=who, round=number, heal=fault.heal)
        )

    # For faults.

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        conn = await asyncpg.connect(self.dsn, timeout=10, server_settings={"application_name": "conductor"})
        try:
            yield conn
        finally:
            conn.terminate()

    async def sql(self, query: str, *args: object) -> list[Any]:
        async with self.session() as conn:
            return list(await conn.fetch(query, *args, timeout=30))

    async def reachable(self, seconds: float = 15) -> None:
        """Wait for the server to take sessions."""
        await self.until("SELECT true", seconds)

    async def until(self, query: str, seconds: float) -> bool:
        """Poll until it says true; False if it never did."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            try:
                if (await self.sql(query))[0][0]:
                    return True
            except store.TRANSIENT:
                pass  # the server is away
            await asyncio.sleep(0.1)
        return False

    def batch(self, by: str, count: int = 1) -> Batch:
        batch = Batch(by=by, numbers=[self._number() for _ in range(count)], at=time.time())
        self.history.batches.append(batch)
        return batch

    async def insert(self, type: str, count: int, queue: str = "default", **payload: Any) -> None:
        batch = self.batch("fault", count)
        await self.sql(
            """INSERT INTO notifyq.task (type, queue, payload)
               SELECT $1, $2, jsonb_set($3::jsonb, '{n}', to_jsonb(n)) FROM unnest($4::bigint[]) AS n""",
            type, queue, json.dumps({"n": 0, **payload}), batch.numbers,
        )  # fmt: skip
        batch.outcome = "committed"

    @asynccontextmanager
    async def open_enqueue(self, by: str) -> AsyncIterator[None]:
        """A transaction that has enqueued three and is open; committed at the end."""
        batch = self.batch(by, 3)
        async with self.session() as conn:
            await conn.execute("BEGIN")
            await conn.execute(
                """INSERT INTO notifyq.task (type, payload)
                   SELECT 'Quick', jsonb_build_object('n', n) FROM unnest($1::bigint[]) AS n""",
                batch.numbers,
            )
            try:
                yield
            finally:
                await conn.execute("COMMIT")
                batch.outcome = "committed"

    # Before and after.

    def _number(self) -> int:
        return next(self._numbers)

    async def _install(self) -> None:
        conn = await store.connect(self.dsn)
        try:
            await conn.execute((self._project / "schema.sql").read_text(encoding="utf-8"))
            await conn.execute(ledger.INSTALL)
        finally:
            conn.terminate()

    async def _role(self, who: str) -> None:
        while True:
            try:
                if not await self.sql("SELECT FROM pg_roles WHERE rolname = $1", who):
                    await self.sql(f"CREATE ROLE {who} LOGIN IN ROLE chaos_worker")
                return
            except store.TRANSIENT:
                await asyncio.sleep(0.2)

    async def _collect(self) -> None:
        history = self.history
        async with self.session() as conn:
            history.rows = await ledger.read(conn)
            history.left = dict(await conn.fetch("SELECT id, type FROM notifyq.task"))
        history.processes = [member.seen for member in self.fleet.all]
        for producer in self._producers:
            history.batches += producer.batches
        read_events(self._folder, history)


def read_events(folder: Path, history: History) -> None:
    """What the worker processes and the canary wrote."""
    canary = folder / "canary"
    if canary.exists():
        history.lags = [msgspec.json.decode(line, type=Lag) for line in canary.read_bytes().splitlines()]
    runs: dict[str, Run] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            event = json.loads(line)
            match event["event"]:
                case "started":
                    runs[event["run"]] = msgspec.convert({**event, "started": event["at"]}, Run)
                case "ended":
                    runs[event["run"]].ended, runs[event["run"]].how = event["at"], event["how"]
                case _:
                    history.logs.append((event["at"], event["who"], event["message"], event["ids"]))
    history.runs = list(runs.values())
