"""Cron: what is enqueued by the clock, when its next slot comes, and how a worker sees to it.

Slots are reckoned by cronsim, in the time zone of the schedule, from one slot to the next. When the clocks are changed
its rules are those of Debian's cron: of a schedule with fixed hours and minutes, what falls into the hour that is left
out runs once, right after it, and what falls into the hour that comes twice runs once, the first time. Schedules with a
* in one of the two, or with a field for seconds, go on in real time.

Who looks when, and why each slot has one task, schema.sql tells ("Cron"). What time it is, the database says.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from .errors import ConfigError

Missed: TypeAlias = Literal["once", "skip"]


class Cron(NamedTuple):
    """One schedule, as its row of notifyq.cron has it."""

    name: str
    expression: str
    tz: str
    type: str = ""
    payload: str = ""
    queue: str = "default"
    priority: int = 0
    missed: Missed = "once"
    options: str | None = None  # JSON


def check_schedule(expression: str, tz: str) -> None:
    """Raises ConfigError for what has no slots."""
    zone = _zone(tz)
    try:
        next(CronSim(expression, datetime.now(zone)))
    except (CronSimError, StopIteration, AttributeError, TypeError) as error:
        why = f": {error}" if isinstance(error, CronSimError) else ""
        raise ConfigError(
            f"{expression!r} is no cron expression{why}; expected five fields, minute hour day month weekday, "
            "as '0 3 * * *'"
        ) from None


def next_slot(expression: str, tz: str, after: datetime) -> datetime:
    """The first slot after that time, in UTC. Raises CronSimError, ValueError or OverflowError where there is none."""
    # In the hour that comes twice, cronsim takes the second time for the first, whose slots are over.
    for slot in CronSim(expression, after.astimezone(_zone(tz))):
        if (found := slot.astimezone(UTC)) > after:
            return found
    raise ValueError("it has no slot in the next fifty years")


def _zone(tz: str) -> tzinfo:
    if tz == "UTC":  # the default, which needs no data: slim images and Windows have none
        return UTC
    try:
        return ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):  # OSError: a folder of the package tzdata
        raise ConfigError(
            f"tz is {tz!r}, which isn't known here; expected a name such as 'Europe/Berlin' (on systems without time "
            "zones: pip install tzdata)"
        ) from None
