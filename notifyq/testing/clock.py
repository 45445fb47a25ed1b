"""Let time pass for the tasks of a test. The database's clock can't be moved, so the times in its rows are moved back.

If all times are moved back by an hour, a task that is due in an hour is due now. Nothing is mocked. Timers, backoff and
the age of history are read from the database, so they see the move. Python's clock and running tasks don't.
"""

from __future__ import annotations

import math

from notifyq.client.clock import Move
from notifyq.config import is_number
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError

from .source import Source, connection


async def advance(source: Source, seconds: float) -> int:
    """Let `seconds` pass for every task that isn't running, and return how many tasks became due.

    source  a connected app, a connection, or a DSN

    It runs no task: `drain` does, or a running worker, which is woken. Raises ConfigError for seconds below 0 or not
    finite.
    """
    if not (is_number(seconds) and math.isfinite(seconds) and seconds >= 0):
        raise ConfigError(f"advance got {seconds!r}; expected seconds, 0 or more: time can't be moved back")
    async with connection(source) as conn:
        move = Move(seconds)  # for the Refs that the test holds, of which one may be waited for meanwhile
        due: int = await conn.fetchval(SQL["advance_clock"], float(seconds))
        move.made_at = await conn.fetchval("SELECT clock_timestamp()")
    return due
