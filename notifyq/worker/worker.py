"""A worker: it starts the stages, lets tasks flow through them, and stops them in order.

    claim ──jobs──▶ runners ──outcomes──▶ settle        the heartbeat, in a thread of its own, keeps the leases

To stop: claim nothing more; hand back what hasn't begun; let handlers finish until the deadline; cancel the others and
hand their tasks back; write every outcome; unregister. Each step is bounded, with or without a database.

A stage that loses its connection makes a new one by itself: see outages.py. Any other failure of a stage is a bug, and
ends the worker visibly.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence

import anyio
import msgspec
from anyio.abc import TaskStatus

from .. import forked, log
from ..config import WorkerConfig
from ..database import schema
from ..database.connection import SQL, connect, connect_worker, server_version
from ..database.errors import TRANSIENT
from ..errors import first_error
from ..lifespan import within
from ..registry import Registry
from .claim import Claimer
from .heartbeat import Heartbeat
from .job import Job
from .large_payloads import LargePayloads
from .left_out import NOT_RECLAIMED, LeftOut
from .outages import Outages
from .outcome import HandedBack
from .predecessors import Predecessors
from .runners import CANCEL_SECONDS, Runners
from .services import Services
from .settle import Settler
from .transaction import Transactions
from .unreachable import log_unreachable

logger = log.logger("notifyq.worker")

STAND_IN_SECONDS = 0.4  # between two checks whether the heartbeat is late
CLAIM_SECONDS = 2.0  # how long a stopping worker waits for the answer to its last claim
WRITE_SECONDS = 3.0  # how long it then writes outcomes, and how long it then takes to unregister
END_MS = 2000  # how long to wait for the backend of a lost connection to end


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says about itself when it has started."""

    id: int
    name: str  # host:pid
    server_version: str  # such as "18.6"
    schema_version: int
    queues: dict[str, int | None]  # name -> limit
    concurrency: int
    threads: int  # how many plain handlers may run at the same time
    types: list[str]
    bell_ms: float | None  # the round trip that proved LISTEN and NOTIFY; None: polling only


