"""A clock that can be moved. The clock that counts is the database's, and nobody can move that: so the rows are moved.

What is scheduled in an hour runs now, if all of it was an hour ago. Nothing is mocked, and what looks at a time in the
database sees a later one: timers, backoff, the age of history. Python's clock isn't moved, nor is what runs just now.
"""

from __future__ import annotations

import math

from notifyq.config import is_number
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError

from .source import Source, connection


async def advance(source: Source, seconds: float) -> int:
    """Make it `seconds` later, for every task that isn't running; return how many became due by it.

    source  a connected app, a connection, or a DSN

    They aren't run by it: `drain` does that, or a worker, which wakes. Raises ConfigError for what isn't a time.
    """
    if not (is_number(seconds) and math.isfinite(seconds) and seconds >= 0):
        raise ConfigError(f"advance got {seconds!r}; expected seconds, 0 or more: what was can't be made to come")
    async with connection(source) as conn:
        due: int = await conn.fetchval(SQL["advance_clock"], float(seconds))
    return due
