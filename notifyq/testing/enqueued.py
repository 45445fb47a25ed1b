"""The enqueued tasks in the database, as instances of their class; and assertions by type and some of the fields.

A task counts from its enqueue until it has ended. It counts if the connection sees it, so also in a transaction that is
open on it. The message of a failed assertion lists the tasks that are there, the nearest first, and how each differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

import asyncpg
import msgspec

from notifyq.codec import type_name
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError
from notifyq.options import OPTIONS
from notifyq.task import Task

from .source import Source, connection

T = TypeVar("T", bound=Task)

SHOWN = 5  # tasks in a message
DELAY_SECONDS = 1.0  # two delays that differ by less count as the same

Fields = Mapping[str, Any]


class Wanted(NamedTuple):
    """The options that a task is expected to have; None: any."""

    queue: str | None
    priority: int | None
    delay: float | None
    run_at: datetime | None


class _Found(Generic[T]):
    """An enqueued task, and its differences from the expected one. Without any, it matches."""

    def __init__(self, row: asyncpg.Record, task: T, expected: Fields, wanted: Wanted) -> None:
        self.id: int = row["id"]
        self.task = task
        self.differences = [
            f"{name} is {row[name]!r}, not {value!r}"
            for name, value in wanted._asdict().items()
            if value is not None and not _same(name, value, row[name])
        ]
        self.differences += _differences("", expected, task)

    def __str__(self) -> str:
        return f"  id {self.id}: " + "; ".join([*self.differences, f"{self.task!r:.300}"])


async def enqueued(
    source: Source,
    task: type[T],
    fields: Fields | None = None,
    /,
    *,
    queue: str | None = None,
    priority: int | None = None,
    delay: float | None = None,
    run_at: datetime | None = None,
    **more: Any,
) -> list[T]:
    """The tasks of this type that haven't ended and match, the oldest first.

    source        a connected app, a connection (in a transaction it sees the tasks enqueued there), or a DSN
    fields, more  fields and their values. A dict with some of its fields is enough for a nested Struct or dict, and for
                  each item of a list. A field with the name of another parameter goes into `fields`
    queue, priority, delay, run_at  None: any. `delay` is in seconds from the enqueue to the task's time, to within a
                  second; `run_at` is that time exactly

    Raises ConfigError for a field that the type doesn't have, AssertionError for a payload that doesn't fit the type.
    """
    found = await _find(source, task, {**(fields or {}), **more}, Wanted(queue, priority, delay, run_at))
    return [one.task for one in found if not one.differences]


async def assert_enqueued(
    source: Source,
    task: type[T],
    fields: Fields | None = None,
    /,
    *,
    count: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    delay: float | None = None,
    run_at: datetime | None = None,
    **more: Any,
) -> list[T]:
    """As `enqueued`, but raises AssertionError if there is no such task, or another number of them than `count`."""
    __tracebackhide__ = True  # pytest shows the test's line, and not this function's
    wanted = Wanted(queue, priority, delay, run_at)
    found = await _find(source, task, {**(fields or {}), **more}, wanted)
    matches = [one for one in found if not one.differences]
    if len(matches) == count or (count is None and matches):
        return [one.task for one in matches]
    what = _described(task, {**(fields or {}), **more}, wanted)
    if matches:
        raise AssertionError(f"{_count(len(matches), 'task')} enqueued, not {count}, as {what}:\n" + _list(matches))
    expected = "no task" if count is None else f"no task, instead of {count},"
    raise AssertionError(f"{expected} is enqueued as {what}{await _list_others(source, task, found)}")


async def refute_enqueued(
    source: Source,
    task: type[Task],
    fields: Fields | None = None,
    /,
    *,
    queue: str | None = None,
    priority: int | None = None,
    delay: float | None = None,
    run_at: datetime | None = None,
    **more: Any,
) -> None:
    """Raise AssertionError if `enqueued` with the same arguments returns a task."""
    __tracebackhide__ = True
    wanted = Wanted(queue, priority, delay, run_at)
    found = await _find(source, task, {**(fields or {}), **more}, wanted)
    if matches := [one for one in found if not one.differences]:
        what = _described(task, {**(fields or {}), **more}, wanted)
        raise AssertionError(f"{_count(len(matches), 'task')} enqueued as {what}:\n" + _list(matches))


async def _find(source: Source, task: type[T], expected: Fields, wanted: Wanted) -> list[_Found[T]]:
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ConfigError(f"expected a subclass of notifyq.Task and some of its fields, not {task!r:.100}")
    for name in expected:
        if name in OPTIONS and name not in task.__struct_fields__:
            raise ConfigError(
                f"{name!r} is an option of enqueue that isn't compared here, and no field of {task.__name__}; of the "
                f"options, {', '.join(Wanted._fields)} are compared"
            )
    _check_names(task, expected)
    name, decode = type_name(task), msgspec.json.Decoder(task).decode
    async with connection(source) as conn:
        rows = await conn.fetch(SQL["list_enqueued"], name)
    found: list[_Found[T]] = []
    for row in rows:
        try:
            decoded = decode(row["payload"])
        except msgspec.MsgspecError as error:
            raise AssertionError(
                f"task {row['id']} is enqueued, but its payload doesn't fit {name}: {error}; "
                f"it is {row['payload']:.300}"
            ) from error
        found.append(_Found(row, decoded, expected, wanted))
    return found


def _same(name: str, expected: Any, actual: Any) -> bool:
    if name == "delay":
        return actual is not None and abs(actual - expected) <= DELAY_SECONDS
    return bool(expected == actual)


def _differences(path: str, expected: Any, actual: Any) -> list[str]:
    """Each place where `actual` isn't as expected, with its path."""
    pairs: Iterable[tuple[str, Any, Any]]
    if _is_a(expected, Mapping) and _is_a(actual, Mapping, msgspec.Struct):
        values = actual
        if _is_a(actual, msgspec.Struct):
            _check_names(actual.__class__, expected)
            values = {name: getattr(actual, name) for name in actual.__struct_fields__}
        pairs = ((f".{name}", value, values.get(name, _MISSING)) for name, value in expected.items())
    elif _is_a(expected, list, tuple) and _is_a(actual, list, tuple) and len(expected) == len(actual):
        pairs = ((f"[{i}]", one, value) for i, (one, value) in enumerate(zip(expected, actual, strict=True)))
    else:
        different = actual is _MISSING or expected != actual
        return [f"{path.removeprefix('.')} is {actual!r:.200}, not {expected!r:.200}"] if different else []
    return [difference for step, one, value in pairs for difference in _differences(path + step, one, value)]