class Worker:
    """One worker, good for one `run`. pipe.py says which of its methods each stage calls."""

    def __init__(self, registry: Registry, config: WorkerConfig, dsn: str | None) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._registry = registry
        self._config = config
        self._dsn = dsn
        self._id = 0
        self._fatal: BaseException | None = None
        self._write_seconds = WRITE_SECONDS
        self.wrote_all = True  # False once it has stopped with outcomes that could not be written
        self._ready = asyncio.Event()  # connected, and about to claim
        self._claimed_all = asyncio.Event()  # the claiming stage has ended: drained, stopped, or failed
        self._changed = asyncio.Event()  # one of the conditions that `run` waits for may be true now
        keeps_history = config.history_seconds > 0
        self.outages = Outages(self)
        self._settler = Settler(dsn, keeps_history, self, self.outages)
        self.settle = self._settler.put  # called for each task: a method of our own would cost a call more
        self._services = Services(
            Transactions(dsn, keeps_history, self), Predecessors(dsn), LargePayloads(dsn, self.outages)
        )
        self._runners = Runners(registry, config.concurrency, config.most_threads, self, self._services)
        self._claimer = Claimer(dsn, config, registry.types, self._runners, self._settler)
        self._heartbeat = Heartbeat(dsn, config, registry, self, self._runners, self._claimer)

    async def run(
        self,
        *,
        stop: anyio.Event,
        force: anyio.Event,
        task_status: TaskStatus[WorkerInfo] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Work until `stop` is set (then let handlers finish) or `force` is (then cancel them), or until all is
        drained.

        Raises DatabaseError or SchemaError if it can't start. Cancelled, it hands everything back, quickly.
        """
        server, schema_version = await self._check_database()
        try:
            self._id = await self._heartbeat.start()
            self._settler.work_as(self._id)
            log_unreachable(self._registry, self._config)
            async with anyio.create_task_group() as group:
                group.start_soon(self._runners.run, name="notifyq run")
                group.start_soon(self._settler.run, name="notifyq settle")
                group.start_soon(self._claim, name="notifyq claim")
                group.start_soon(self._stand_in, name="notifyq stand in")
                group.start_soon(self._watch, force, name="notifyq force")
                group.start_soon(self._watch, stop, name="notifyq stop")
                await self._first(self._ready, self._claimed_all, stop, force)
                task_status.started(self._info(server, schema_version))
                await self._first(stop, force, self._claimed_all)
                await self._stop(force)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()
        if self._fatal is not None:
            raise self._fatal
        logger.info("worker stopped", extra={"fields": {"id": self._id}})

    async def _check_database(self) -> tuple[str, int]:
        """The versions of the server and of the schema. Raises DatabaseError or SchemaError."""
        conn = await connect(self._dsn, role="worker")
        try:
            schema_version = await schema.check(conn)
            return await server_version(conn), schema_version
        finally:
            conn.terminate()

    def _info(self, server: str, schema_version: int) -> WorkerInfo:
        bell = self._claimer.bell_seconds
        return WorkerInfo(
            id=self._id,
            name=self.name,
            server_version=server,
            schema_version=schema_version,
            queues=self._config.queues,
            concurrency=self._config.concurrency,
            threads=self._config.most_threads,
            types=self._registry.types,
            bell_ms=None if bell is None else bell * 1000,
        )

    # To stop, in order.

    async def _stop(self, force: anyio.Event) -> None:
        await self._stop_claiming()
        self._runners.hand_back_waiting()
        if self._runners.held and self._fatal is None:
            await self._let_handlers_finish(force)
        if self._runners.held:
            await self._cancel_handlers()
        self._runners.close()
        self._settler.hurry()
        with anyio.move_on_after(self._write_seconds) as late:
            while self._settler.pending:
                await self._change()
        if late.cancelled_caught:
            self._write_seconds = 0.0

    async def _stop_claiming(self) -> None:
        self._claimer.stop()
        self.outages.shorten_waits()
        with anyio.move_on_after(CLAIM_SECONDS) as late:
            await self._claimed_all.wait()
        if late.cancelled_caught:
            self._claimer.abort()  # a claim has no answer; the heartbeat hands back what it may have taken

    async def _let_handlers_finish(self, force: anyio.Event) -> None:
        seconds = self._config.shutdown_timeout_seconds
        logger.info(
            "stopping: letting handlers finish",
            extra={"fields": {"running": len(self._runners.held), "seconds": seconds}},
        )
        with anyio.move_on_after(seconds):
            while self._runners.held and not force.is_set():
                await self._change()

    async def _cancel_handlers(self) -> None:
        logger.warning(
            "stopping now: cancelling handlers and handing their tasks back",
            extra={"fields": {"running": len(self._runners.held)}},
        )
        self._runners.hand_back_running()
        with anyio.move_on_after(CANCEL_SECONDS):
            while self._runners.held:
                await self._change()

    async def _close(self) -> None:
        """Write what is left, and unregister. If `run` was cancelled, nothing was stopped, and jobs may be held."""
        self._claimer.stop()
        await self._services.close()
        for job in self._runners.leases:
            self._settler.put(HandedBack(job))
        self._settler.finish()
        if self._settler.pending:  # the settler's own task has ended
            with anyio.move_on_after(self._write_seconds):
                await self._settler.run()
        if left := self._settler.leases:
            self.wrote_all = False
            logger.warning(
                "stopped with outcomes that could not be written: their tasks will run again",
                extra={"fields": {"tasks": len(left)}},
            )
        await self._heartbeat.stop(WRITE_SECONDS)

    # The claiming stage, session after session.

    async def _claim(self) -> None:
        is_first = True
        try:
            while not self._claimed_all.is_set():
                try:
                    if not is_first:
                        await self._reclaim_unanswered()
                    is_first = False
                    await self._claimer.run(self._id, self._note_ready)
                    break  # it was stopped, or has drained
                except* TRANSIENT as group:
                    await self.outages.back_off("claim", group)
                if self._claimer.stopping:
                    break
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self._claimed_all.set()
            self.on_slot_released()

    def _note_ready(self) -> None:
        self.outages.note_success("claim")
        self._ready.set()
        self._changed.set()

    async def _reclaim_unanswered(self) -> None:
        """Make ready again what a claim took whose answer was lost with its connection."""
        conn = await connect_worker(self._dsn, "reclaim")
        try:
            args = self._id, ["claims", "bell"], END_MS
            if await conn.fetchval(SQL["end_backends"], *args, column=1):
                raise TimeoutError("the backend of the lost connection is still there")
            known = [job for job in (*self._runners.leases, *self._settler.leases) if job.worker == self._id]
            leases = [job.id for job in known], [job.attempt for job in known]
            worker = self._id

            async def reclaim(ids: list[int] | None) -> int:
                return int(await conn.fetchval(SQL["reclaim_unanswered"], worker, *leases, ids))

            if reclaimed := await LeftOut().take_back(conn, worker, reclaim, NOT_RECLAIMED):
                logger.warning("took back tasks whose claim went unanswered", extra={"fields": {"tasks": reclaimed}})
        finally:
            conn.terminate()

    async def _stand_in(self) -> None:
        """While the heartbeat's connection is lost, or gives no answer, the claimer sends the heartbeats."""
        while True:
            await asyncio.sleep(STAND_IN_SECONDS)
            if self._heartbeat.late:
                self._claimer.write_heartbeat()

    # What the stages tell: see pipe.py.

    def on_slot_released(self) -> None:
        self._claimer.note_slot_released()
        self._changed.set()

    def on_released(self) -> None:
        self._claimer.release_waiters()

    def on_ids_reused(self) -> None:
        self._heartbeat.compare_ids()

    def on_leases_lost(self, jobs: list[Job], cancelled: set[int]) -> None:
        # Compare jobs, not ids. A job that was held when the heartbeat was sent may have ended by the time of its
        # answer, and its task may be held again: as the same attempt too, if it was cancelled and retried.
        lost = [job.id for job in jobs if self._runners.cancel_lost(job)]
        if was_cancelled := [id for id in lost if id in cancelled]:
            fields = {"ids": was_cancelled[:20], "tasks": len(was_cancelled)}
            logger.info("cancelled while it ran: its handler is cancelled", extra={"fields": fields})
        if lost := [id for id in lost if id not in cancelled]:
            logger.warning(
                "lease lost: cancelled its handler", extra={"fields": {"ids": lost[:20], "tasks": len(lost)}}
            )

    def on_new_id(self, id: int) -> None:
        self._id = id
        self._settler.work_as(id)
        self._claimer.fail(ConnectionResetError("others took this worker for dead; it has a new id"))

    def on_failure(self, error: BaseException) -> None:
        self._fatal = error
        self._claimer.stop()
        self._claimer.fail(error if isinstance(error, TRANSIENT) else ConnectionError(str(error)))

    @property
    def is_stopping(self) -> bool:
        return self._claimer.stopping

    @property
    def loop_was_blocked(self) -> bool:
        return self._heartbeat.loop_was_blocked

    @property
    def trouble(self) -> str:
        stages = (self.outages, self._claimer, self._runners, self._settler)
        return "; ".join(filter(None, (stage.trouble for stage in stages)))

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
) -> bool:
    """Run a worker inside of its app's lifespan. Returns whether all outcomes are written."""
    wrote_all = True

    async def run(given: Sequence[object] | None) -> None:
        nonlocal wrote_all
        log.enable()  # the app, or its lifespan, may have set up logging
        worker = Worker(registry.bound(given), config, dsn)
        await worker.run(stop=stop, force=force, task_status=task_status)
        wrote_all = worker.wrote_all

    with forked.signals_are_ours():
        await within(registry.lifespan, run)
    return wrote_all
