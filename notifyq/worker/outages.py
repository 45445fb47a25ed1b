"""Stages without a database: how long each waits before it tries again, and what the log says about it.

An outage is logged once when it begins and once when it ends. The waits are jittered and double up to five seconds.
"""

from __future__ import annotations

import asyncio
import math
import time

import anyio

from .. import log
from ..codec import describe, first_line
from ..database.errors import is_answer, schema_gone
from ..errors import first_error
from ..pause import Pause
from .pipe import Host

logger = log.logger("notifyq.worker")

REFUSED_SECONDS = 60.0  # between two lines about the same refusal


class Outages:
    """The outages of one worker. A stage awaits `back_off` after each failure, and calls `note_success` when it works
    again."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._down: set[str] = set()  # stages without a connection
        self._pauses: dict[str, Pause] = {}  # by stage
        self._refused: dict[str, tuple[float, str]] = {}  # stages whose statements PostgreSQL refuses: when, and why
        self._stopping = asyncio.Event()

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        return "PostgreSQL refuses what this worker needs: see its log" if self._refused else ""

    def shorten_waits(self) -> None:
        """The worker stops: no stage waits for longer than 0.1 s from now on."""
        self._stopping.set()

    async def back_off(self, stage: str, error: BaseException) -> None:
        """Log the failure, once, and return when the stage may try again. A dropped schema ends the worker."""
        error = first_error(error)
        if gone := schema_gone(error):
            self._host.on_failure(gone)
            return
        if self._host.loop_was_blocked:
            # The log says already that it is blocked. If the database is lost too, a later failure is logged.
            logger.debug("a statement failed as the event loop was blocked", extra={"fields": {"stage": stage}})
        elif is_answer(error):
            self._log_refusal(stage, error)
        elif stage not in self._down:
            self._down.add(stage)
            if not self._host.is_stopping:
                logger.warning(
                    "lost the database, trying again",
                    extra={"fields": {"stage": stage, "error": describe(error)}},
                )
        pause = self._pauses.setdefault(stage, Pause(0.1, 5.0))
        if self._stopping.is_set():  # the time to stop is bounded, and there is nothing more to claim
            await asyncio.sleep(min(0.1, pause.lengthen()))
            return
        with anyio.move_on_after(pause.jittered()):
            await self._stopping.wait()

    def note_success(self, stage: str) -> None:
        if stage in self._refused:
            if time.monotonic() - self._refused[stage][0] < REFUSED_SECONDS:
                return  # each new session begins well, so its success proves nothing for a while
            del self._refused[stage]
        self._pauses.pop(stage, None)
        if stage in self._down:
            self._down.discard(stage)
            logger.info("the database is back", extra={"fields": {"stage": stage}})

    def _log_refusal(self, stage: str, error: BaseException) -> None:
        """The database is reachable and refuses a statement."""
        hint = getattr(error, "hint", None)  # the cure, as PostgreSQL knows it
        why = f"{first_line(error)} ({hint})" if hint else first_line(error)
        now = time.monotonic()
        logged_at, before = self._refused.get(stage, (-math.inf, ""))
        if why != before or now - logged_at > REFUSED_SECONDS:
            logged_at = now
            logger.error(
                "PostgreSQL refuses what this worker needs, trying again; is there a constraint, a trigger, a "
                "publication or row level security on a table of notifyq?",
                extra={"fields": {"stage": stage, "error": why}},
            )
        self._refused[stage] = logged_at, why
