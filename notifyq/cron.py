"""Crons: tasks that are enqueued by the clock, and when the next slot of a schedule comes.

cronsim computes the slots in the time zone of the schedule, each from the one before. When the clocks change it follows
Debian's cron. In a schedule with fixed hours and minutes, a slot in the skipped hour runs once, right after that hour,
and a slot in the repeated hour runs once, the first time. A schedule with a * for hours or minutes, or with a field
for seconds, goes on in real time.

The chapter "Cron" of schema.sql says which worker enqueues a slot, and why each slot has one task. The time is the
database's.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import Final, Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from .errors import ConfigError

NICKNAMES: Final = {  # of other crons
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
Missed: TypeAlias = Literal["once", "skip"]


class Cron(NamedTuple):
    """One schedule and the task of its slots: a row of notifyq.cron."""

    name: str
    expression: str
    tz: str
    type: str = ""
    payload: str = ""
    queue: str = "default"
    priority: int = 0
    missed: Missed = "once"
    options: str | None = None  # JSON, as in notifyq.task


def check_schedule(expression: str, tz: str) -> None:
    """Raise ConfigError for an expression that isn't one or never comes, or for an unknown time zone."""
    zone = _zone(tz)
    if isinstance(expression, str) and (fields := NICKNAMES.get(expression)):
        raise ConfigError(f"{expression!r} is no cron expression here; write {fields!r}")
    try:
        next(CronSim(expression, datetime.now(zone)))
    except (CronSimError, StopIteration, AttributeError, TypeError) as error:
        why = f": {error}" if isinstance(error, CronSimError) else ""
        raise ConfigError(
            f"{expression!r} is no cron expression{why}; expected five fields, minute hour day month weekday, "
            "as '0 3 * * *'"
        ) from None


def next_slot(expression: str, tz: str, after: datetime) -> datetime:
    """The first slot after a time, in UTC. Raises CronSimError, ValueError or OverflowError if there is none."""
    # In the second of two repeated hours, cronsim returns slots of the first, which have passed: skip those.
    for slot in CronSim(expression, after.astimezone(_zone(tz))):
        if (found := slot.astimezone(UTC)) > after:
            return found
    raise ValueError("it has no slot in the next fifty years")


def _zone(tz: str) -> tzinfo:
    if tz == "UTC":  # works without time zone data, which slim images and Windows lack
        return UTC
    try:
        return ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):  # OSError: the name of a folder in tzdata
        raise ConfigError(
            f"tz is {tz!r}, which isn't known here; expected a name such as 'Europe/Berlin' (on systems without time "
            "zones: pip install tzdata)"
        ) from None
