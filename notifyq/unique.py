"""Unique tasks: tasks with the same key are the same. schema.sql decides when an enqueue finds such a task.

A key is given to enqueue, or is made of the task by a rule, which its class has or enqueue is given. A key that is made
has the type, and a digest of the payload or of some fields, as JSON with all keys sorted. All types share one space of
keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import msgspec

from .codec import type_name
from .config import NAME_LENGTH, in_seconds
from .errors import ConfigError
from .options import ENDED, OPTIONS, is_names
from .task import Task

DIGEST_LENGTH = 40  # hex digits: 160 bits of SHA-256

_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_checked: set[type[Task]] = set()


class Unique(NamedTuple):
    """The key of one task, and what happens if another task has it."""

    key: str
    states: list[str] | None
    seconds: float | None
    on_conflict: str

    def options(self) -> dict[str, object]:
        """The part of the column `options` that schema.sql reads this from."""
        return {
            "unique_key": self.key,
            "unique_states": self.states,
            "unique_for": self.seconds,
            "on_conflict": self.on_conflict,
        }


class UniqueOptions(NamedTuple):
    """The options of enqueue for unique tasks, checked. None: what the task's class says."""

    unique: str | bool | tuple[str, ...] | None = None
    unique_for: float | None = None
    unique_states: tuple[str, ...] | None = None
    on_conflict: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self | UniqueOptions:
        """Those of enqueue's checked options that are for unique tasks."""
        values = [given.get(name) for name in cls._fields]
        return NO_RULE if values == [None] * len(values) else cls(*values)

    def for_task(self, task: Task) -> Unique | None:
        """The key of this task; None if it isn't unique. Raises ConfigError for options that don't fit the task."""
        cls = type(task)
        if self is NO_RULE and cls.unique is False:
            return None
        check_rule(cls)
        rule = cls.unique if self.unique is None else self.unique
        if not rule:
            if self.unique is None and self != NO_RULE:
                raise ConfigError(
                    f"unique_for, unique_states and on_conflict go with a key, and {cls.__name__} has no rule for one; "
                    'add unique="..."'
                )
            return None
        seconds = in_seconds(cls.unique_for) if self.unique_for is None else self.unique_for
        states = cls.unique_states if self.unique_states is None else self.unique_states
        _check_together("", seconds, states)
        key = rule if isinstance(rule, str) else _make_key(task, rule)
        return Unique(key, None if states is None else list(states), seconds, self.on_conflict or cls.on_conflict)


NO_RULE = UniqueOptions()


def check_rule(cls: type[Task]) -> None:
    """Raise ConfigError for what a class can't say about its tasks being unique."""
    if cls in _checked:
        return
    whose = f"task {cls.__name__}: "
    rule: object = cls.unique
    if not isinstance(rule, bool) and not is_names(rule):
        hint = f"({rule!r},) has a comma" if isinstance(rule, str) else "or leave it out"
        raise ConfigError(f"{whose}unique is {rule!r}; expected True, or a tuple of its fields' names; {hint}")
    if isinstance(cls.unique, tuple):
        _check_fields(cls, cls.unique)
    for name in ("unique_for", "unique_states", "on_conflict"):
        if (value := getattr(cls, name)) is not None:
            OPTIONS[name].kind.check(f"{whose}{name}", value)
    _check_together(whose, cls.unique_for, cls.unique_states)
    _checked.add(cls)


def _check_together(whose: str, seconds: object, states: Iterable[str] | None) -> None:
    if seconds is None and (ended := {*ENDED}.intersection(states or ())):
        raise ConfigError(
            f"{whose}unique_states has {min(ended)!r} in it, and nothing says for how long; add unique_for=3600"
        )


def _check_fields(cls: type[Task], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in cls.__struct_fields__:
            fields = ", ".join(cls.__struct_fields__) or "none"
            raise ConfigError(
                f"task {cls.__name__}: unique has {name!r} in it, which is no field; its fields: {fields}"
            )


def _make_key(task: Task, rule: bool | tuple[str, ...]) -> str:
    cls = type(task)
    if isinstance(rule, tuple):
        _check_fields(cls, rule)
    name = type_name(cls)
    try:
        content = _encode_sorted({field: getattr(task, field) for field in rule} if isinstance(rule, tuple) else task)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"task {name}: no unique key can be made of it: {error}") from error
    digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:DIGEST_LENGTH]
    return f"{name[: NAME_LENGTH - 1 - DIGEST_LENGTH]}:{digest}"
