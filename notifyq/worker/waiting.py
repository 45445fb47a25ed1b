"""Waiting, and what a claimer goes on doing on its connection while it waits for something else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import anyio
import asyncpg

from ..database.connection import SQL, Connection
from ..database.errors import is_refusal
from .left_out import LeftOut
from .state import State


class Waiting:
    """Waits for one claimer, which may wait for a task, or for running tasks to end."""

    def __init__(self, state: State, wake: asyncio.Event, left_out: LeftOut) -> None:
        self._state = state
        self._wake = wake
        self._left_out = left_out

    async def write_heartbeat(self, conn: Connection, worker: int) -> None:
        """Send the heartbeat, since the heartbeat's thread can't at the moment."""
        self._state.heartbeat_wanted = False
        try:
            await conn.execute(SQL["send_heartbeat_only"], worker)
        except asyncpg.PostgresError as error:
            if not is_refusal(error):  # the heartbeat's thread, whose heartbeat is refused too, logs that
                raise

    async def release_waiters(self, conn: Connection) -> int:
        """Make ready the tasks that waited for ended ones. Returns how many. The bell may wake another
        worker for them."""
        self._state.release_wanted = False  # before the statement: more tasks may end meanwhile
        ready = 0
        with anyio.CancelScope(shield=True):
            ready = await self._left_out.release_waiters(conn)
        self._state.claim_wanted |= ready > 0
        return ready

    async def wait_until(self, conn: Connection, worker: int, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until `done()` is true, for `seconds` at most, and claim nothing meanwhile. Returns whether it is
        true."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while not self._state.stopping and self._state.failure is None:
            self._wake.clear()
            if self._state.heartbeat_wanted:
                await self.write_heartbeat(conn, worker)
            if self._state.release_wanted:
                await self.release_waiters(conn)
            if done():
                return True
            if clock() >= until:
                break
            await self.wait(until)
        return False

    async def wait(self, until: float) -> None:
        """Wait until something happens, or until that time of the event loop."""
        if until == math.inf:
            await self._wake.wait()
            return
        timer = asyncio.get_running_loop().call_at(until, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
