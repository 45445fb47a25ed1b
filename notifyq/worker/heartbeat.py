"""The heartbeat: a thread that keeps a worker's leases, and does the chores of maintenance.py.

The thread has an event loop and a connection of its own, so a handler that blocks the worker's loop for a minute costs
no lease. Every 1.5 s it sends one heartbeat for the whole worker, not one for each task. The answer says which leases
were lost, when the other workers were last seen, and whether there is something that the claimer must look for.

Another worker rescues the tasks of a dead one. A worker is dead if it was silent for 2 s (silence.py) and has no
session left, or if it was silent for the length of its lease. Each of its sessions (for heartbeats, claims, the bell,
outcomes) shares the worker's advisory lock, so a rescuer gets that lock only when all of them are gone. A killed
worker's tasks wait for at most 1.5 + 2 + 1.5 s, since the server ends a killed process's backends within a second.

While the thread has no connection, or no answer on it, the claimer sends the heartbeats. After it has connected again,
the thread rescues nothing for 4 s: after an outage all workers look dead, and the first one to come back would take the
others' tasks.

While a handler has been running for about a second, the thread also listens for cancels, on the same connection. When
it hears of one, it sends a heartbeat at once, whose answer says which leases are lost. It doesn't listen all the time,
since each NOTIFY in the database, those of the bell first, wakes every listener. Any role can send such a notification:
it is only a reason to ask early.

The thread also watches the worker's loop (loop_watch.py). If the loop doesn't answer, the thread ends the backend of
the worker's connection for the bell, whatever that holds. So another worker gets the turn if this one had it. The log
names the handler.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from concurrent.futures import Future

from .. import log
from ..codec import first_line
from ..config import WorkerConfig
from ..database.connection import SQL, Connection, connect_worker, is_pooled, notified_id, prove_alive
from ..database.errors import RULES_FOR_ALL, is_answer, schema_gone, translate
from ..database.reconnect import reconnecting
from ..pause import Pause
from ..registry import Registry
from .claim import Claimer
from .left_out import NOT_HANDED_BACK, LeftOut
from .loop_watch import LoopWatch
from .maintenance import CHORES, COMPARE_IDS, FIND_PROBLEMS, WRITE_PROGRESS, Chore, Upkeep, rescue
from .pipe import Alive
from .runners import Runners
from .silence import GRACE_SECONDS, SilenceWatch

logger = log.logger("notifyq.heartbeat")

BEAT_SECONDS = 1.5
LATE_SECONDS = 2.0  # since the last heartbeat: longer than BEAT_SECONDS and ASK_SECONDS together
ASK_SECONDS = 0.4  # between two questions to the worker's loop
MORE_SECONDS = 0.05  # between two turns of a chore that has more to do
CANCELS = "notifyq_cancel"  # the channel
# A cancel was announced, and the heartbeat that followed found no lost lease: cancels are then ignored for this long.
IGNORE_SECONDS = 1.0
OUT_OF_REACH = "heartbeat: the database is out of reach"
REFUSED = (
    "heartbeat: PostgreSQL refuses it, and other workers take the tasks of one that has none; is a privilege missing, "
    "or is there a constraint, a trigger or row level security on notifyq.worker?"
)


class _GivenUp(Exception):
    """The worker stops, and its last statements failed."""


class Heartbeat:
    """Made, started and stopped on the worker's loop. All methods below `stop` run in the thread."""

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
        self._worker = worker
        self._runners = runners
        self._claimer = claimer
        self._watch = LoopWatch(runners, claimer, worker)
        self._thread = threading.Thread(target=self._run, name="notifyq-heartbeat", daemon=True)
        self._registered: Future[int] = Future()
        self._ended = asyncio.Event()  # on the worker's loop
        self._stop_seconds = 0.0  # how long the thread may take to hand back and unregister
        self._loop: asyncio.AbstractEventLoop | None = None  # the thread's
        # Set in the thread only.
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()  # ends a sleep early
        # Written by the thread; `late` reads the first on the worker's loop, and `compare_ids` writes into the second.
        self._answered_at = -math.inf  # when the last heartbeat was answered; -inf: there is no connection
        self._due: dict[Chore, float] = {}  # when to do each, by time.monotonic()
        # Used by the thread only.
        self._id: int | None = None
        self._upkeep = Upkeep(config, registry, runners)
        self._silence = SilenceWatch()
        self._rescue_from = 0.0  # nothing is rescued before this time
        self._is_locked = False  # the connection shares the worker's advisory lock
        self._is_down = False  # the database is out of reach, or refuses; and that was logged
        self._is_last_try = False
        self._pause = Pause(0.1, 2.0)
        self._cancel_heard = False  # one of a task that may run here
        self._ignore_until = 0.0  # cancels are ignored until then

    async def start(self) -> int:
        """Register the worker and return its id. Raises DatabaseError or SchemaError."""
        self._thread.start()
        return await asyncio.wrap_future(self._registered)

    @property
    def late(self) -> bool:
        """Whether the next heartbeat is overdue: the thread has no connection, or no answer on it."""
        return time.monotonic() - self._answered_at > LATE_SECONDS

    @property
    def loop_was_blocked(self) -> bool:
        return self._watch.was_blocked

    def compare_ids(self) -> None:
        """Check soon whether ids are given out a second time."""
        self._due[COMPARE_IDS] = 0.0

    async def stop(self, seconds: float) -> None:
        """Hand back what is still held, unregister, and end the thread, in `seconds` and one more at most."""
        self._stop_seconds = seconds
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._stop.set)
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                return  # it has ended
        try:
            async with asyncio.timeout(seconds + 1.0):
                await self._ended.wait()
        except TimeoutError:
            logger.debug("the heartbeat's thread didn't end in time")

    # In the thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if not self._registered.done():
                self._registered.set_exception(error)
            else:
                self._watch.call(self._worker.on_failure, error)
        finally:
            self._watch.call(self._ended.set)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await reconnecting(self._connect, self._serve, self._recover)
        except _GivenUp:
            pass

    async def _connect(self) -> Connection:
        return await connect_worker(self._dsn, "heartbeat" if self._id is None else f"heartbeat {self._id}")

    async def _recover(self, error: Exception) -> None:
        """Log that the connection is lost or PostgreSQL refuses, and wait. Raises what another try won't cure."""
        self._is_locked = False
        self._answered_at = -math.inf
        if not self._registered.done():
            if (found := translate(error, "run a worker", rules=RULES_FOR_ALL)) is not None:
                raise found from error
            raise error
        if gone := schema_gone(error):
            raise gone from error
        if self._stop.is_set():
            if not self._is_last_try:
                self._is_last_try = True  # it may have been only this connection
                return
            logger.warning(
                "stopping; PostgreSQL refuses the last statements: others will rescue what was held here"
                if is_answer(error)
                else "stopping without a database: others will rescue what was held here",
                extra={"fields": {"error": first_line(error)}},
            )
            raise _GivenUp
        if not self._is_down:
            self._is_down = True
            self._pause.reset()
            logger.warning(
                REFUSED if is_answer(error) else OUT_OF_REACH, extra={"fields": {"error": first_line(error)}}
            )
        await self._sleep(self._pause.jittered())

    async def _sleep(self, seconds: float) -> None:
        """Sleep for `seconds`, or until something wakes it."""
        try:
            async with asyncio.timeout(0 if self._stop.is_set() else seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _serve(self, conn: Connection) -> None:
        """One session: until the worker stops, or the connection fails."""
        await self._do(conn, FIND_PROBLEMS)
        if self._id is None:
            self._upkeep.clock.start(await conn.fetchval("SELECT clock_timestamp()"))
            await self._register(conn)
        else:
            self._rescue_from = time.monotonic() + GRACE_SECONDS
        now = next_beat = time.monotonic()
        self._due = {chore: now + chore.first() for chore in CHORES}
        listens = False
        while not self._stop.is_set():
            self._watch.ask()
            if self._watch.runs_long != listens and not is_pooled(conn):
                listens = self._watch.runs_long
                await (conn.add_listener if listens else conn.remove_listener)(CANCELS, self._on_cancel)
            now = time.monotonic()
            if now >= next_beat or (self._cancel_heard and now >= self._ignore_until):
                await self._beat(conn)
                next_beat = min(now + random.uniform(0.9, 1.0) * BEAT_SECONDS, self._silence.due)
            more = False
            for chore in CHORES:
                if now >= self._due[chore] and not (chore is WRITE_PROGRESS and not self._runners.slots.reports):
                    self._due[chore] = now + chore.next()
                    if await self._do(conn, chore):
                        self._due[chore] = 0.0
                        more = True
            await self._sleep(MORE_SECONDS if more else ASK_SECONDS)
            if self._watch.is_overdue and not self._stop.is_set():
                await self._outlast_block(conn)
        async with asyncio.timeout(self._stop_seconds):
            await self._leave(conn)

    async def _do(self, conn: Connection, chore: Chore) -> bool:
        return await self._upkeep.attempt(conn, chore.what, chore.run(conn, self._upkeep))

    def _on_cancel(self, _: object, __: int, ___: str, payload: object) -> None:
        if notified_id(payload) in self._watch.ids:
            self._cancel_heard = True
            if time.monotonic() >= self._ignore_until:
                self._wake.set()

    async def _register(self, conn: Connection) -> int:
        types, config = self._registry.types, self._config
        allowed = self._registry.max_attempts
        args = (self._worker.name, list(config.queues), types, allowed, config.concurrency, config.lease_seconds)
        id: int | None = None
        while id is None:  # the statement draws an id, and returns None if another worker has it
            id = await conn.fetchval(SQL["register_worker"], *args)
        self._answered_at = time.monotonic()
        self._is_locked = await prove_alive(conn, id)  # if it fails, the next heartbeat tries again
        await self._upkeep.crons.register(conn, id)
        self._id = self._upkeep.worker = id
        if not self._registered.done():
            self._registered.set_result(id)
        return id

    async def _beat(self, conn: Connection) -> None:
        """Send a heartbeat, and do what follows from its answer."""
        cancel_heard, self._cancel_heard = self._cancel_heard, False  # before it: another may come meanwhile
        if not await self._send(conn) and cancel_heard:
            self._ignore_until = time.monotonic() + IGNORE_SECONDS
        await self._upkeep.attempt(conn, "enqueue what crons are due for", self._upkeep.crons.enqueue_due(conn))

    async def _send(self, conn: Connection) -> bool:
        """Send a heartbeat, and pass its answer on. Returns whether leases were lost."""
        assert self._id is not None
        watch, held = self._watch, self._watch.held
        status = "; ".join(filter(None, (watch.status, *self._upkeep.problems))) or "ok"
        row = await conn.fetchrow(
            SQL["send_heartbeat"], self._id, len(held), status, [job.id for job in held],
            [job.attempt for job in held], list(self._config.queues), self._registry.types, watch.asleep,
        )  # fmt: skip
        assert row is not None
        registered, lost, others, seen, unhandled, suspects, released, bell_wanted = row
        self._answered_at = time.monotonic()
        silent = self._silence.look(others, seen, self._answered_at)
        if self._is_down:
            self._is_down = False
            logger.info("heartbeat: the database is back")
        if not registered:
            await self._register_again(conn)
            watch.call(self._worker.on_leases_lost, held, set[int]())
            watch.call(self._worker.on_new_id, self._id)
            return True
        if not self._is_locked:
            self._is_locked = await prove_alive(conn, self._id)
        if lost:
            ids = set(lost)
            states = await conn.fetch(SQL["read_final_states"], lost)
            cancelled = {id for id, state in states if state == "cancelled"}
            watch.call(self._worker.on_leases_lost, [job for job in held if job.id in ids], cancelled)
        for is_so, tell in (
            (unhandled, self._claimer.look_for_unhandled),
            (suspects, self._claimer.isolate),
            (released, self._claimer.release_waiters),
            (bell_wanted, self._claimer.release_bell),
        ):
            if is_so:
                watch.call(tell)
        if silent and time.monotonic() >= self._rescue_from:
            for one in silent:
                await self._upkeep.attempt(conn, "rescue what a dead worker held", rescue(conn, self._upkeep, one))
        return bool(lost)

    async def _register_again(self, conn: Connection) -> None:
        """This worker was frozen or cut off for too long. Others took it for dead, and have rescued all that it
        held."""
        await conn.execute("SELECT pg_advisory_unlock_all()")
        old, new = self._id, await self._register(conn)
        logger.warning(
            "others took this worker for dead; it goes on under a new id", extra={"fields": {"old": old, "new": new}}
        )

    async def _outlast_block(self, conn: Connection) -> None:
        """The worker's loop is blocked. End its backend at the bell; send heartbeats until the loop answers again."""
        watch, since = self._watch, self._watch.seen_at
        watch.blocked = True
        watch.log_cause()
        if (pid := self._claimer.bell_pid) is not None:
            await conn.fetchval("SELECT pg_terminate_backend($1::integer, 0::bigint)", pid)
        try:
            while watch.seen_at == since:
                logger.debug("the event loop has been blocked for %.1f s", time.monotonic() - since)
                await self._send(conn)
                await self._sleep(BEAT_SECONDS)
                if self._stop.is_set():
                    return
                watch.ask()
        finally:
            watch.note_end()
        logger.info("the event loop answers again", extra={"fields": {"seconds": round(watch.seen_at - since, 1)}})

    async def _leave(self, conn: Connection) -> None:
        """Hand back what is still held, and unregister."""
        id = self._id
        assert id is not None

        async def hand_back(ids: list[int] | None) -> int:
            return int(await conn.fetchval(SQL["hand_back_all"], id, ids))

        if tasks := await LeftOut().take_back(conn, id, hand_back, NOT_HANDED_BACK):
            logger.info("handed back tasks", extra={"fields": {"tasks": tasks}})
        await conn.execute(SQL["unregister_worker"], id)