def _is_a(value: Any, *types: type) -> bool:
    """isinstance; called directly it would turn an Any into an Unknown for pyright."""
    return isinstance(value, types)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def _check_names(cls: type[msgspec.Struct], expected: Iterable[Any]) -> None:
    """Raise ConfigError for a field that the class doesn't have: a test that refutes such a task would never fail."""
    for name in expected:
        if name not in cls.__struct_fields__:
            near = difflib.get_close_matches(str(name), cls.__struct_fields__, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(cls.__struct_fields__) or 'none'}"
            raise ConfigError(f"{cls.__name__} has no field {name!r}; {known}")


def _described(task: type[Task], expected: Fields, wanted: Wanted) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in expected.items())
    options = "".join(f", {name} {value!r}" for name, value in wanted._asdict().items() if value is not None)
    return f"{task.__name__}({fields}){options}"


async def _list_others(source: Source, task: type[T], found: Sequence[_Found[T]]) -> str:
    if found:
        return ". There is, the nearest first:\n" + _list(sorted(found, key=lambda one: len(one.differences)))
    async with connection(source) as conn:
        rows = await conn.fetch(SQL["count_by_state"])
    mine = [f"{n} {state}" for type, state, n in rows if type == type_name(task)]
    others = [f"{type} {n} {state}" for type, state, n in rows if type != type_name(task)]
    told = f"; of this type there is {', '.join(mine)}" if mine else "; there is none of this type"
    return told + f"; of others: {', '.join(others[:10])}" if others else told


def _list(found: Sequence[_Found[T]]) -> str:
    rest = [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join([*map(str, found[:SHOWN]), *rest])


def _count(n: int, word: str) -> str:
    return f"1 {word} is" if n == 1 else f"{n} {word}s are"
