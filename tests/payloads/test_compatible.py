"""Which changes of a task's type break queued tasks: by a table of changes, and against msgspec with any types."""

from __future__ import annotations

import enum
import itertools
import json
import uuid
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest
from msgspec import Meta

import notifyq
from notifyq.codec import encode_payload
from notifyq.errors import ConfigError
from notifyq.payloads import document
from notifyq.payloads.compatible import breaks
from notifyq.registry import Registry


def registry(*tasks: type[notifyq.Task]) -> Registry:
    found = Registry()
    for task in tasks:

        async def handle(task: Any) -> None: ...

        handle.__annotations__["task"] = task
        found.add(handle, {})
    return found


def task(*fields: Any, name: str = "T", **config: Any) -> type[notifyq.Task]:
    cls: Any = msgspec.defstruct(name, fields, bases=(notifyq.Task,), kw_only=True, **config)
    return cls  # type: ignore[no-any-return]


def of(*tasks: type[notifyq.Task]) -> document.Schema:
    return document.parse(document.render(document.document(registry(*tasks))).encode())


def said(old: type[notifyq.Task], new: type[notifyq.Task]) -> list[str]:
    return [f"{found.path}: {found.what}" for found in breaks(of(old), of(new))]


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class MoreColor(enum.Enum):
    red = "red"
    blue = "blue"
    green = "green"


class Number(enum.IntEnum):
    one = 1
    two = 2


class Inner(msgspec.Struct):
    a: int
    b: str = ""


class InnerMore(msgspec.Struct):
    a: int | None
    b: str = ""
    c: float = 0


class InnerLess(msgspec.Struct):
    a: int


class InnerRequires(msgspec.Struct):
    a: int
    c: int


class InnerStrict(msgspec.Struct, forbid_unknown_fields=True):
    a: int
    b: str = ""


class InnerStrictLess(msgspec.Struct, forbid_unknown_fields=True):
    a: int


class Renamed(msgspec.Struct):
    a: int
    bb: str = msgspec.field(default="", name="b")


class Cat(msgspec.Struct, tag="cat"):
    lives: int = 9


class Dog(msgspec.Struct, tag="dog"):
    name: str


class DogOther(msgspec.Struct, tag="hound"):
    name: str


class DogWider(msgspec.Struct, tag="dog"):
    name: str | None


class Tree(msgspec.Struct):
    value: int
    below: "list[Tree]" = []  # noqa: UP037 - it is looked up later


class Forest(msgspec.Struct):
    value: int | str
    below: "list[Forest]" = []  # noqa: UP037


class Shrub(msgspec.Struct, kw_only=True):
    value: int
    below: "list[Shrub]" = []  # noqa: UP037
    leaf: int


class Pair(msgspec.Struct, array_like=True):
    a: int
    b: int = 0


class Triple(msgspec.Struct, array_like=True):
    a: int
    b: int = 0
    c: str = ""


