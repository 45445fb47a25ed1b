"""What may be said of a task when it is enqueued; checked here, since asyncpg's own message would name a $5."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, Self, TypedDict

import msgspec

from .. import settings
from ..codec import type_name
from ..config import check_name, check_queue, in_seconds, is_int, is_number
from ..errors import ConfigError
from ..rules import key_of, parse_rate, rules_of
from ..task import State, Task
from ..unique import Unique, UniqueOptions
from .ref import Ref

AFTER_MOST = 10_000
UNTOLD: Any = object()


class EnqueueOptions(TypedDict, total=False):
    """The options of `enqueue` and `enqueue_many`, of App and SyncClient.

    queue         a name without spaces, commas and colons; if it isn't said, what its class says: "default"
    delay         seconds, or a timedelta, from now, by the database's clock; or
    run_at        when, an aware datetime
    priority      -32768 to 32767, the higher the sooner; if it isn't said, what its class says: 0
    max_attempts  instead of what its type says
    order_key     of tasks with the same, one runs at a time, in the order of their ids
    limit_key     of tasks with the same, over all workers,
    limit         at most so many run at once,
    rate          and at most so many start in any such time: "100/minute", "5/10s"
    after         the tasks to wait for, as Refs or ids
    on_dead       "cancel" it (if it isn't said) or "run" it, when one of these ends dead or cancelled
    unique        a key: not enqueued while another with the same is there. True or fields' names: by the payload or by
                  these fields, as Task.unique. False: whatever that says
    unique_for    and was enqueued less than so many seconds, or such a timedelta, ago,
    unique_states and is in one of these states; if it isn't said: "scheduled", "ready", "running", and with unique_for
                  "done"; with "replace" or "move" the first two
    on_conflict   "keep" the other (if it isn't said), "replace" its payload, or "move" its run_at, while it waits
    """

    queue: str
    delay: float | timedelta | None
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
    unique_for: float | timedelta | None
    unique_states: Iterable[State] | None
    on_conflict: Literal["keep", "replace", "move"] | None


class Said(NamedTuple):
    """What a class may say too; None if enqueue was not told."""

    queue: str | None
    priority: int | None
    order_key: str | None
    limit_key: str | None
    limit: int | None
    rate: str | None


class Options(NamedTuple):
    """Checked; `values` are in the order of the statements' parameters from $3 on."""

    values: tuple[str, float | None, datetime | None, int, int | None]  # queue, delay, run_at, priority, max_attempts
    rare: Mapping[str, object]  # what schema.sql has in a task's options, but for those of unique tasks
    on_dead: str | None
    unique: UniqueOptions
    said: Said

    def of(self, task: Task) -> Options:
        """The same, with what the task's class says where enqueue was told nothing. Raises ConfigError for what doesn't
        go together."""
        rules, said = rules_of(type(task)), self.said
        if rules is None:
            if said.limit_key is not None or said.limit is not None or said.rate is not None:
                _check_limit(said.limit_key, said.limit, said.rate)
            return self
        _, delay, run_at, _, max_attempts = self.values
        values = (
            rules.queue if said.queue is None else said.queue,
            delay,
            run_at,
            rules.priority if said.priority is None else said.priority,
            max_attempts,
        )
        order_key, limit_key, limit, rate = said.order_key, said.limit_key, said.limit, said.rate
        if order_key is None and rules.order_key is not None:
            order_key = key_of(task, rules.order_key)
        if limit_key is None or (limit is None and rate is None):  # another key's limits are its own
            limit = rules.limit if limit is None else limit
            rate = rules.rate if rate is None else rate
        if limit_key is None and rules.limit_key is not None:
            limit_key = key_of(task, rules.limit_key)
        elif limit_key is None and (rules.limit is not None or rules.rate is not None):
            limit_key = type_name(type(task))
        _check_limit(limit_key, limit, rate)
        rare = _rare(order_key, limit_key, limit, rate, self.rare.get("after"), self.rare.get("on_dead"))
        return self._replace(values=values, rare=rare)

    def text(self, unique: Unique | None = None) -> str | None:
        """The options as JSON; None if there are none."""
        given = self.rare if unique is None else {**self.rare, **unique.options()}
        return msgspec.json.encode(given).decode() if given else None

    @classmethod
    def check(
        cls,
        *,
        queue: str = UNTOLD,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int = UNTOLD,
        max_attempts: int | None = None,
        order_key: str | None = None,
        limit_key: str | None = None,
        limit: int | None = None,
        rate: str | None = None,
        after: Iterable[Ref | int] | None = None,
        on_dead: Literal["cancel", "run"] | None = None,
        unique: str | bool | tuple[str, ...] | None = None,
        unique_for: float | timedelta | None = None,
        unique_states: Iterable[State] | None = None,
        on_conflict: Literal["keep", "replace", "move"] | None = None,
        followed: bool = False,
        **unknown: object,
    ) -> Self:
        """Raises ConfigError for what can't be.

        followed  a task follows that waits for these, so on_dead is for that one
        """
        for name in unknown:
            near = settings.meant(name, tuple(EnqueueOptions.__annotations__))
            if name == "then":
                hint = "a task that runs after others: enqueue_many([...], then=task), or enqueue(task, after=[...])"
            elif name in settings.SETTINGS:
                hint = f"it is a setting of the task's class: write `{name} = ...` there"
            else:
                hint = f"did you mean {near}?" if near else f"it has {', '.join(EnqueueOptions.__annotations__)}"
            raise ConfigError(f"enqueue has no option {name!r}; {hint}")
        if queue is not UNTOLD:
            check_queue("queue", queue)
        delay = in_seconds(delay)
        if delay is not None:
            if run_at is not None:
                raise ConfigError("delay= and run_at= are both given; they are two ways to say the same")
            if not (is_number(delay) and math.isfinite(delay) and 0 <= delay <= 100 * 366 * 86400):
                raise ConfigError(f"delay is {delay!r}; expected seconds, 0 or more, or a timedelta")
        if run_at is not None and (not isinstance(run_at, datetime) or run_at.tzinfo is None):
            raise ConfigError(
                f"run_at is {run_at!r}; expected a datetime with a timezone, as datetime.now(timezone.utc)"
            )
        if priority is not UNTOLD and (not is_int(priority) or not -32768 <= priority <= 32767):
            raise ConfigError(f"priority is {priority!r}; expected -32768 to 32767")
        if max_attempts is not None and (not is_int(max_attempts) or not 1 <= max_attempts <= 32767):
            raise ConfigError(f"max_attempts is {max_attempts!r}; expected 1 to 32767")
        if order_key is not None:
            check_name("order_key", order_key)
        if rate is not None:
            parse_rate(rate)
        if limit is not None and (not is_int(limit) or not 1 <= limit < 2**31):
            raise ConfigError(f"limit is {limit!r}; expected how many may run at once, 1 or more")
        if limit_key is not None:
            check_name("limit_key", limit_key)
        ids = None if after is None else checked_ids(after)
        if on_dead is not None and (on_dead not in ("cancel", "run") or not (ids or followed)):
            raise ConfigError(f"on_dead is {on_dead!r}; expected 'cancel' or 'run', beside after=[...]")
        unique_options = UniqueOptions.check(unique, unique_for, unique_states, on_conflict)
        told_queue, told_priority = None if queue is UNTOLD else queue, None if priority is UNTOLD else priority
        said = Said(told_queue, told_priority, order_key, limit_key, limit, rate)
        rare = _rare(order_key, limit_key, limit, rate, ids, on_dead if ids else None)
        values = (told_queue or "default", delay or None, run_at, told_priority or 0, max_attempts)
        return cls(values, rare, on_dead, unique_options, said)


def _rare(
    order_key: str | None, limit_key: str | None, limit: int | None, rate: str | None, after: object, on_dead: object
) -> Mapping[str, object]:
    """As schema.sql has them; {} if there are none."""
    if order_key is None and limit_key is None and after is None:
        return {}
    count, seconds = parse_rate(rate) if rate is not None else (None, None)
    return {
        "order_key": order_key,
        "limit_key": limit_key,
        "limit_running": limit,
        "limit_rate": count,
        "limit_seconds": seconds,
        "after": after,
        "on_dead": on_dead,
    }


def _check_limit(limit_key: str | None, limit: int | None, rate: str | None) -> None:
    if limit_key is not None and limit is None and rate is None:
        raise ConfigError(f'limit_key is {limit_key!r}, and no limit; add limit=3, rate="100/minute", or both')
    if limit_key is None and (limit is not None or rate is not None):
        raise ConfigError(
            'limit= and rate= are of tasks with the same limit_key; add limit_key="...", or limit a whole queue: '
            "notifyq queue limit"
        )


def where(queue: str | None, priority: int | None) -> Options:
    """The options that say only this; None: what the class says."""
    return Options.check(queue=UNTOLD if queue is None else queue, priority=UNTOLD if priority is None else priority)


def check_group(size: int) -> None:
    """Raises ConfigError for a group too large to be waited for."""
    if size > AFTER_MOST:
        raise ConfigError(f"then= would wait for {size} tasks; expected {AFTER_MOST} at most, or several groups")


def is_id(id: object) -> bool:
    """Whether a task could have it."""
    return is_int(id) and 1 <= id < 2**63


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
