"""From a claimed row's type and payload to a typed task and the function for it: unions of 1, 10 and 100 types.

Three ways are measured in turns, without a database: what notifyq does (a dict of decoders, by the type column);
msgspec's one decoder of the whole union, on JSON that has the tag in it; and json.loads with a dict of constructors,
which validates nothing.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union, cast

import msgspec

import notifyq
from notifyq.codec import encode_payload, type_name
from notifyq.registry import Registry

from .common import Bench, Line, Plot, Result, User, median, ratio

TYPES, TASKS, ROUNDS = (1, 10, 100), 20_000, 9

Row = tuple[str, bytes, bytes]  # type; payload; payload with the tag
Decode = Callable[[list[Row]], None]


@dataclass(slots=True)
class PlainUser:
    id: str
    email: str


@dataclass(slots=True)
class PlainMail:
    user: PlainUser
    key: str


async def run(bench: Bench) -> Result:
    rounds = bench.rounds(ROUNDS)
    lines, data = list[Line](), dict[str, Any]()
    series: dict[str, list[tuple[float, float]]] = {}
    for count in TYPES:
        ways = {"notifyq": ours, "one union decoder": union, "json.loads and constructors": plain}
        tasks = [_task_type(n) for n in range(count)]
        rows = _rows(tasks)
        took: dict[str, list[float]] = {name: [] for name in ways}
        prepared = {name: prepare(tasks) for name, prepare in ways.items()}
        for _ in range(rounds):
            for name, decode_all in prepared.items():
                begin = time.perf_counter()
                decode_all(rows)
                took[name].append((time.perf_counter() - begin) / TASKS * 1e9)
        for name, times in took.items():
            series.setdefault(name, []).append((count, median(times)))
        data[str(count)] = took
        for other in list(ways)[1:]:
            what = f"decode and dispatch, {count} type{'s' if count > 1 else ''}"
            lines.append(Line(what, median(took["notifyq"]), "ns/task", other, ratio(took["notifyq"], took[other])))
    plot = Plot("codec", "Decode and dispatch", "task types", "ns per task", series, log_x=True)
    return Result(lines, data, [plot])


def _task_type(n: int) -> type[notifyq.Task]:
    fields = [("user", User), ("key", str)]
    return cast("type[notifyq.Task]", msgspec.defstruct(f"Mail{n}", fields, bases=(notifyq.Task,), tag=f"MAIL_{n}"))


def _rows(tasks: list[type[notifyq.Task]]) -> list[Row]:
    """Of each type equally many, in random order."""
    rows = list[Row]()
    for n in range(TASKS):
        make: Callable[..., notifyq.Task] = tasks[n % len(tasks)]
        task = make(user=User(id=f"3f2b8a7e-{n}", email="somebody@example.org"), key="k" * 24)
        rows.append((type_name(type(task)), encode_payload(task), msgspec.json.encode(task)))
    random.Random(1).shuffle(rows)
    return rows


def ours(tasks: list[type[notifyq.Task]]) -> Decode:
    registry = Registry()
    for task in tasks:

        def handler(task: notifyq.Task) -> None: ...

        handler.__annotations__["task"] = task
        registry.add(handler, {})

    def decode_all(rows: list[Row]) -> None:
        for type, payload, _ in rows:
            handler = registry.get(type)  # as notifyq/worker/runners.py has it
            if handler is not None:
                task, function = handler.decode(payload), handler.function  # noqa: F841 - all but the call

    return decode_all


def union(tasks: list[type[notifyq.Task]]) -> Decode:
    decode = msgspec.json.Decoder(Union[tuple(tasks)]).decode  # noqa: UP007 - built at run time
    functions = dict.fromkeys(tasks, _rows)

    def decode_all(rows: list[Row]) -> None:
        for _, _, tagged in rows:
            task = decode(tagged)
            function = functions[type(task)]  # noqa: F841

    return decode_all


def plain(tasks: list[type[notifyq.Task]]) -> Decode:
    def make(user: dict[str, str], key: str) -> PlainMail:
        return PlainMail(PlainUser(**user), key)

    handlers = {type_name(task): (make, _rows) for task in tasks}

    def decode_all(rows: list[Row]) -> None:
        for type, payload, _ in rows:
            construct, function = handlers[type]  # noqa: RUF059
            task = construct(**json.loads(payload))  # noqa: F841

    return decode_all