class PairStrict(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    a: int


class Point(NamedTuple):
    x: int
    y: int = 0


class Typed(TypedDict):
    a: int


@dataclass
class Data:
    a: int
    b: int = 0


def at_least(n: int) -> Any:
    return Annotated[int, Meta(ge=n)]


def sized(of: Any, low: int | None = None, high: int | None = None) -> Any:
    return Annotated[of, Meta(min_length=low, max_length=high)]


def aware(of: Any, tz: bool) -> Any:
    return Annotated[of, Meta(tz=tz)]


COMPATIBLE: list[tuple[Any, Any]] = [
    (int, int),
    (int, float),
    (int, int | None),
    (int | None, float | None | str),
    (int, Any),
    (dict[str, int], Any),
    (Color, MoreColor),
    (Color, str),
    (Color, Literal["red", "blue", "x"]),
    (Literal["red"], Color | None),
    (Literal[1, 2], at_least(1)),
    (Literal[1, None], int | None),
    (Number, int),
    (Number, float),
    (at_least(5), at_least(4)),
    (Annotated[int, Meta(gt=4)], at_least(5)),
    (at_least(5), Annotated[int, Meta(gt=4)]),
    (Annotated[int, Meta(le=5)], Annotated[int, Meta(lt=6)]),
    (Annotated[float, Meta(gt=4)], Annotated[float, Meta(ge=4)]),
    (at_least(5), int),
    (Annotated[int, Meta(multiple_of=6)], Annotated[int, Meta(multiple_of=3)]),
    (sized(str, 2, 5), sized(str, 1, 6)),
    (sized(bytes, 2, 5), sized(bytes, 1, 6)),
    (Annotated[str, Meta(pattern="^a")], str),
    (datetime, str),
    (aware(datetime, True), datetime),
    (aware(datetime, False), datetime),
    (aware(time, True), time),
    (aware(time, False), time),
    (uuid.UUID, str),
    (bytes, str),
    (list[int], list[float]),
    (list[int], list[Any]),
    (list[int], set[int]),
    (tuple[int, int], list[int]),
    (tuple[int, int], Point),
    (tuple[int, int], Pair),
    (Pair, Triple),
    (sized(list[int], 1, 3), list[int]),
    (dict[str, int], dict[str, float]),
    (dict[str, int], dict[str, Any]),
    (dict[int, int], dict[str, int]),
    (dict[Color, int], dict[MoreColor, int]),
    (Inner, InnerMore),
    (Inner, InnerLess),
    (Inner, Renamed),
    (InnerStrict, Inner),
    (InnerStrict, InnerStrict),
    (Inner, InnerLess),
    (Inner, dict[str, Any]),
    (Inner, dict[str, int | str]),
    (InnerLess, Typed),
    (Typed, Data),
    (Inner | None, InnerMore | None),
    (Cat | Dog, Dog | Cat | None),
    (Cat | Dog, Cat | DogWider),
    (Dog, Cat | Dog),
    (Tree, Tree),
    (Tree, Forest),
    (list[Inner], list[InnerMore]),
    (dict[str, Inner], dict[str, InnerMore]),
]


@pytest.mark.parametrize(("old", "new"), COMPATIBLE)
def test_what_breaks_nothing(old: Any, new: Any) -> None:
    assert said(task(("f", old)), task(("f", new))) == []


BREAKS: list[tuple[Any, Any, str]] = [
    (float, int, "$.f: was number, is integer"),
    (str, int, "$.f: was string, is integer"),
    (int, bool, "$.f: was integer, is boolean"),
    (Any, int, "$.f: was anything, is integer"),
    (int | None, int, "$.f: null isn't taken any more, only integer"),
    (int | str | None, int | None, "$.f: string isn't taken any more, only integer, null"),
    (int | None, float, "$.f: null isn't taken any more, only number"),
    (MoreColor, Color, "$.f: 'green' isn't taken any more, only 'blue', 'red'"),
    (str, Color, "$.f: string isn't taken any more, only 'blue', 'red'"),
    (str, Literal["a"], "$.f: was string, is only 'a'"),
    (Literal["a", "bbb"], sized(str, None, 2), "$.f: 'bbb' isn't taken any more, only string"),
    (Literal[1], bool, "$.f: 1 isn't taken any more, only boolean"),
    (Literal[1, 2], at_least(2), "$.f: 1 isn't taken any more, only integer"),
    (int, at_least(0), "$.f: minimum 0, was not set"),
    (at_least(4), at_least(5), "$.f: minimum 5, was 4"),
    (Annotated[float, Meta(ge=4)], Annotated[float, Meta(gt=4)], "$.f: minimum 4 (not itself), was 4"),
    (Annotated[int, Meta(le=6)], Annotated[int, Meta(lt=6)], "$.f: maximum 5, was 6"),
    (Annotated[int, Meta(multiple_of=3)], Annotated[int, Meta(multiple_of=6)], "$.f: multipleOf 6, was 3"),
    (str, sized(str, 1), "$.f: minLength 1, was not set"),
    (sized(str, 0, 6), sized(str, 0, 5), "$.f: maxLength 5, was 6"),
    (sized(bytes, None, 6), sized(bytes, None, 5), "$.f: x-maxBytes 5, was 6"),
    (sized(bytes, 1), sized(bytes, 2), "$.f: x-minBytes 2, was 1"),
    (str, Annotated[str, Meta(pattern="^a")], "$.f: pattern '^a', was not set"),
    (Annotated[str, Meta(pattern="^b")], Annotated[str, Meta(pattern="^a")], "$.f: pattern '^a', was '^b'"),
    (str, datetime, "$.f: format 'iso-date-time', was not set"),
    (str, bytes, "$.f: contentEncoding 'base64', was not set"),
    (datetime, aware(datetime, True), "$.f: format 'date-time', was 'iso-date-time'"),
    (datetime, aware(datetime, False), "$.f: format 'date-time-local', was 'iso-date-time'"),
    (time, aware(time, False), "$.f: format 'partial-time', was 'iso-time'"),
    (datetime, date, "$.f: format 'date', was 'iso-date-time'"),
    (datetime | None, date | None, "$.f: format 'date', was 'iso-date-time'"),
    (str, uuid.UUID, "$.f: format 'uuid', was not set"),
    (str, Decimal, "$.f: format 'decimal', was not set"),
    (str, timedelta, "$.f: format 'duration', was not set"),
    (list[int | None], list[int], "$.f[...]: null isn't taken any more, only integer"),
    (
        list[list[dict[str, list[int]]]],
        list[list[dict[str, list[str]]]],
        "$.f[...][...][...][...]: was integer, is string",
    ),
    (list[Any], list[int], "$.f[...]: was anything, is integer"),
    (list[int], sized(list[int], 1), "$.f: minItems 1, was not set"),
    (list[int], sized(list[int], None, 3), "$.f: maxItems 3, was not set"),
    (sized(list[int], 2), sized(set[int], 2), "$.f: is a set now, with a least size, and equal items count once"),
    (tuple[int, str], list[int], "$.f[1]: was string, is integer"),
    (tuple[int, str], tuple[int, int], "$.f[1]: was string, is integer"),
    (tuple[int, int, int], Point, "$.f: maxItems 2, was 3"),
    (Point, tuple[int, int], "$.f: minItems 2, was 1"),
    (Pair, PairStrict, "$.f: maxItems 1, was not set"),
    (Triple, list[int], "$.f[2]: was string, is integer"),
    (dict[str, int], dict[str, str], "$.f[...]: was integer, is string"),
    (dict[str, int], dict[int, int], "$.f (a key): format 'integer', was not set"),
    (dict[MoreColor, int], dict[Color, int], "$.f (a key): 'green' isn't taken any more, only 'blue', 'red'"),
    (dict[str, int], dict[Annotated[str, Meta(min_length=1)], int], "$.f (a key): minLength 1, was not set"),
    (dict[str, int], sized(dict[str, int], 1), "$.f: minProperties 1, was not set"),
    (dict[str, int], Typed, "$.f.a: is required, and queued payloads don't have it"),
    (dict[str, str], InnerMore, "$.f.a: string isn't taken any more, only integer, null"),
    (Inner, dict[str, int], "$.f.b: was string, is integer"),
    (Inner, InnerRequires, "$.f.c: is required, and queued payloads don't have it"),
    (InnerMore, Inner, "$.f.a: null isn't taken any more, only integer"),
    (Data, InnerRequires, "$.f.c: is required, and queued payloads don't have it"),
    (Inner, InnerStrict, "$.f: unknown fields are forbidden now, and there may be some"),
    (InnerStrict, InnerStrictLess, "$.f.b: is no field any more, and unknown ones are forbidden"),
    (Inner | None, InnerRequires | None, "$.f.c: is required, and queued payloads don't have it"),
    (Cat | Dog | None, Dog | None, "$.f: Cat isn't taken any more, only Dog, null"),
    (Cat | DogWider, Cat | Dog, "$.f: DogWider isn't taken any more, only Cat, Dog"),
    (Dog, DogOther, "$.f.type: 'dog' isn't taken any more, only 'hound'"),
    (Inner, Dog, "$.f.type: is required, and queued payloads don't have it"),
    (Forest, Tree, "$.f.value: string isn't taken any more, only integer"),
    (list[Tree], list[Shrub], "$.f[...].leaf: is required, and queued payloads don't have it"),
    (list[InnerMore], list[Inner], "$.f[...].a: null isn't taken any more, only integer"),
]


@pytest.mark.parametrize(("old", "new", "what"), BREAKS)
def test_what_breaks(old: Any, new: Any, what: str) -> None:
    assert what in said(task(("f", old)), task(("f", new)))


def test_breaks_of_the_task_itself() -> None:
    """Fields are gone or new, defaults are lost, names changed. Each message is one line, with its cure."""
    old = task(("to", str), ("size", int, 0), ("note", str, ""), tag="MAIL")
    new = task(("to", str), ("size", int), ("subject", str), tag="MAIL")
    lost, came = map(str, breaks(of(old), of(new)))
    assert lost == "MAIL $.size: has lost its default; give it a default"
    assert came == (
        "MAIL $.subject: is required, and queued payloads don't have it; give it a default; "
        "if it was called 'note': msgspec.field(name='note')"
    )
    strict = task(("to", str), tag="MAIL", forbid_unknown_fields=True)
    assert said(old, strict) == [
        "$.size: is no field any more, and unknown ones are forbidden",
        "$.note: is no field any more, and unknown ones are forbidden",
        "$: unknown fields are forbidden now, and there may be some",
    ]
    assert said(old, task(("to", str), tag="MAIL")) == []


def test_types_come_and_go() -> None:
    one, two = task(name="One"), task(name="Two")
    assert breaks(of(one), of(one, two)) == []
    (found,) = breaks(of(one, two), of(one))
    assert str(found) == (
        "Two $: no handler takes this type any more; keep its handler until no such task is left, or cancel those"
    )


def test_a_task_in_a_task() -> None:
    """Inside another task it has its tag, which a payload itself has not."""
    child = task(("n", int), tag="CHILD", name="Child")
    parent = task(("child", child | None, None), name="Parent")
    found = of(parent, child)
    assert found["properties"]["CHILD"] == {
        "title": "Child", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
    }  # fmt: skip
    assert found["$defs"]["Child"]["required"] == ["$type", "n"]
    assert list(found["$defs"]) == ["Child"]
    assert json.loads(encode_payload(parent(child=child(n=1)))) == {"child": {"$type": "CHILD", "n": 1}}
    assert breaks(found, found) == []
    other = task(("n", int), tag="OTHER", name="Child")
    assert said(parent, task(("child", other | None, None), name="Parent")) == [
        "$.child.$type: 'CHILD' isn't taken any more, only 'OTHER'"
    ]


def test_the_document_is_deterministic() -> None:
    """It is the same in whatever order handlers were registered."""
    tasks = [task(("a", Inner), ("b", Cat | Dog | None, None), name=name) for name in ("B", "A", "C")]
    texts = {document.render(document.document(registry(*order))) for order in (tasks, tasks[::-1])}
    assert len(texts) == 1
    found = json.loads(texts.pop())
    assert list(found["properties"]) == ["A", "B", "C"]
    assert list(found["$defs"]) == ["Cat", "Dog", "Inner"]


def test_what_json_schema_cannot_say() -> None:
    with pytest.raises(ConfigError, match="the field 'f' is a complex, which can't be read from JSON"):
        document.document(registry(task(("f", complex))))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"$schema": "x", "properties": {}}'])
def test_what_is_no_document(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        document.parse(text)


numbered = itertools.count()  # msgspec wants classes to differ by name
