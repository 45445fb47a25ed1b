"""A worker: starts the stages, lets work flow through them, stops them in order.

    claim ──jobs──▶ run ──outcomes──▶ settle           lease, in a thread of its own, keeps it all alive

Stopping: claim nothing more; hand back at once what hasn't begun; let handlers end until the deadline; cancel the
rest and hand it back; write every outcome; unregister. Each step is bounded, with or without a database.

A stage that loses its connection comes back by itself, with jittered backoff; that is said once when it begins
and once when it ends. Any other failure of a stage is a bug, and takes the worker down visibly.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio.abc import TaskStatus

from .. import forked, log
from ..codec import describe, first_line
from ..config import WorkerConfig
from ..database import schema
from ..database.connection import SQL, TRANSIENT, connect, connect_worker, is_answer, server_version
from ..errors import first_error
from ..lifespan import within
from .batch import tell_clipped
from .claim import Claimer
from .heartbeat import Keeper
from .job import Job
from .large_payloads import LargePayloads
from .left_out import STRAY, LeftOut
from .outcome import HandedBack
from .predecessors import Reader
from .runners import CANCEL_SECONDS, Runners
from .settle import Settler
from .transaction import Transactions

if TYPE_CHECKING:
    from ..registry import Registry

logger = log.logger("notifyq.worker")

STAND_IN_SECONDS = 0.4  # between looks at whether the keeper is late
REFUSED_SECONDS = 60.0  # between two lines about the same refusal
END_MS = 2000  # how long a backend may take to end, when its connection is lost
CLAIM_SECONDS = 2.0  # at the end, for the last claim's answer
WRITE_SECONDS = 3.0  # at the end, for outcomes and good-byes


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells when it has started."""

    id: int
    name: str  # host:pid
    server_version: str  # such as "18.6"
    schema_version: int
    queues: dict[str, int | None]  # name -> limit
    concurrency: int
    threads: int  # how many of these may be plain handlers
    types: list[str]
    bell_ms: float | None  # the round trip that proved LISTEN and NOTIFY; None: polling only


