"""Unique tasks: which are the same, by a key. Whether one is in another's way is decided in the database: schema.sql.

A key is given at enqueue, or made of the task by a rule, which its class has or enqueue is given: the type, and a
digest of the payload or of some fields as JSON with all keys sorted. Keys are one space for all types.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple, Self, cast

import msgspec

from .codec import type_name
from .config import NAME_LENGTH, check_name, in_seconds, is_number
from .errors import ConfigError
from .task import ENDED, STATES, Task

LONGEST_SECONDS = 1e9  # schema.sql has it too
DIGEST_LENGTH = 40  # hex digits: 160 bits of SHA-256

_sorted = msgspec.json.Encoder(order="sorted").encode
_checked: set[type[Task]] = set()


class Unique(NamedTuple):
    """Of one task."""

    key: str
    states: list[str] | None
    seconds: float | None
    on_conflict: str

    def options(self) -> dict[str, object]:
        """As schema.sql has them."""
        return {
            "unique_key": self.key,
            "unique_states": self.states,
            "unique_for": self.seconds,
            "on_conflict": self.on_conflict,
        }


class UniqueOptions(NamedTuple):
    """What enqueue was told; None is what the task's class says."""

    unique: str | bool | tuple[str, ...] | None = None
    seconds: float | None = None
    states: tuple[str, ...] | None = None
    on_conflict: str | None = None

    @classmethod
    def check(cls, unique: object, seconds: object, states: object, on_conflict: object) -> Self | UniqueOptions:
        """Raises ConfigError for what can't be, whatever the task."""
        if unique is None and seconds is None and states is None and on_conflict is None:
            return NO_RULE
        if isinstance(unique, str):
            check_name("unique", unique)
        elif unique is not None and not isinstance(unique, bool) and not _are_names(unique):
            raise ConfigError(f"unique is {unique!r}; expected a key, True, or a tuple of the payload's fields' names")
        return cls(cast("str", unique), *_settings("", seconds, states, on_conflict))

    def of(self, task: Task) -> Unique | None:
        """None: it isn't unique. Raises ConfigError for what doesn't fit this task."""
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
        seconds = in_seconds(cls.unique_for) if self.seconds is None else self.seconds
        states = cls.unique_states if self.states is None else self.states
        _check_together("", seconds, states)
        key = rule if isinstance(rule, str) else _key(task, rule)
        return Unique(key, None if states is None else list(states), seconds, self.on_conflict or cls.on_conflict)


NO_RULE = UniqueOptions()


def check_rule(cls: type[Task]) -> None:
    """Raise ConfigError if what a class says about its tasks being unique can't be."""
    if cls in _checked:
        return
    whose = f"task {cls.__name__}: "
    rule: object = cls.unique
    if not isinstance(rule, bool) and not _are_names(rule):
        hint = f"({rule!r},) has a comma" if isinstance(rule, str) else "or leave it out"
        raise ConfigError(f"{whose}unique is {rule!r}; expected True, or a tuple of its fields' names; {hint}")
    if isinstance(cls.unique, tuple):
        _check_fields(cls, cls.unique)
    settings = _settings(whose, cls.unique_for, cls.unique_states, cls.on_conflict)
    _check_together(whose, *settings[:2])
    _checked.add(cls)


def _settings(
    whose: str, seconds: object, states: object, on_conflict: object
) -> tuple[float | None, tuple[str, ...] | None, str | None]:
    seconds = in_seconds(seconds)
    if seconds is not None and not (is_number(seconds) and math.isfinite(seconds) and 0 < seconds <= LONGEST_SECONDS):
        raise ConfigError(f"{whose}unique_for is {seconds!r}; expected seconds above 0, or a timedelta")
    chosen: tuple[str, ...] | None = None
    if states is not None:
        known = not isinstance(states, str) and isinstance(states, Iterable)
        chosen = tuple(cast("Iterable[str]", states)) if known else ()
        if not chosen or not all(state in STATES for state in chosen):
            raise ConfigError(f"{whose}unique_states is {states!r}; expected a tuple of {', '.join(STATES)}")
    if on_conflict is not None and on_conflict not in ("keep", "replace", "move"):
        raise ConfigError(f"{whose}on_conflict is {on_conflict!r}; expected 'keep', 'replace' or 'move'")
    return seconds, chosen, on_conflict


def _check_together(whose: str, seconds: float | None, states: Iterable[str] | None) -> None:
    if seconds is None and (ended := {*ENDED}.intersection(states or ())):
        raise ConfigError(
            f"{whose}unique_states has {min(ended)!r} in it, and nothing says for how long; add unique_for=3600"
        )


def _are_names(names: object) -> bool:
    some = cast("tuple[object, ...]", names) if isinstance(names, tuple) else ()
    return bool(some) and all(isinstance(name, str) for name in some)


def _check_fields(cls: type[Task], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in cls.__struct_fields__:
            fields = ", ".join(cls.__struct_fields__) or "none"
            raise ConfigError(
                f"task {cls.__name__}: unique has {name!r} in it, which is no field; its fields: {fields}"
            )


def _key(task: Task, rule: bool | tuple[str, ...]) -> str:
    cls = type(task)
    if isinstance(rule, tuple):
        _check_fields(cls, rule)
    name = type_name(cls)
    try:
        content = _sorted({field: getattr(task, field) for field in rule} if isinstance(rule, tuple) else task)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"task {name}: no unique key can be made of it: {error}") from error
    digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:DIGEST_LENGTH]
    return f"{name[: NAME_LENGTH - 1 - DIGEST_LENGTH]}:{digest}"
