"""What may be said of a task when it is enqueued; checked here, since asyncpg's own message would name a $5."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Literal, NamedTuple, Self, TypedDict

import msgspec

from .config import check_name
from .errors import ConfigError
from .task import Ref, State
from .unique import Unique, Wish

UNITS = {
    "s": 1,
    "sec": 1,
    "second": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "h": 3600,
    "hour": 3600,
    "d": 86400,
    "day": 86400,
}
RATE = re.compile(rf"([0-9]{{1,9}})\s*/\s*([0-9]{{0,9}})\s*({'|'.join(UNITS)})")
RATE_SECONDS_MOST = 1e9  # schema.sql has the same check
AFTER_MOST = 10_000


class EnqueueOptions(TypedDict, total=False):
    """The options of `enqueue` and `enqueue_many`, of App and SyncClient.

    queue         "default" if it isn't said
    delay         seconds from now, by the database's clock; or
    run_at        when, an aware datetime
    priority      -32768 to 32767, the higher the sooner
    max_attempts  instead of what its type says
    order_key     of tasks with the same, one runs at a time, in the order of their ids
    limit_key     of tasks with the same, over all workers,
    limit         at most so many run at once,
    rate          and at most so many start in any such time: "100/minute", "5/10s"
    after         the tasks to wait for, as Refs or ids
    on_dead       "cancel" it (if it isn't said) or "run" it, when one of these ends dead or cancelled
    unique        a key: not enqueued while another with the same is there. True or fields' names: by the payload or by
                  these fields, as Task.unique. False: whatever that says
    unique_for    and was enqueued less than so many seconds ago,
    unique_states and is in one of these states; if it isn't said: "scheduled", "ready", "running", and with unique_for
                  "done"; with "replace" or "move" the first two
    on_conflict   "keep" the other (if it isn't said), "replace" its payload, or "move" its run_at, while it waits
    """

    queue: str
    delay: float | None
    run_at: datetime | None
    priority: int
    max_attempts: int | None
    order_key: str | None
    limit_key: str | None
    limit: int | None
    rate: str | None
    after: Iterable[Ref | int] | None
    on_dead: Literal["cancel", "run"] | None
    unique: str | bool | tuple[str, ...] | None
    unique_for: float | None
    unique_states: Iterable[State] | None
    on_conflict: Literal["keep", "replace", "move"] | None


class Options(NamedTuple):
    """Checked; `values` are in the order of the statements' parameters from $3 on."""

    values: tuple[str, float | None, datetime | None, int, int | None]  # queue, delay, run_at, priority, max_attempts
    rare: Mapping[str, object]  # what schema.sql has in a task's options, but for those of unique tasks
    on_dead: str | None
    unique: Wish

    def text(self, unique: Unique | None = None) -> str | None:
        """The options as JSON; None if there are none."""
        given = self.rare if unique is None else {**self.rare, **unique.options()}
        return msgspec.json.encode(given).decode() if given else None

    @classmethod
    def check(
        cls,
        *,
        queue: str = "default",
        delay: float | None = None,
        run_at: datetime | None = None,
        priority: int = 0,
        max_attempts: int | None = None,
        order_key: str | None = None,
        limit_key: str | None = None,
        limit: int | None = None,
        rate: str | None = None,
        after: Iterable[Ref | int] | None = None,
        on_dead: Literal["cancel", "run"] | None = None,
        unique: str | bool | tuple[str, ...] | None = None,
        unique_for: float | None = None,
        unique_states: Iterable[State] | None = None,
        on_conflict: Literal["keep", "replace", "move"] | None = None,
        then: bool = False,
    ) -> Self:
        """Raises ConfigError for what can't be. then: a task follows that waits for these, so on_dead is for that."""
        check_name("queue", queue)
        if delay is not None:
            if run_at is not None:
                raise ConfigError("delay= and run_at= are both given; they are two ways to say the same")
            if not (isinstance(delay, int | float) and math.isfinite(delay) and 0 <= delay <= 100 * 366 * 86400):
                raise ConfigError(f"delay is {delay!r}; expected seconds, 0 or more")
        if run_at is not None and (not isinstance(run_at, datetime) or run_at.tzinfo is None):
            raise ConfigError(
                f"run_at is {run_at!r}; expected a datetime with a timezone, as datetime.now(timezone.utc)"
            )
        if not isinstance(priority, int) or not -32768 <= priority <= 32767:
            raise ConfigError(f"priority is {priority!r}; expected -32768 to 32767")
        if max_attempts is not None and (not isinstance(max_attempts, int) or not 1 <= max_attempts <= 32767):
            raise ConfigError(f"max_attempts is {max_attempts!r}; expected 1 to 32767")
        if order_key is not None:
            check_name("order_key", order_key)
        count, seconds = parse_rate(rate) if rate is not None else (None, None)
        if limit is not None and (not isinstance(limit, int) or not 1 <= limit < 2**31):
            raise ConfigError(f"limit is {limit!r}; expected how many may run at once, 1 or more")
        if limit_key is not None:
            check_name("limit_key", limit_key)
            if limit is None and rate is None:
                raise ConfigError(f'limit_key is {limit_key!r}, and no limit; add limit=3, rate="100/minute", or both')
        elif limit is not None or rate is not None:
            raise ConfigError(
                'limit= and rate= are of tasks with the same limit_key; add limit_key="...", or limit a whole queue: '
                "notifyq queue limit"
            )
        ids = None if after is None else checked_ids(after)
        if on_dead is not None and (on_dead not in ("cancel", "run") or not (ids or then)):
            raise ConfigError(f"on_dead is {on_dead!r}; expected 'cancel' or 'run', beside after=[...]")
        rare: dict[str, object] = {}
        if order_key is not None or limit_key is not None or ids is not None:
            rare = {
                "order_key": order_key,
                "limit_key": limit_key,
                "limit_running": limit,
                "limit_rate": count,
                "limit_seconds": seconds,
                "after": ids,
                "on_dead": on_dead if ids else None,
            }
        wish = Wish.check(unique, unique_for, unique_states, on_conflict)
        return cls((queue, delay or None, run_at, priority, max_attempts), rare, on_dead, wish)


def parse_rate(rate: str) -> tuple[int, float]:
    """(100, 60.0) of "100/minute". Raises ConfigError for what isn't one."""
    match = RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is None or not int(match[1]) or match[2] == "0":
        raise ConfigError(f'rate is {rate!r}; expected how many in what time, as "100/minute", "5/s" or "20/10s"')
    seconds = float(int(match[2] or 1) * UNITS[match[3]])
    if seconds > RATE_SECONDS_MOST:
        raise ConfigError(f"rate is {rate!r}; expected a time of 1e9 s at most")
    return int(match[1]), seconds


def check_group(size: int) -> None:
    """Raises ConfigError for a group too large to be waited for."""
    if size > AFTER_MOST:
        raise ConfigError(f"then= would wait for {size} tasks; expected {AFTER_MOST} at most, or several groups")


def is_id(id: object) -> bool:
    """Whether a task could have it."""
    return isinstance(id, int) and not isinstance(id, bool) and 1 <= id < 2**63


def checked_ids(after: Iterable[Ref | int]) -> list[int] | None:
    """The ids, each once, in order; None for none. Raises ConfigError for what isn't one."""
    refs = list(after) if isinstance(after, Iterable) else [after]
    ids = [ref.id if isinstance(ref, Ref) else ref for ref in refs]
    for id in ids:
        if not is_id(id):
            raise ConfigError(f"after has {id!r} in it; expected what enqueue returned, or ids")
    if len(ids) > AFTER_MOST:
        raise ConfigError(f"after has {len(ids)} tasks; expected {AFTER_MOST} at most")
    return list(dict.fromkeys(ids)) or None
