"""Listen: hear the bell on the connection that claims, and prove that it is heard.

Behind a pooler in transaction mode LISTEN succeeds and nothing is ever delivered. So a worker notifies itself: once
before it starts, which shows whether NOTIFY arrives here, and from then on with a due check, at least every
10 s (an echo).

The listening connection is the one that claims, not the one at the bell: a backend delivers notifications only between
statements, so one that waits for a lock would hear the bell too late.
"""

from __future__ import annotations

import asyncio
import time
import uuid

import anyio

from .. import log
from ..database.connection import Connection
from .doorbell import CHANNEL
from .state import ECHO_LIMIT_SECONDS, State

logger = log.logger("notifyq.claim")


class Listener:
    """Hears the bell for a claimer, and notes in its State what it hears."""

    def __init__(self, state: State, wake: asyncio.Event, poll_seconds: float) -> None:
        self._state = state
        self._wake = wake
        self._poll_seconds = poll_seconds
        self._echoed = asyncio.Event()
        self._silent = False  # the last echo wasn't heard
        self.bell_seconds: float | None = None  # the round trip that proved the bell; None: polling only

    async def listen(self, conn: Connection) -> None:
        await conn.add_listener(CHANNEL, self._hear)
        self._state.listens()

    async def unlisten(self, conn: Connection) -> None:
        await conn.remove_listener(CHANNEL, self._hear)
        self._state.unlistened()

    def new_echo(self, now: float) -> str:
        """The payload of a new echo. The State expects from now on to hear it."""
        text = f"echo {uuid.uuid4()}"
        self._echoed.clear()
        self._state.echo.sent(text, now)
        return text

    async def prove(self, conn: Connection) -> None:
        """Send an echo and wait until it is heard. If it is, turn echoes on; else, poll only."""
        clock = time.perf_counter  # finer than a loop's time, which uvloop keeps in milliseconds
        sent = clock()
        echo = self.new_echo(asyncio.get_running_loop().time())
        await conn.execute("SELECT notifyq.notify_unless_full('notifyq', $1)", echo)
        was_proven = self.bell_seconds is not None
        with anyio.move_on_after(ECHO_LIMIT_SECONDS) as late:
            await self._echoed.wait()
        self._state.echo.text = ""
        self._silent = late.cancelled_caught
        if self._silent:
            self.poll_only()
        else:
            self._set_bell_seconds(seconds := clock() - sent)
            if not was_proven:
                logger.debug("the bell is proven", extra={"fields": {"seconds": round(seconds, 4)}})

    def poll_only(self) -> None:
        """No notification arrives here: say so, and go without echoes."""
        self._set_bell_seconds(None)
        logger.warning(
            "the bell is silent: LISTEN gets no NOTIFY here (a pooler in transaction mode, or the queue of"
            " notifications is full?); polling only",
            extra={"fields": {"poll_interval": self._poll_seconds}},
        )

    def _set_bell_seconds(self, seconds: float | None) -> None:
        self.bell_seconds = seconds
        self._state.echo.on = seconds is not None

    def _hear(self, _conn: object, _pid: int, _channel: str, payload: object) -> None:
        state = self._state
        if self._silent:
            self._silent = False
            self._set_bell_seconds(ECHO_LIMIT_SECONDS)  # it took at least that; echoes are on again
            logger.info("the bell rings again")
        if payload == "":
            state.notified()
        elif payload == "unhandled":
            state.notified(unhandled=True)
        elif payload == "queues":
            state.notified(settings=True)
        elif payload == state.echo.text:
            state.echo.text = ""
            self._echoed.set()
            return
        else:
            return  # another worker's echo
        self._wake.set()