class Worker:
    """One worker, good for one `run`."""

    def __init__(self, registry: Registry, config: WorkerConfig, dsn: str | None) -> None:
        self._registry = registry
        self._config = config
        self._dsn = dsn
        self._id = 0
        self._down: set[str] = set()  # stages without a database
        self._waits: dict[str, float] = {}
        self._refused: dict[str, tuple[float, str]] = {}  # stages whose statements PostgreSQL refuses: when, and why
        self._fatal: BaseException | None = None
        self._keeper: Keeper | None = None
        self._write_seconds = WRITE_SECONDS
        self._over = asyncio.Event()  # claiming has ended: drained, stopped, or failed
        self._working = asyncio.Event()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._transactions = Transactions(dsn, config.history_seconds > 0, self._let_in)
        self._reader = Reader(dsn)
        self._large = LargePayloads(dsn, self._back_off, self._well)
        self._settler = Settler(dsn, config.history_seconds > 0, self._freed, self._let_in, self._ids_reused)
        self._runners = Runners(
            registry,
            config.concurrency,
            config.most_threads,
            self._settler.put,
            self._freed,
            self._transactions,
            self._reader.results,
            self._large,
        )
        self._claimer = Claimer(dsn, config, registry.types, self._runners)
        self._claimer.unsettled = lambda: self._settler.pending
        self._claimer.full = lambda: self._settler.full
        self._claimer.hand_back = lambda job: self._settler.put(HandedBack(job))

    async def run(
        self,
        *,
        stop: anyio.Event,
        force: anyio.Event,
        task_status: TaskStatus[WorkerInfo] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Work until `stop` is set (then drain) or `force` (then not even that), or all is drained.

        Raises DatabaseError or SchemaError if it can't start. Cancelled, it hands everything back, quickly.
        """
        conn = await connect(self._dsn, role="worker")
        try:
            version = await schema.check(conn)
            server = await server_version(conn)
        finally:
            conn.terminate()
        name = f"{socket.gethostname()}:{os.getpid()}"
        keeper = self._keeper = Keeper(
            self._dsn, name, self._config, self._registry, self._runners,
            on_lost=self._lost,
            on_aside=self._claimer.look_aside,
            on_suspects=self._claimer.isolate,
            on_freed=self._claimer.let_in,
            on_new_id=self._reborn,
            on_failure=self._die,
            on_wanted=self._claimer.let_go,
            door_pid=lambda: self._claimer.door_pid,
            asleep=lambda: self._claimer.asleep,
            trouble=self._trouble,
        )  # fmt: skip
        try:
            self._id = await keeper.start()
            self._settler.work_as(self._id)
            tell_clipped(self._registry, self._config.concurrency)
            async with anyio.create_task_group() as group:
                group.start_soon(self._runners.run, name="notifyq run")
                group.start_soon(self._settler.run, self._back_off, self._well, name="notifyq settle")
                group.start_soon(self._claim, name="notifyq claim")
                group.start_soon(self._stand_in, keeper, name="notifyq stand in")
                group.start_soon(self._watch, force, name="notifyq force")
                group.start_soon(self._watch, stop, name="notifyq stop")
                await self._first(self._working, self._over, stop, force)
                bell = self._claimer.bell_seconds
                task_status.started(
                    WorkerInfo(
                        id=self._id,
                        name=name,
                        server_version=server,
                        schema_version=version,
                        queues=self._config.queues,
                        concurrency=self._config.concurrency,
                        threads=self._config.most_threads,
                        types=self._registry.types,
                        bell_ms=None if bell is None else bell * 1000,
                    )
                )
                await self._first(stop, force, self._over)
                await self._stop(force)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                # Cancelled from outside, the group has ended with outcomes unwritten and jobs held.
                self._claimer.stop()
                await self._transactions.close()
                self._reader.close()
                self._large.close()
                for job in self._runners.leases:
                    self._settler.put(HandedBack(job))
                await self._write()
                await keeper.stop(WRITE_SECONDS)
        if self._fatal is not None:
            raise self._fatal
        logger.info("worker stopped", extra={"fields": {"id": self._id}})

    async def _stop(self, force: anyio.Event) -> None:
        runners, deadline = self._runners, self._config.shutdown_timeout_seconds
        self._claimer.stop()
        self._stopping.set()
        with anyio.move_on_after(CLAIM_SECONDS) as late:
            await self._over.wait()
        if late.cancelled_caught:
            self._claimer.abort()  # a claim isn't answered; what it may have taken is handed back in the end
        runners.hand_back_waiting()
        if runners.held and self._fatal is None:
            logger.info(
                "stopping: letting handlers finish",
                extra={"fields": {"running": len(runners.held), "seconds": deadline}},
            )
            with anyio.move_on_after(deadline):
                while runners.held and not force.is_set():
                    await self._change()
        if runners.held:
            logger.warning(
                "stopping now: cancelling handlers and handing their tasks back",
                extra={"fields": {"running": len(runners.held)}},
            )
            runners.hand_back_running()
            with anyio.move_on_after(CANCEL_SECONDS):
                while runners.held:
                    await self._change()
        runners.close()
        self._settler.hurry()
        with anyio.move_on_after(self._write_seconds) as late:
            while self._settler.pending:
                await self._change()
        if late.cancelled_caught:
            self._write_seconds = 0.0

    async def _write(self) -> None:
        """What the settler's own task could not write any more."""
        self._settler.finish()
        if self._settler.pending:
            with anyio.move_on_after(self._write_seconds):
                await self._settler.run(self._back_off, self._well)
        if left := self._settler.pending + self._settler.put_off:
            logger.warning(
                "stopped with outcomes that could not be written: their tasks will run again",
                extra={"fields": {"tasks": left}},
            )

    # The claiming stage, session after session.

    async def _claim(self) -> None:
        again = False
        try:
            while not self._over.is_set():
                try:
                    if again:
                        await self._find_strays()
                    again = True
                    await self._claimer.run(self._id, self._claiming)
                    break  # it was stopped, or has drained
                except* TRANSIENT as group:
                    await self._back_off("claim", group)
                if self._claimer.stopping:
                    break
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self._over.set()
            self._freed()

    async def _find_strays(self) -> None:
        """The connection for claims was lost: what it may have claimed, without our hearing of it, is nobody's."""
        conn = await connect_worker(self._dsn, "strays")
        try:
            args = self._id, ["claims", "door"], END_MS
            if await conn.fetchval(SQL["end_backends"], *args, column=1):
                raise TimeoutError("the backend of the lost connection is still there")
            known = [job for job in (*self._runners.leases, *self._settler.leases) if job.worker == self._id]
            leases = [job.id for job in known], [job.attempt for job in known]
            worker = self._id

            async def take_back(ids: list[int] | None) -> int:
                return int(await conn.fetchval(SQL["reclaim_unanswered"], worker, *leases, ids))

            if strays := await LeftOut().take_back(conn, worker, take_back, STRAY):
                logger.warning("took back tasks whose claim went unanswered", extra={"fields": {"tasks": strays}})
        finally:
            conn.terminate()

    def _claiming(self) -> None:
        self._well("claim")
        self._working.set()
        self._changed.set()

    async def _stand_in(self, keeper: Keeper) -> None:
        """While the keeper's connection is lost, or says nothing, the claimer writes the heartbeats."""
        while True:
            await asyncio.sleep(STAND_IN_SECONDS)
            if keeper.late:
                self._claimer.beat()

    # What the stages tell.

    def _freed(self) -> None:
        self._claimer.freed()
        self._changed.set()

    def _let_in(self) -> None:
        self._claimer.let_in()

    def _ids_reused(self) -> None:
        if self._keeper is not None:
            self._keeper.compare_ids()

    def _trouble(self) -> str:
        refused = "PostgreSQL refuses what this worker needs: see its log" if self._refused else ""
        return "; ".join(filter(None, (refused, self._claimer.trouble, self._runners.trouble, self._settler.trouble)))

    def _lost(self, jobs: list[Job], cancelled: set[int]) -> None:
        # These very jobs: what was held when the heartbeat left may have ended, and be held again when it answers,
        # as the same attempt too if it was cancelled and retried.
        lost = [job.id for job in jobs if self._runners.lost(job)]
        if by_people := [id for id in lost if id in cancelled]:
            fields = {"ids": by_people[:20], "tasks": len(by_people)}
            logger.info("cancelled while it ran: its handler is cancelled", extra={"fields": fields})
        if lost := [id for id in lost if id not in cancelled]:
            logger.warning(
                "lease lost: cancelled its handler", extra={"fields": {"ids": lost[:20], "tasks": len(lost)}}
            )

    def _reborn(self, id: int) -> None:
        self._id = id
        self._settler.work_as(id)
        self._claimer.fail(ConnectionResetError("given up for dead, back under a new id"))

    def _die(self, error: BaseException) -> None:
        self._fatal = error
        self._claimer.stop()
        self._claimer.fail(error if isinstance(error, TRANSIENT) else ConnectionError(str(error)))

    # Trouble with the database.

    async def _back_off(self, stage: str, error: BaseException) -> None:
        error = first_error(error)
        if gone := schema.gone(error):
            self._die(gone)
            return
        if self._keeper is not None and self._keeper.loop_was_blocked:
            # That has been said. If the database is lost too, the next try is late enough to tell.
            logger.debug("a statement failed as the event loop was blocked", extra={"fields": {"stage": stage}})
        elif is_answer(error):
            self._tell_refused(stage, error)
        elif stage not in self._down:
            self._down.add(stage)
            if not self._claimer.stopping:
                logger.warning(
                    "lost the database, trying again",
                    extra={"fields": {"stage": stage, "error": describe(error)}},
                )
        wait = self._waits[stage] = min(5.0, self._waits.get(stage, 0.05) * 2)
        if self._stopping.is_set():  # no time to be patient, and nothing more to claim
            await asyncio.sleep(min(0.1, wait))
            return
        with anyio.move_on_after(random.uniform(0.5, 1.0) * wait):
            await self._stopping.wait()

    def _tell_refused(self, stage: str, error: BaseException) -> None:
        """The database is there. A new session begins well each time, so its success says nothing for a while."""
        hint = getattr(error, "hint", None)  # the cure, as PostgreSQL knows it
        why = f"{first_line(error)} ({hint})" if hint else first_line(error)
        now = time.monotonic()
        said, before = self._refused.get(stage, (-math.inf, ""))
        if why != before or now - said > REFUSED_SECONDS:
            said = now
            logger.error(
                "PostgreSQL refuses what this worker needs, trying again; is there a constraint, a trigger, a "
                "publication or row level security on a table of notifyq?",
                extra={"fields": {"stage": stage, "error": why}},
            )
        self._refused[stage] = said, why

    def _well(self, stage: str) -> None:
        if stage in self._refused:
            if time.monotonic() - self._refused[stage][0] < REFUSED_SECONDS:
                return
            del self._refused[stage]
        self._waits.pop(stage, None)
        if stage in self._down:
            self._down.discard(stage)
            logger.info("the database is back", extra={"fields": {"stage": stage}})

    # Waiting.

    async def _watch(self, event: anyio.Event) -> None:
        await event.wait()
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _first(self, *events: anyio.Event | asyncio.Event) -> None:
        while not any(event.is_set() for event in events):
            await self._change()


async def work(
    registry: Registry,
    config: WorkerConfig,
    dsn: str | None,
    stop: anyio.Event,
    force: anyio.Event,
    task_status: TaskStatus[WorkerInfo],
) -> None:
    """Run a worker inside of its app's lifespan."""

    async def run(given: Sequence[object] | None) -> None:
        log.enable()  # the app, or its lifespan, may have set up logging
        await Worker(registry.bound(given), config, dsn).run(stop=stop, force=force, task_status=task_status)

    with forked.signals_are_ours():
        await within(registry.lifespan, run)
