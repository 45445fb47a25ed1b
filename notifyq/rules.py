"""What a Task class says of how its tasks are enqueued: queue, priority, order_key, limit_key, limit, rate.

An option of enqueue wins over each. A key is a str, which all tasks of the class share, or made of a task's fields: the
type and their values as JSON, `Export:42` of tenant 42. (The rule for unique tasks is in unique.py.)
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, NamedTuple, cast

import msgspec

from .codec import type_name
from .config import NAME_LENGTH, check_name, check_queue, is_int
from .errors import ConfigError
from .task import Task

NAMES: Final = ("queue", "priority", "order_key", "limit_key", "limit", "rate")
DIGEST_LENGTH = 40  # hex digits: 160 bits of SHA-256
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

_sorted = msgspec.json.Encoder(order="sorted").encode
_by_class: dict[type[Task], Rules | None] = {}

Key = str | tuple[str, ...]


class Rules(NamedTuple):
    """Checked."""

    queue: str
    priority: int
    order_key: Key | None
    limit_key: Key | None
    limit: int | None
    rate: str | None


PLAIN: Final = Rules("default", 0, None, None, None, None)


def rules_of(cls: type[Task]) -> Rules | None:
    """What the class says; None if nothing. Raises ConfigError for what can't be."""
    try:
        return _by_class[cls]
    except KeyError:
        rules = _by_class[cls] = _checked(cls)
        return rules


def parse_rate(rate: str, whose: str = "") -> tuple[int, float]:
    """(100, 60.0) of "100/minute". Raises ConfigError for what isn't one."""
    match = RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is None or not int(match[1]) or match[2] == "0":
        raise ConfigError(
            f'{whose}rate is {rate!r}; expected how many in what time, as "100/minute", "5/s" or "20/10s"'
        )
    seconds = float(int(match[2] or 1) * UNITS[match[3]])
    if seconds > RATE_SECONDS_MOST:
        raise ConfigError(f"{whose}rate is {rate!r}; expected a time of 1e9 s at most")
    return int(match[1]), seconds


def key_of(task: Task, rule: Key) -> str:
    """A task's key, by its class's rule. Raises ConfigError for fields that can't be written as JSON."""
    if isinstance(rule, str):
        return rule
    name = type_name(type(task))
    values = [getattr(task, field) for field in rule]
    try:
        text = _sorted(values[0] if len(values) == 1 else values).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"task {name}: no key can be made of its fields {', '.join(rule)}: {error}") from error
    key = f"{name}:{text}"
    if len(key) > NAME_LENGTH or "\x00" in key:
        digest = hashlib.sha256(key.encode()).hexdigest()[:DIGEST_LENGTH]
        key = f"{name[: NAME_LENGTH - 1 - DIGEST_LENGTH]}:{digest}"
    return key


def _checked(cls: type[Task]) -> Rules | None:
    # A field of the payload that has the name of a rule is none.
    said = {name: getattr(cls, name) for name in NAMES if name not in cls.__struct_fields__}
    rules = PLAIN._replace(**said)
    whose = f"task {cls.__name__}: "
    check_queue(f"{whose}queue", rules.queue)
    if not is_int(rules.priority) or not -32768 <= rules.priority <= 32767:
        raise ConfigError(f"{whose}priority is {rules.priority!r}; expected -32768 to 32767")
    for name in ("order_key", "limit_key"):
        _check_key(cls, name, getattr(rules, name))
    if rules.limit is not None and (not is_int(rules.limit) or not 1 <= rules.limit < 2**31):
        raise ConfigError(f"{whose}limit is {rules.limit!r}; expected how many may run at once, 1 or more")
    if rules.rate is not None:
        parse_rate(rules.rate, whose)
    return None if rules == PLAIN else rules


def _check_key(cls: type[Task], name: str, rule: object) -> None:
    fields = cls.__struct_fields__
    whose = f"task {cls.__name__}: {name}"
    listed = f"its fields: {', '.join(fields) or 'none'}"
    if rule is None:
        return
    if isinstance(rule, str):
        if rule in fields:
            raise ConfigError(f"{whose} is {rule!r}, which is a field; for a key of its value write ({rule!r},)")
        check_name(whose, rule)
        return
    names = cast("tuple[object, ...]", rule) if isinstance(rule, tuple) else ()
    if not names or not all(isinstance(one, str) for one in names):
        raise ConfigError(f"{whose} is {rule!r}; expected a key for all tasks, or a tuple of fields' names; {listed}")
    for one in names:
        if one not in fields:
            raise ConfigError(f"{whose} has {one!r} in it, which is no field; {listed}")
