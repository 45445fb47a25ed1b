"""Claim: the loop that keeps the runners fed.

decide.py decides what comes next. Here each of its actions is carried out, on two connections: one claims and listens,
the other is at the bell (doorbell.py). capacity.py says for how many tasks to ask, intake.py claims them, and
admission.py says which of them may run.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import assert_never

import anyio

from .. import log
from ..config import WorkerConfig
from ..database.connection import Connection, connect_worker, is_pooled
from ..database.errors import TRANSIENT
from . import decide
from .admission import Admission
from .capacity import Capacity, Free
from .doorbell import BellConnection, fleet_key
from .drain import DRAIN
from .due import DueCheck
from .intake import Intake
from .isolate import Isolation
from .last_check import LastCheck
from .left_out import LeftOut
from .listen import Listener
from .runners import Runners
from .settle import Settler
from .state import Position, State
from .waiting import Waiting

logger = log.logger("notifyq.claim")

LAG_SECONDS = 0.005  # an event loop that wakes up so late has work enough


class Claimer:
    """Feeds the runners. `run` is one session: it connects, and lasts until `stop`, or until a connection fails."""

    def __init__(
        self, dsn: str | None, config: WorkerConfig, types: list[str], runners: Runners, settler: Settler
    ) -> None:
        self._dsn = dsn
        self._config = config
        self._runners = runners
        self._state = state = State(draining=config.drain)
        self._wake = asyncio.Event()
        self._admission = Admission(types, LeftOut())
        self._capacity = Capacity(config, runners.slots, settler)
        self._intake = Intake(self._capacity, self._admission, runners, settler, state, self._wake)
        self._listener = Listener(state, self._wake, config.poll_interval_seconds)
        self._due = DueCheck(self._capacity, self._admission, self._listener, state)
        self._waiting = Waiting(state, self._wake, self._admission.left_out)
        self._isolation = Isolation(self._capacity, self._admission, self._intake, runners, self._waiting, state)
        self._bell = BellConnection(fleet_key(config.queues, types), self._bell_moved)
        self._connections: list[Connection] = []
        self.bell_pid: int | None = None  # of the backend at the bell

    # Called by others on this loop.

    @property
    def stopping(self) -> bool:
        return self._state.stopping

    @property
    def bell_seconds(self) -> float | None:
        return self._listener.bell_seconds

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        if self.bell_seconds is None:
            return "polling only: no NOTIFY arrives here"
        if self._bell.turn_stolen:
            return "the turn at the bell is with a stranger"
        return self._admission.left_out.trouble

    def stop(self) -> None:
        """Claim nothing more; `run` returns."""
        self._state.stopping = True
        self._wake.set()

    def note_slot_released(self) -> None:
        """A slot is free, or outcomes were written."""
        state = self._state
        state.slot_released()
        if state.unhandled_plain and self._capacity.fitting():
            state.thread_released()
        self._wake.set()

    def look_for_unhandled(self) -> None:
        """Other workers have released tasks that this one has a handler for."""
        self._state.notified(unhandled=True)
        self._wake.set()

    def isolate(self) -> None:
        """There are tasks to run isolated, since their workers have vanished."""
        self._state.isolation_wanted = True
        self._wake.set()

    def release_waiters(self) -> None:
        """A task has ended that others may wait for."""
        self._state.release_wanted = True
        self._wake.set()

    def write_heartbeat(self) -> None:
        """The heartbeat's thread can't write the heartbeat at the moment: write one here."""
        self._state.heartbeat_wanted = True
        self._wake.set()

    @property
    def is_asleep(self) -> bool:
        return self.bell_pid is not None and self._bell.position is Position.ASLEEP

    def release_bell(self) -> None:
        """A statement of another session waits for the lock that this sleeping worker holds."""
        if self.is_asleep:
            self._bell.release_share()

    def fail(self, error: BaseException) -> None:
        """End this session with `error`."""
        self._state.failure = self._state.failure or error
        self._wake.set()

    def abort(self) -> None:
        """Cut this session's connections, whatever is under way on them."""
        for connection in self._connections:
            connection.terminate()

    # A session.

    async def run(self, worker: int, ready: Callable[[], None]) -> None:
        """Claim as `worker` until `stop`, or, with --drain, until nothing is left to do. Raises one of
        errors.TRANSIENT, alone or in groups, when it can't."""
        self._state.session_began(self._next_poll())
        self._bell.reset()
        try:
            conn = await connect_worker(self._dsn, f"claims {worker}", worker=worker, relaxed=True)
            self._connections.append(conn)
            if is_pooled(conn):
                self._listener.poll_only()
                await self._due.check(conn, worker, poll=True)
                ready()
                await self._serve(conn, worker)
                return
            bell = None
            if not self._config.drain:
                # By this name end_backends.sql finds it: to end it when its worker is frozen, or has lost `conn`.
                bell = await connect_worker(self._dsn, f"bell {worker}", worker=worker)
                self._connections.append(bell)
                self.bell_pid = bell.get_server_pid()
            for connection in self._connections:
                connection.add_termination_listener(self._cut)
            await self._listener.listen(conn)
            await self._listener.prove(conn)
            await self._due.check(conn, worker, poll=True)
            async with anyio.create_task_group() as group:
                if bell is not None:
                    group.start_soon(self._bell.run, bell, name="notifyq bell")
                ready()
                await self._serve(conn, worker)
                group.cancel_scope.cancel()
        finally:
            self.bell_pid = None
            await self._disconnect()

    async def _disconnect(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._connections.clear)
            for connection in self._connections:
                connection.remove_termination_listener(self._cut)
                stack.callback(connection.terminate)
            if not self.stopping or self._state.failure is not None:
                return
            for connection in self._connections:
                if not connection.is_closed():
                    # A connection that just ends is a line in the server's log. So close it properly, if that is quick.
                    with suppress(*TRANSIENT), anyio.move_on_after(1.0, shield=True):
                        await connection.close()

    def _cut(self, _: object) -> None:
        self.fail(ConnectionError("the server closed the connection"))

    async def _serve(self, conn: Connection, worker: int) -> None:
        clock = asyncio.get_running_loop().time
        state, capacity, admission, bell = self._state, self._capacity, self._admission, self._bell
        table = DRAIN if self._config.drain else decide.TABLE
        last_check = LastCheck(self._config.queues, admission.types, state)
        while not state.stopping:
            self._wake.clear()  # first, so that what happens from here on ends the next wait
            now = clock()
            free = capacity.now(now, admission.paused)
            action = decide.next_action(state, now, free, table)
            if action.bell is not None:
                state.want(action.bell, now)
            bell.want(state.wanted)
            match action:
                case decide.Wait():
                    if action.starts_batches:
                        self._runners.start_batches()
                    await self._waiting.wait(action.until)
                    state.waited(action.then_claims)
                case decide.Claim():
                    await self._claim(conn, worker, action, free)
                case decide.Sleep():
                    await self._sleep(action.seconds, now)
                case decide.CheckDue():
                    await self._check_due(conn, worker, action.poll)
                case decide.Listen():
                    await self._listener.listen(conn)
                case decide.Unlisten():
                    await self._listener.unlisten(conn)
                case decide.ReleaseWaiters():
                    await self._waiting.release_waiters(conn)
                case decide.WriteHeartbeat():
                    await self._waiting.write_heartbeat(conn, worker)
                case decide.Isolate():
                    await self._isolation.run(conn, worker, bell)
                case decide.LastCheck():
                    await last_check.run(conn, worker)
                case decide.Finish():
                    return
                case decide.Fail():
                    raise action.error
                case _:
                    assert_never(action)

    async def _claim(self, conn: Connection, worker: int, action: decide.Claim, free: Free) -> None:
        state = self._state
        state.claim_begins(action.answers)
        count, full = await self._intake.claim(conn, worker, free, from_head=action.from_head)
        state.claimed(
            count,
            asyncio.get_running_loop().time(),
            answers=action.answers,
            without_turn=action.without_turn,
            full=full,
            enough=self._capacity.is_half_used,
        )
        if action.without_turn and count:
            self._bell.suspect_theft()
        if action.answers:
            # The claimed tasks start before the next statement is sent: they come one by one, so their latency counts.
            # Under a backlog the server works on the next claim while they start.
            await asyncio.sleep(0)

    async def _sleep(self, seconds: float, now: float) -> None:
        await asyncio.sleep(seconds)
        woke_up = asyncio.get_running_loop().time()
        self._state.slept(woke_up - now - seconds > LAG_SECONDS, woke_up)

    async def _check_due(self, conn: Connection, worker: int, poll: bool) -> None:
        checked = await self._due.check(conn, worker, poll=poll)
        if checked.sent_echo:
            self._bell.renew_sleep()
        if poll:
            self._state.polled(checked.found, self._next_poll())

    # The bell.

    def _bell_moved(self) -> None:
        bell, now = self._bell, asyncio.get_running_loop().time()
        self._state.bell_moved(bell.position, now)
        self._wake.set()

    def _next_poll(self) -> float:
        """When to poll next: in about the poll interval; never if it is 0. Jittered, lest workers poll in step."""
        seconds = self._config.poll_interval_seconds
        return asyncio.get_running_loop().time() + random.uniform(0.8, 1.2) * seconds if seconds else math.inf
