"""The keeper: a worker's sign of life, what it hears about its leases, and the rescue of what dead workers held.

It has a thread, an event loop and a connection of its own, so a handler that blocks the worker's loop for a minute
costs no lease. Every 1.5 s it writes one heartbeat for the whole worker (not one a task) and learns in the same
statement which leases were lost, which workers went silent, and whether tasks of its types were set aside.

A worker is dead when it wasn't seen for 2 s and none of its sessions is left, or when it wasn't seen for the length of
its lease. "Not seen" means that the time of its heartbeat stays the same, by the rescuer's own clock, whatever that
time is. Each of its sessions (of the keeper, the claims, the door and the settler) shares the worker's advisory lock,
so a rescuer is granted that lock only when all of them are gone. While the keeper has no connection, the claimer writes
the heartbeat. 1.5 + 2 + at most 1.5 s is the time a killed worker's tasks wait: the server ends the backends of a
killed process within a second. A keeper that lost its own connection gives others 4 s: after an outage they all look
dead, and the first one back would rob them.

While a handler has been running for a second, it listens for cancels too, on this same connection, and comes to see
at once which leases are gone. Not always: each NOTIFY in the database, those of the bell first, wakes whoever listens.
What it hears is only a reason to look early, since any role can say it.

What handlers tell of their progress it writes too, once a second at most, in one statement, when there is any.

It also watches its own worker: if the loop doesn't answer for a second while the worker has the turn at the bell,
it ends that backend, the turn goes to somebody else, and the log names the handler.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from .. import log
from ..codec import NOTE_LENGTH, first_line, storable
from ..config import WorkerConfig
from ..database import schema
from ..database.connection import (
    SQL,
    TRANSIENT,
    Connection,
    connect_worker,
    is_answer,
    is_pooled,
    is_refusal,
    notified_id,
    prove_alive,
)
from ..errors import DatabaseError
from ..registry import Registry
from .claim import Claimer
from .crons import Schedule
from .job import Job
from .left_out import NOT_HANDED_BACK, NOT_TAKEN_BACK, LeftOut
from .pipe import Alive
from .runners import Runners

logger = log.logger("notifyq.lease")

TICK_SECONDS = 1.5
SILENT_SECONDS = 2.0  # without a heartbeat, until it is asked whether a session is left: rescue.sql has it too
LATE_SECONDS = 2.0  # since the last heartbeat: longer than a tick and a pulse
PULSE_SECONDS = 0.4
CANCELS = "notifyq_cancel"
LONG_SECONDS = 0.8  # as seen at two pulses: something is running for long
REPORT_SECONDS = 1.0  # between writes of progress
DEAF_SECONDS = 1.0  # from a look for a cancel that wasn't to the next
BLOCKED_SECONDS = 0.8
OTHERS_COMPUTE = 0.1  # of the time, at least: the machine may be busy with other processes too
AFTERMATH_SECONDS = 2.0  # after the loop was blocked: what it missed shows
RESCUE_AT_ONCE = 2000
PRUNE_SECONDS = 60.0
PRUNE_AT_ONCE = 5000
PRUNED_SECONDS = 0.5  # of one such statement: fewer at once where rows are large
OUT_OF_REACH = "heartbeat: the database is out of reach"
REFUSED = (
    "heartbeat: PostgreSQL refuses it, and other workers take the tasks of one that has none; is a privilege missing, "
    "or is there a constraint, a trigger or row level security on notifyq.worker?"
)
MOST = object()  # where the statement takes how many rows at most
DEAD_KEPT_SECONDS = 30 * 86400.0
ORPHANS_SECONDS = 60.0
LOOK_SECONDS = 60.0
STEP_SECONDS = 60.0  # two clocks that are so far apart were not set at the same time
STIR_SECONDS = 15.0
IDS_SECONDS = 60.0  # between looks at whether ids are given a second time
ENDED = (asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.PostgresConnectionError)  # the session is over
GRACE_SECONDS = 4.0  # after an outage, for the others to come back too: longer than the longest back-off


class Unseen:
    """How long other workers' heartbeats haven't changed, by this process's own clock. Pure: it is told times.

    Not by the server's clock, which may be stepped. What this worker didn't watch, as it was frozen or cut off itself,
    it can't judge: it begins anew.
    """

    def __init__(self) -> None:
        self._since: dict[int, tuple[float, float]] = {}  # of each worker: its last heartbeat; since when we see that
        self._looked = -math.inf
        self.due = math.inf  # when somebody that doesn't look well will have been unseen for long enough

    def look(self, workers: Sequence[int], seen: Sequence[float], now: float) -> list[tuple[int, float, float]]:
        """Those that are silent: their ids, last heartbeats, and for how long. `now` is a time of time.monotonic()."""
        known = self._since if now - self._looked <= GRACE_SECONDS else {}
        self._looked = now
        self._since = {}
        self.due = math.inf
        silent: list[tuple[int, float, float]] = []
        for worker, at in zip(workers, seen, strict=True):
            before, since = known.get(worker, (math.nan, now))
            if before != at:
                since = now
            self._since[worker] = at, since
            if now - since >= SILENT_SECONDS:
                silent.append((worker, at, now - since))
            elif now > since:
                self.due = min(self.due, since + SILENT_SECONDS)
        silent.sort(key=lambda worker: -worker[2])
        return silent


class Keeper:
    """Made and told on the worker's loop; `_main` runs in the thread. What crosses is marked below."""

    def __init__(
        self,
        dsn: str | None,
        config: WorkerConfig,
        registry: Registry,
        worker: Alive,
        runners: Runners,
        claimer: Claimer,
    ) -> None:
        self._dsn = dsn
        self._config = config
        self._registry = registry
        self._runners = runners
        self._schedule = Schedule(registry.crons)
        self._worker = worker
        self._claimer = claimer
        self._home = asyncio.get_running_loop()  # the worker's
        self._registered: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, name="notifyq-keeper", daemon=True)
        self._stop: asyncio.Event | None = None
        self._called = asyncio.Event()  # in the thread: end a sleep early
        self._loop: asyncio.AbstractEventLoop | None = None
        self._release_seconds = 0.0
        self._ended = asyncio.Event()
        # Written by the worker's loop, read by the thread; each assignment is whole.
        self._held: list[Job] = []
        self._ids: frozenset[int | None] = frozenset()  # of these
        self._since: dict[Job, float] = {}  # of these, when each was first seen here
        self._long = False
        self._pulse = time.monotonic()
        self._status = "ok"
        self._cpu = (0.0, 0.0)  # seconds that the process, and the loop's thread, had used at the last pulse
        cpu_clock = getattr(time, "pthread_getcpuclockid", None)
        self._home_clock: int | None = cpu_clock(threading.get_ident()) if cpu_clock else None
        # Written by the thread, read by the worker's loop.
        self._asked = 0.0  # for a pulse
        self._blocked = False
        self._blocked_until = -math.inf
        self._sleeps = False  # its door does
        # Written by the thread.
        self._id: int | None = None
        self._locked = False
        self._down = False
        self._heard = False  # of a cancel that may be ours
        self._deaf_until = 0.0
        self._unseen = Unseen()
        self._rescue_from = 0.0
        self._wait = 0.1
        self._stirred = ""
        self._clock_then, self._clock_read = (
            datetime.max.replace(tzinfo=UTC),
            0.0,
        )  # the server's clock, at that time of ours
        self._stepped = False  # it went ahead since, and that was said
        self._findings: dict[
            str, tuple[str, str]
        ] = {}  # what is wrong with the database: about what, problem, and cure
        self._failing: dict[str, str] = {}  # chores that the database refuses, and its reason
        self._beaten = -math.inf
        self._compare_ids_at = 0.0  # written by the worker's loop too
        self._rescued_at_once = RESCUE_AT_ONCE  # fewer, where a row takes long
        self._left_out = LeftOut()  # of those that are to be taken back from workers that are gone
        self._pruned_at_once: dict[str, int] = {}  # by statement
        self._behind = ""  # the cure, if ids are given a second time

    # On the worker's loop.

    async def start(self) -> int:
        """Register the worker and return its id. Raises DatabaseError or SchemaError."""
        self._thread.start()
        return await asyncio.wrap_future(self._registered)

    @property
    def late(self) -> bool:
        """Whether the next heartbeat is overdue: the keeper has no connection, or no answer on it."""
        return time.monotonic() - self._beaten > LATE_SECONDS

    def compare_ids(self) -> None:
        """Look soon whether ids are given a second time."""
        self._compare_ids_at = 0.0

    async def stop(self, seconds: float) -> None:
        """Hand back what is still held, unregister, and end; in `seconds` at most."""
        self._release_seconds = seconds
        if self._loop is not None and self._stop is not None:
            try:
                self._loop.call_soon_threadsafe(self._stop.set)
                self._loop.call_soon_threadsafe(self._called.set)
            except RuntimeError:
                return  # it has ended
        try:
            async with asyncio.timeout(seconds + 1.0):
                await self._ended.wait()
        except TimeoutError:
            logger.debug("the keeper didn't end in time")

    @property
    def loop_was_blocked(self) -> bool:
        """Whether what fails now may fail because the loop didn't run: a statement whose answer it didn't read in time,
        or the door's connection, which this has ended."""
        now = time.monotonic()
        if self._blocked or now < self._blocked_until + AFTERMATH_SECONDS:
            return True
        return self._pulse < self._asked < now - BLOCKED_SECONDS

    def _take_pulse(self) -> None:
        self._held = held = [*self._runners.held.values()]
        self._ids = frozenset(job.id for job in held)
        now = time.monotonic()
        self._since = {job: self._since.get(job, now) for job in held}
        self._long = bool(held) and min(self._since.values()) <= now - LONG_SECONDS
        self._status = "; ".join(filter(None, (self._worker.trouble, self._behind))) or "ok"
        self._sleeps = self._claimer.asleep
        now = time.monotonic()
        if self._pulse < self._asked < now - BLOCKED_SECONDS:
            self._blocked_until = now
        self._pulse = now
        self._cpu = time.process_time(), time.thread_time()

    # In the thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if not self._registered.done():
                self._registered.set_exception(error)
            else:
                self._tell(self._worker.on_failure, error)
        finally:
            self._tell(self._ended.set)

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._home.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # the worker's loop is closed: nobody is left to tell

    def _ask_pulse(self) -> None:
        if self._asked <= self._pulse:  # the last time was answered
            self._asked = time.monotonic()
        self._tell(self._take_pulse)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        conn: Connection | None = None
        last_try = False
        while True:
            try:
                conn = await connect_worker(self._dsn, "keeper" if self._id is None else f"keeper {self._id}")
                await self._serve(conn, self._stop)
                return
            except TRANSIENT as error:
                if not self._registered.done():
                    raise _explained(error) from error
                if gone := schema.gone(error):
                    raise gone from error
                if self._stop.is_set():
                    if last_try:
                        logger.warning(
                            "stopping; PostgreSQL refuses the last statements: others will rescue what was held here"
                            if is_refusal(error)
                            else "stopping without a database: others will rescue what was held here",
                            extra={"fields": {"error": first_line(error)}},
                        )
                        return
                    last_try = True
                    continue  # it may have been only this connection
                if not self._down:
                    self._down = True
                    self._wait = 0.1
                    logger.warning(
                        REFUSED if is_answer(error) else OUT_OF_REACH, extra={"fields": {"error": first_line(error)}}
                    )
            finally:
                self._locked = False
                self._beaten = -math.inf
                if conn is not None:
                    conn.terminate()
                    conn = None
            await self._sleep(random.uniform(0.5, 1.0) * self._wait)
            self._wait = min(2.0, self._wait * 2)

    async def _sleep(self, seconds: float) -> bool:
        """Until then, or until it is called; True if it is to stop."""
        assert self._stop is not None
        try:
            async with asyncio.timeout(0 if self._stop.is_set() else seconds):
                await self._called.wait()
        except TimeoutError:
            pass
        self._called.clear()
        return self._stop.is_set()

    def _on_cancel(self, _: object, __: int, ___: str, payload: object) -> None:
        if notified_id(payload) in self._ids:
            self._heard = True
            if time.monotonic() >= self._deaf_until:
                self._called.set()

    async def _serve(self, conn: Connection, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        await self._chore(conn, "look for what is wrong with the database", self._look(conn))
        next_look = loop.time() + random.uniform(0.5, 1.5) * LOOK_SECONDS
        if self._id is None:
            self._clock_then, self._clock_read = await conn.fetchval("SELECT clock_timestamp()"), time.monotonic()
            self._id = await self._register(conn)
            self._registered.set_result(self._id)
        else:
            self._rescue_from = loop.time() + GRACE_SECONDS
        listens = False
        next_tick = next_report = loop.time()
        next_prune = loop.time() + random.uniform(0.2, 1.0) * PRUNE_SECONDS
        next_orphans = loop.time() + random.uniform(0.2, 1.0) * ORPHANS_SECONDS
        next_stir = loop.time() + random.uniform(0.2, 1.0) * STIR_SECONDS
        while not stop.is_set():
            self._ask_pulse()
            now = loop.time()
            if self._long is not listens and not is_pooled(conn):
                listens = self._long
                await (conn.add_listener if listens else conn.remove_listener)(CANCELS, self._on_cancel)
            if now >= next_tick or (self._heard and time.monotonic() >= self._deaf_until):
                heard, self._heard = self._heard, False  # before it: another may come meanwhile
                if not await self._tick(conn) and heard:
                    self._deaf_until = time.monotonic() + DEAF_SECONDS
                await self._chore(conn, "enqueue what crons are due for", self._schedule.look(conn))
                next_tick = min(now + random.uniform(0.9, 1.0) * TICK_SECONDS, self._unseen.due)
            if self._runners.reports and now >= next_report:
                next_report = now + REPORT_SECONDS
                await self._chore(conn, "write progress", self._report(conn))
            if now >= next_prune:
                next_prune = now + random.uniform(0.5, 1.5) * PRUNE_SECONDS
                await self._prune(conn)
            if now >= next_look:
                next_look = now + random.uniform(0.5, 1.5) * LOOK_SECONDS
                await self._chore(conn, "look for what is wrong with the database", self._look(conn))
            if now >= self._compare_ids_at:
                self._compare_ids_at = now + random.uniform(0.5, 1.5) * IDS_SECONDS
                await self._chore(conn, "compare ids", self._compare_ids(conn))
            if now >= next_orphans:
                next_orphans = now + random.uniform(0.5, 1.5) * ORPHANS_SECONDS
                await self._chore(conn, "take back tasks of workers that are gone", self._take_orphans(conn))
            if now >= next_stir:
                next_stir = now + random.uniform(0.5, 1.5) * STIR_SECONDS
                await self._chore(conn, "look again at keys where tasks wait", self._stir(conn))
            if await self._sleep(PULSE_SECONDS):
                break
            await self._watch(conn)
        async with asyncio.timeout(self._release_seconds):
            id = self._id

            async def release(ids: list[int] | None) -> int:
                return int(await conn.fetchval(SQL["hand_back_all"], id, ids))

            if back := await LeftOut().take_back(conn, id, release, NOT_HANDED_BACK):
                logger.info("handed back tasks", extra={"fields": {"tasks": back}})
            await conn.execute(SQL["unregister_worker"], self._id)

    async def _register(self, conn: Connection) -> int:
        types, config = self._registry.types, self._config
        allowed = self._registry.max_attempts
        args = (self._worker.name, list(config.queues), types, allowed, config.concurrency, config.lease_seconds)
        id: int | None = None
        while id is None:
            id = await conn.fetchval(SQL["register_worker"], *args)
        self._beaten = time.monotonic()
        await self._lock(conn, id)
        await self._schedule.begin(conn, id)
        return id

    async def _lock(self, conn: Connection, id: int) -> None:
        self._locked = await prove_alive(conn, id)  # if not, the next tick tries again

    async def _tick(self, conn: Connection) -> bool:
        """One heartbeat; whether leases were lost."""
        assert self._id is not None
        held, status = self._held, self._all_status()
        row = await conn.fetchrow(
            SQL["send_heartbeat"], self._id, len(held), status, [job.id for job in held], [job.attempt for job in held],
            list(self._config.queues), self._registry.types, self._sleeps,
        )  # fmt: skip
        assert row is not None
        registered, lost, others, seen, aside, suspects, freed, wanted = row
        self._beaten = time.monotonic()
        silent = self._unseen.look(others, seen, self._beaten)
        if not registered:
            # Frozen for too long, or cut off: others have rescued everything. Come back as somebody new.
            await conn.execute("SELECT pg_advisory_unlock_all()")
            old, self._id = self._id, await self._register(conn)
            logger.warning(
                "this worker had been given up for dead; it comes back under a new id",
                extra={"fields": {"old": old, "new": self._id}},
            )
            self._tell(self._worker.on_leases_lost, held, set[int]())
            self._tell(self._worker.on_new_id, self._id)
        if self._down:
            self._down = False
            logger.info("heartbeat: the database is back")
        if not registered:
            return True
        if not self._locked:
            await self._lock(conn, self._id)
        if lost:
            gone = set(lost)
            cancelled = {id for id, state in await conn.fetch(SQL["read_final_states"], lost) if state == "cancelled"}
            self._tell(self._worker.on_leases_lost, [job for job in held if job.id in gone], cancelled)
        if aside:
            self._tell(self._claimer.look_aside)
        if suspects:
            self._tell(self._claimer.isolate)
        if freed:
            self._tell(self._claimer.let_in)
        if wanted:
            self._tell(self._claimer.let_go)
        if silent and asyncio.get_running_loop().time() >= self._rescue_from:
            for worker in silent:
                await self._chore(conn, "rescue what a dead worker held", self._rescue(conn, *worker))
        return bool(lost)

    def _all_status(self) -> str:
        """The worker's own, and what is wrong with the database, of which `notifyq stats` tells more."""
        own = () if self._status == "ok" and self._findings else (self._status,)
        return "; ".join((*own, *self._findings))

    async def _report(self, conn: Connection) -> None:
        reports = {job: p for job, p in self._runners.take_reports().items() if job.worker == self._id}
        keys = [job.id for job in reports], [job.attempt for job in reports]
        fractions = [p.fraction for p in reports.values()]
        notes = [None if p.note is None else storable(p.note[:NOTE_LENGTH]) for p in reports.values()]
        try:
            rows = await conn.fetch(SQL["write_progress"], self._id, *keys, fractions, notes)
        except asyncpg.DataError:  # the database's encoding lacks a character of a note's
            notes = [None if note is None else note.encode("ascii", "backslashreplace").decode() for note in notes]
            rows = await conn.fetch(SQL["write_progress"], self._id, *keys, fractions, notes)
        written = {row[0] for row in rows}
        for job, progress in reports.items():
            if job.id not in written:  # somebody has its row locked, or it isn't ours any more
                self._runners.unwritten(job, progress)

    async def _rescue(self, conn: Connection, worker: int, seen: float, unseen: float) -> None:
        async def rescue(ids: list[int] | None) -> int:
            return await self._rescue_these(conn, worker, seen, unseen, ids)

        await self._left_out.take_back(conn, worker, rescue, NOT_TAKEN_BACK)

    async def _rescue_these(
        self, conn: Connection, worker: int, seen: float, unseen: float, ids: list[int] | None
    ) -> int:
        """Rescue these of the worker's tasks, or all of them. Returns how many."""
        rescued = 0
        while True:
            most = self._rescued_at_once
            try:
                row = await conn.fetchrow(SQL["rescue"], worker, most, seen, unseen, ids)
            except TimeoutError:  # a row of these takes too long: those before it are rescued all the same
                self._rescued_at_once = max(1, most // 2)
                raise
            self._rescued_at_once = min(RESCUE_AT_ONCE, most * 2)
            assert row is not None
            name, ready, dead = row
            if name is None:  # silent, but alive by its lock: frozen, or far away
                try:
                    evicted: int = await conn.fetchval(SQL["end_backends"], worker, ["door"], 0)
                except asyncpg.InsufficientPrivilegeError:
                    return rescued
                if evicted:
                    logger.warning(
                        "took the turn from a worker that doesn't answer",
                        extra={"fields": {"worker": worker}},
                    )
                return rescued
            if not ready and not dead:
                return rescued
            rescued += ready + dead
            logger.warning(
                "rescued the tasks of a dead worker",
                extra={"fields": {"worker": name, "ready_again": ready, "dead": dead}},
            )

    async def _chore(self, conn: Connection, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`. A statement of it that the database refuses is logged once, and keeps neither the heartbeat nor
        the other chores from being done."""
        try:
            await work
        except asyncpg.PostgresError as error:
            if isinstance(error, ENDED) or conn.is_closed() or schema.gone(error):
                raise
            if what not in self._failing:
                self._failing[what] = first_line(error)
                logger.warning(
                    "the database refuses a chore; it is tried again, and everything else goes on",
                    extra={"fields": {"chore": what, "error": first_line(error)}},
                )
        else:
            if self._failing.pop(what, None) is not None:
                logger.info("the database accepts the chore again", extra={"fields": {"chore": what}})

    async def _look(self, conn: Connection) -> None:
        """Say what is wrong with the database and raises no error: once when it is found, and once when it is over."""
        found = {about: (problem, cure) for about, problem, cure in await conn.fetch(SQL["list_findings"], False)}
        for about, (problem, cure) in found.items():
            if about not in self._findings:
                logger.warning("%s. Cure: %s", problem, cure, extra={"fields": {"about": about}})
        for about in self._findings.keys() - found.keys():
            logger.info("mended: %s", about, extra={"fields": {"about": about}})
        self._findings = found
        if self._id is not None:
            await self._schedule.compare(conn, self._id)

    async def _compare_ids(self, conn: Connection) -> None:
        """Are ids given that tasks have, or had? That is so after TRUNCATE ... RESTART IDENTITY, or where a sequence
        wasn't brought along to another server."""
        row = await conn.fetchrow(SQL["read_highest_ids"])
        assert row is not None
        highest, last = row
        was, self._behind = self._behind, ""
        if highest > last:
            cure = f"SELECT setval('notifyq.task_id_seq', {highest})"
            self._behind = f"ids are given a second time; run: {cure}"
            await conn.execute(SQL["forget_keys_of_future_ids"])
            if not was:
                logger.warning(
                    "ids are given to new tasks that older ones have had: the sequence is behind what the tables hold; "
                    "where an outcome is written, the older task's gives way. Run: %s",
                    cure,
                    extra={"fields": {"last": last, "highest": highest, "cure": cure}},
                )
        elif was:
            logger.info("new tasks are given ids of their own again")

    async def _take_orphans(self, conn: Connection) -> None:
        if orphans := await self._left_out.take_orphans(conn):
            logger.warning("took back tasks of workers that are gone", extra={"fields": {"tasks": orphans}})

    async def _stir(self, conn: Connection) -> None:
        self._stirred = await conn.fetchval(SQL["recheck_waiting"], self._stirred) or ""

    async def _prune(self, conn: Connection) -> None:
        """Each table by itself."""
        now = self._time_at_most(await conn.fetchval("SELECT clock_timestamp()"))
        for table, statement, args in (
            ("finished", "prune_finished", (self._config.history_seconds, DEAD_KEPT_SECONDS, MOST, now)),
            ("rate_log", "prune_rate_log", (MOST,)),
            ("unique_key", "prune_unique_keys", (MOST,)),
        ):
            await self._chore(conn, f"prune notifyq.{table}", self._prune_all(conn, statement, args))
        for queue in self._config.queues:
            await self._chore(conn, "find what a clock that was set back keeps waiting", self._set_back(conn, queue))

    async def _set_back(self, conn: Connection, queue: str) -> None:
        found = await conn.fetchrow(SQL["list_misdated"], queue)
        if found is not None and any(found) and (changed := await conn.fetchval(SQL["correct_misdated"], *found)):
            logger.warning(
                "the server's clock was set back: tasks waited for times that were reckoned while it was ahead",
                extra={"fields": {"queue": queue, "tasks": changed}},
            )

    def _time_at_most(self, said: datetime) -> datetime:
        """What the server's clock said when this worker started, and the time since by its own: a step of the server's
        clock ahead makes nothing old. A step back is believed, as then nothing is forgotten too early."""
        trusted = self._clock_then + timedelta(seconds=time.monotonic() - self._clock_read)
        step = (said - trusted).total_seconds()
        if step < -STEP_SECONDS:
            self._clock_then, self._clock_read = said, time.monotonic()
            logger.warning("the server's clock was set back by %.0f s", -step)
            trusted = said
        elif step > STEP_SECONDS and not self._stepped:
            logger.warning(
                "the server's clock went ahead by %.0f s: history is pruned by the time that passed here, until this "
                "worker is restarted", step,
            )  # fmt: skip
        self._stepped = step > STEP_SECONDS
        return trusted + timedelta(seconds=STEP_SECONDS)

    async def _prune_all(self, conn: Connection, statement: str, args: tuple[object, ...]) -> None:
        assert self._stop is not None
        while True:
            # As many rows as take half a second or so: what is large takes long to delete.
            most = self._pruned_at_once.get(statement, PRUNE_AT_ONCE)
            begin = time.monotonic()
            try:
                pruned = await conn.fetchval(SQL[statement], *(most if arg is MOST else arg for arg in args))
            finally:
                took = time.monotonic() - begin
                if took > 2 * PRUNED_SECONDS:
                    self._pruned_at_once[statement] = max(1, most // 2)
                elif took < PRUNED_SECONDS:
                    self._pruned_at_once[statement] = min(PRUNE_AT_ONCE, most * 2)
            if pruned < most or self._stop.is_set() or await self._sleep(0.05):
                return
            self._ask_pulse()

    def _others_compute(self) -> bool:
        """Whether other threads have used most of this process's time since the last pulse. The loop's task is then
        one that waits for the interpreter's lock, wherever it is."""
        process, loop = self._cpu
        if (clock := self._home_clock) is None:
            return False
        process, loop = time.process_time() - process, time.clock_gettime(clock) - loop
        return process > OTHERS_COMPUTE * (time.monotonic() - self._pulse) and process > 3 * loop

    async def _watch(self, conn: Connection) -> None:
        """Is the worker's loop alive? If not, and it has the turn: end the door's backend."""
        if time.monotonic() - self._pulse < BLOCKED_SECONDS:
            return
        since = self._pulse
        self._blocked = True
        who = self._runners.whose(asyncio.current_task(self._home))
        computing = self._runners.computing
        if computing and (who is None or self._others_compute()):
            logger.warning(
                "the event loop gets no time: plain handlers compute in threads, which share one lock (the GIL); run"
                " fewer at once (--threads), and more processes (--processes)",
                extra={"fields": {"handlers": computing[:20]}},
            )
        else:
            logger.warning(
                "the event loop is blocked: a handler waits or computes without `await`;"
                " a wait can move to a plain def, which runs in a thread, and a computation to a process",
                extra={"fields": {"handler": who or "unknown"}},
            )
        if (pid := self._claimer.door_pid) is not None:
            await conn.fetchval("SELECT pg_terminate_backend($1::integer, 0::bigint)", pid)
        try:
            while self._pulse == since:
                now = time.monotonic()
                await self._tick(conn)
                if await self._sleep(TICK_SECONDS):
                    return
                self._ask_pulse()
                logger.debug("the event loop is still blocked after %.1f s", now - since)
        finally:
            self._blocked_until = time.monotonic()
            self._blocked = False
        logger.info("the event loop answers again", extra={"fields": {"seconds": round(self._pulse - since, 1)}})


def _explained(error: BaseException) -> BaseException:
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return DatabaseError(f"this user may not work here: {error}; schema.sql ends with the GRANTs a worker needs")
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return DatabaseError("this server is read-only (a standby?); a worker needs the primary")
    if isinstance(error, asyncpg.PostgresError):
        return DatabaseError(f"the database refused: {error}")
    return error
