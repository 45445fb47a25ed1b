"""What a Task class says of how its tasks are enqueued: its queue, keys, limits, ...

An option of enqueue wins over each. A key is a str, which all tasks of the class share, or is made of a task's fields:
the type, and the values of the fields as JSON. `Export:42` is the key of tenant 42.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from typing import Any, Final, TypeAlias, cast

import msgspec

from .codec import type_name
from .config import NAME_LENGTH, check_name
from .errors import ConfigError
from .options import OPTIONS, is_names
from .task import Task

KEYS: Final = ("order_key", "limit_key")
# A task gets these from its class when it is enqueued. A worker reads max_attempts, backoff and timeout from the class
# when it runs the task. unique.py has the rule for unique tasks.
NAMES: Final = tuple(name for name, row in OPTIONS.items() if row.of_class and (row.json or row.required))
DIGEST_LENGTH = 40  # hex digits: 160 bits of SHA-256

Key: TypeAlias = str | tuple[str, ...]
Rules: TypeAlias = Mapping[str, Any]  # checked values by the name of the option; a key is a Key

_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_by_class: dict[type[Task], Rules] = {}


def rules_of(cls: type[Task]) -> Rules:
    """The options that the class sets to something else than their defaults. Raises ConfigError for a wrong value."""
    try:
        return _by_class[cls]
    except KeyError:
        rules = _by_class[cls] = _check_rules(cls)
        return rules


def apply_rules(task: Task, rules: Rules, given: Container[str]) -> dict[str, Any]:
    """The options that `rules` set for this task, with its keys made, but for those that are `given` to enqueue.

    A limit without a limit_key is for all tasks of the type. Raises ConfigError for fields that JSON can't hold.
    """
    options = {name: value for name, value in rules.items() if name not in given}
    for name in KEYS:
        if name in options:
            options[name] = key_of(task, options[name])
    if ("limit" in rules or "rate" in rules) and "limit_key" not in options and "limit_key" not in given:
        options["limit_key"] = type_name(type(task))
    return options


def key_of(task: Task, rule: Key) -> str:
    """A task's key, by its class's rule. Raises ConfigError for fields that JSON can't hold."""
    if isinstance(rule, str):
        return rule
    name = type_name(type(task))
    values = [getattr(task, field) for field in rule]
    try:
        text = _encode_sorted(values[0] if len(values) == 1 else values).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"task {name}: no key can be made of its fields {', '.join(rule)}: {error}") from error
    key = f"{name}:{text}"
    if len(key) > NAME_LENGTH or "\x00" in key:
        digest = hashlib.sha256(key.encode()).hexdigest()[:DIGEST_LENGTH]
        key = f"{name[: NAME_LENGTH - 1 - DIGEST_LENGTH]}:{digest}"
    return key


def _check_rules(cls: type[Task]) -> Rules:
    rules: dict[str, Any] = {}
    for name in NAMES:
        # A field of the payload that has the name of an option isn't a rule.
        if name in cls.__struct_fields__ or (value := getattr(cls, name)) is (default := getattr(Task, name)):
            continue
        what = f"task {cls.__name__}: {name}"
        if value is not None or default is not None:
            value = _check_key(cls, what, value) if name in KEYS else OPTIONS[name].kind.check(what, value)
        if value != default:
            rules[name] = value
    return rules


def _check_key(cls: type[Task], what: str, rule: object) -> Key:
    fields = cls.__struct_fields__
    listed = f"its fields: {', '.join(fields) or 'none'}"
    if isinstance(rule, str):
        if rule in fields:
            raise ConfigError(f"{what} is {rule!r}, which is a field; for a key of its value write ({rule!r},)")
        check_name(what, rule)
        return rule
    if not is_names(rule):
        raise ConfigError(f"{what} is {rule!r}; expected a key for all tasks, or a tuple of fields' names; {listed}")
    for field in (names := cast("tuple[str, ...]", rule)):
        if field not in fields:
            raise ConfigError(f"{what} has {field!r} in it, which is no field; {listed}")
    return names
