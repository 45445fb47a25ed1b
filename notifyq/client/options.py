"""The options of one call of enqueue: their types, their check, and what a task's class adds to them.

They are checked here and not by PostgreSQL, as an error of asyncpg names a $5 and no option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, cast

import msgspec

from .. import settings
from ..errors import ConfigError
from ..options import AFTER_MOST, OPTIONS, State, to_json
from ..rules import apply_rules, rules_of
from ..task import Task
from ..unique import NO_RULE, Unique, UniqueOptions
from .ref import Ref


class EnqueueOptions(TypedDict, total=False):
    """The options of `enqueue` and `enqueue_many`, of App and SyncClient. None: as if the option weren't given.

    queue         a name without spaces, commas and colons; default: what the task's class says, which is "default"
    delay         seconds, or a timedelta, from now, by the database's clock; or
    run_at        the time to run at, an aware datetime
    priority      -32768 to 32767, higher ones run first; default: what the task's class says, which is 0
    max_attempts  how many runs may fail before the task is dead; default: what the task's class says
    order_key     of the tasks with the same key, one runs at a time, in the order of their ids
    limit_key     `limit` and `rate` are for all tasks with the same key, over all workers
    limit         at most this many of them run at the same time
    rate          at most this many of them start in any such time: "100/minute", "5/10s"
    after         the tasks to wait for, as Refs or ids, at most 10,000
    on_dead       what happens to this task if one of those ends dead or cancelled: "cancel" (default) or "run" it
    expires       seconds, or a timedelta, from run_at (now, if it isn't given): a task that hasn't started by then is
                  cancelled by the worker that takes it; its error begins with "expired"
    unique        a key: nothing is enqueued while another task with the same key is there. True makes the key of the
                  payload, a tuple of fields' names of these fields, as Task.unique does. False: never unique
    unique_for    seconds, or a timedelta: only a task that was enqueued within this time counts
    unique_states only a task in one of these states counts; default: "scheduled", "ready" and "running", and with
                  unique_for "done"; with on_conflict "replace" or "move" the first two
    on_conflict   while the other task waits: "keep" it as it is (default), "replace" its payload, or "move" its run_at
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
    expires: float | timedelta | None
    unique: str | bool | tuple[str, ...] | None
    unique_for: float | timedelta | None
    unique_states: Iterable[State] | None
    on_conflict: Literal["keep", "replace", "move"] | None


class Columns(NamedTuple):
    """What the columns of a new row are given, in the order of the statements' parameters from $3 on."""

    queue: str
    delay: float | None  # seconds
    run_at: datetime | None
    priority: int
    max_attempts: int | None


class Options(NamedTuple):
    """Checked options of one call, for one task or many."""

    given: Mapping[str, Any]  # by name, without those that aren't given
    columns: Columns
    stored: Mapping[str, object]  # what the column `options` is given, but for the keys of unique tasks
    unique: UniqueOptions

    @classmethod
    def check(cls, *, has_follower: bool = False, **options: Unpack[EnqueueOptions]) -> Options:
        """Raises ConfigError for an option that there isn't, or a value that it can't have.

        has_follower  a task follows that waits for these (`then`), so on_dead is about that one
        """
        if not options:
            return NO_OPTIONS
        given: dict[str, Any] = {}
        for name, value in cast("dict[str, Any]", options).items():
            option = OPTIONS.get(name)
            if option is None:
                raise _unknown_option(name)
            if value is not None or option.required:
                given[name] = option.kind.check(name, _ids_of(value) if name == "after" else value)
        if not given.get("after"):
            given.pop("after", None)
        _check_together(given, has_follower=has_follower)
        return cls.of(given)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Those of checked options."""
        columns = Columns(
            given.get("queue", "default"),
            given.get("delay") or None,
            given.get("run_at"),
            given.get("priority", 0),
            given.get("max_attempts"),
        )
        stored = to_json(given)
        if "after" not in given:
            stored.pop("on_dead", None)  # it is about the task that follows
        return cls(given, columns, stored, UniqueOptions.of(given))

    def for_task(self, task: Task) -> Options:
        """The same, with what the task's class says where enqueue was given nothing.

        Raises ConfigError for a limit without a key, or a key without a limit.
        """
        given, rules = self.given, rules_of(type(task))
        if rules:
            if "limit_key" in given and ("limit" in given or "rate" in given):
                # Limits belong to a key: those of the class aren't for another key that has its own.
                rules = {name: value for name, value in rules.items() if name not in ("limit", "rate")}
            given = {**apply_rules(task, rules, given), **given}
        _check_limit(given)
        return self if given is self.given else self.of(given)

    def text(self, unique: Unique | None = None) -> str | None:
        """The column `options` as JSON; None if there are none."""
        stored = self.stored if unique is None else {**self.stored, **unique.options()}
        return msgspec.json.encode(stored).decode() if stored else None


NO_OPTIONS = Options({}, Columns("default", None, None, 0, None), {}, NO_RULE)


def options_for(queue: str | None, priority: int | None) -> Options:
    """Options that have only these two; None: what the class says."""
    given = {"queue": queue, "priority": priority}
    return Options.check(**cast("EnqueueOptions", {name: value for name, value in given.items() if value is not None}))


def check_group(size: int) -> None:
    """Raises ConfigError for a group of more tasks than a task may wait for."""
    if size > AFTER_MOST:
        raise ConfigError(f"then= would wait for {size} tasks; expected {AFTER_MOST} at most, or several groups")


def _ids_of(after: Any) -> list[Any]:
    """The ids of Refs; anything else as it is, for the check."""
    refs: list[Any] = list(after) if isinstance(after, Iterable) else [after]  # pyright: ignore[reportUnknownArgumentType]
    return [ref.id if isinstance(ref, Ref) else ref for ref in refs]


def _unknown_option(name: str) -> ConfigError:
    if name == "then":
        hint = "a task that runs after others: enqueue_many([...], then=task), or enqueue(task, after=[...])"
        return ConfigError(f"enqueue has no option {name!r}; {hint}")
    return settings.unknown_option("enqueue", name, tuple(OPTIONS))


def _check_together(given: Mapping[str, Any], *, has_follower: bool) -> None:
    if "delay" in given and "run_at" in given:
        raise ConfigError("delay= and run_at= are both given; they are two ways to say the same")
    if "on_dead" in given and not ("after" in given or has_follower):
        raise ConfigError(f"on_dead is {given['on_dead']!r}; expected 'cancel' or 'run', beside after=[...]")


def _check_limit(given: Mapping[str, Any]) -> None:
    has_limit = "limit" in given or "rate" in given
    if "limit_key" in given and not has_limit:
        raise ConfigError(
            f'limit_key is {given["limit_key"]!r}, and no limit; add limit=3, rate="100/minute", or both, '
            "here or in the task's class"
        )
    if "limit_key" not in given and has_limit:
        raise ConfigError(
            'limit= and rate= are of tasks with the same limit_key; add limit_key="...", or limit a whole queue: '
            "notifyq queue limit"
        )
