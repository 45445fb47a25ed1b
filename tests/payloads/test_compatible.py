"""Which changes of a task's type break what is queued: by a table of changes, and against msgspec with any types."""

from __future__ import annotations

import enum
import itertools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
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
    """Fields gone and come, defaults lost, names changed; each with its cure, in one line."""
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
    """There it has its tag, which the payload itself has not."""
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
    """Whatever the order in which handlers were registered."""
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


# --------------------------------------------------------------------------------------- against real decoding

numbered = itertools.count()  # msgspec wants classes to differ by name
EXAMPLES = 100  # 6,000 were tried
Typing = tuple[Any, st.SearchStrategy[Any]]  # a type, and JSON that its schema allows


def numbers(draw: st.DrawFn) -> Typing:
    kind = draw(st.sampled_from([int, float]))
    low, high = draw(st.none() | st.integers(-3, 3)), draw(st.none() | st.integers(5, 9))
    over, under = draw(st.booleans()), draw(st.booleans())
    limits: dict[str, Any] = {("gt" if over else "ge"): low, ("lt" if under else "le"): high}
    first, last = (low if low is not None else -20), (high if high is not None else 20)
    values = st.integers(first + (over and low is not None), last - (under and high is not None))
    return Annotated[kind, Meta(**limits)], values if kind is int else values | values.map(float)


def texts(draw: st.DrawFn) -> Typing:
    low, high = draw(st.integers(0, 2)), draw(st.none() | st.integers(2, 4))
    return sized(str, low, high), st.text("ab", min_size=low, max_size=4 if high is None else high)


def moments(draw: st.DrawFn) -> Typing:
    found: Typing = draw(
        st.sampled_from([
            (datetime, st.sampled_from(["2030-01-01T00:00:00", "2030-01-01T00:00:00Z"])),
            (aware(datetime, True), st.just("2030-01-01T00:00:00Z")),
            (aware(datetime, False), st.just("2030-01-01T00:00:00")),
            (date, st.just("2030-01-01")),
            (time, st.sampled_from(["01:02:03", "01:02:03Z"])),
            (aware(time, True), st.just("01:02:03Z")),
            (uuid.UUID, st.just("12345678-1234-5678-1234-567812345678")),
            (Decimal, st.just("1.5")),
            (bytes, st.sampled_from(["", "YWI=", "YWJjZA=="])),
            (sized(bytes, 1, 2), st.sampled_from(["YQ==", "YWI="])),
            (sized(bytes, None, 3), st.sampled_from(["", "YWI=", "YWJj"])),
        ])
    )  # fmt: skip
    return found


def words(draw: st.DrawFn) -> Typing:
    values = draw(st.lists(st.sampled_from(["a", "b", "ab", 1, 2]), min_size=1, max_size=3, unique=True))
    if draw(st.booleans()):
        values = [value for value in values if isinstance(value, str)] or ["a"]
        return enum.Enum(f"E{next(numbered)}", {f"m{value}": value for value in values}), st.sampled_from(values)
    return Literal[tuple(values)], st.sampled_from(values)


def plain(draw: st.DrawFn) -> Typing:
    return draw(st.sampled_from([(bool, st.booleans()), (Any, st.sampled_from([1, "a", None, [], {}]))]))


def leaf(draw: st.DrawFn) -> Typing:
    make: Callable[[st.DrawFn], Typing] = draw(st.sampled_from([numbers, texts, moments, words, plain]))
    return make(draw)


def struct(draw: st.DrawFn, depth: int, tag: str | None = None) -> Typing:
    fields: list[Any] = []
    required: dict[str, Any] = {}
    optional: dict[str, Any] = {}
    strict = draw(st.booleans())
    for name in draw(st.lists(st.sampled_from("abcd"), max_size=3, unique=True)):
        of, values = typing(draw, depth - 1)
        if draw(st.booleans()):
            fields.append((name, of))
            required[name] = values
        else:
            fields.append((name, of | msgspec.UnsetType if of is not Any else of, msgspec.UNSET))
            optional[name] = values
    if tag:
        required["type"] = st.just(tag)
    cls = msgspec.defstruct(f"S{next(numbered)}", fields, kw_only=True, tag=tag, forbid_unknown_fields=strict)
    return cls, st.fixed_dictionaries(required, optional=optional)


def typing(draw: st.DrawFn, depth: int) -> Typing:
    shape = draw(
        st.sampled_from(["leaf", "leaf", "none", "list", "dict", "tuple", "struct", "tagged"] if depth else ["leaf"])
    )
    match shape:
        case "none":
            of, values = typing(draw, depth - 1)
            return (of | None if of is not Any else of), values | st.none()
        case "list":
            of, values = typing(draw, depth - 1)
            low, high = draw(st.integers(0, 1)), draw(st.none() | st.integers(1, 2))
            return sized(list[of], low, high), st.lists(values, min_size=low, max_size=2 if high is None else high)  # type: ignore[valid-type]
        case "dict":
            of, values = typing(draw, depth - 1)
            keys, names = draw(
                st.sampled_from([
                    (str, st.text("abc", max_size=2)),
                    (sized(str, 1), st.text("abc", min_size=1, max_size=2)),
                    (int, st.integers(0, 3).map(str)),
                ])
            )  # fmt: skip
            return dict[keys, of], st.dictionaries(names, values, max_size=2)  # type: ignore[valid-type]
        case "tuple":
            items = [typing(draw, depth - 1) for _ in range(draw(st.integers(1, 2)))]
            return tuple[tuple(of for of, _ in items)], st.tuples(*(values for _, values in items)).map(list)  # type: ignore[misc]
        case "struct":
            return struct(draw, depth)
        case "tagged":
            tags = draw(st.lists(st.sampled_from(["x", "y", "z"]), min_size=2, max_size=3, unique=True))
            members = [struct(draw, depth, tag) for tag in tags]
            union = members[0][0]
            for of, _ in members[1:]:
                union |= of
            return union, st.one_of(*(values for _, values in members))
        case _:
            return leaf(draw)


@st.composite
def types(draw: st.DrawFn) -> Typing:
    return typing(draw, 2)


@st.composite
def changed(draw: st.DrawFn) -> tuple[Typing, Typing]:
    """Two types that are chosen alike, up to somewhere."""
    choices: list[Any] = []

    def first(strategy: st.SearchStrategy[Any]) -> Any:
        choices.append(draw(strategy))
        return choices[-1]

    old = typing(first, 2)  # type: ignore[arg-type]
    same = iter(choices[: draw(st.integers(0, len(choices)))])
    rest = object()

    def again(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(strategy) if (choice := next(same, rest)) is rest else choice

    return old, typing(again, 2)  # type: ignore[arg-type]


def as_task(of: Any) -> type[notifyq.Task]:
    return task(("f", of))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(changed(), st.data())
def test_what_passes_decodes(both: tuple[Typing, Typing], data: st.DataObject) -> None:
    """Whatever two types: if nothing is said to break, payloads of the one decode as the other."""
    (old, values), (new, _) = both
    before, after = as_task(old), as_task(new)
    found = breaks(of(before), of(after))
    event("breaks" if found else "compatible")
    for _ in range(3):
        payload = json.dumps({"f": data.draw(values)}).encode()
        msgspec.json.decode(payload, type=before)
        if not found:
            msgspec.json.decode(payload, type=after)


@settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(types())
def test_no_change_breaks_nothing(old: Typing) -> None:
    assert breaks(of(as_task(old[0])), of(as_task(old[0]))) == []


@settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(types(), st.data())
def test_what_is_widened_breaks_nothing(old: Typing, data: st.DataObject) -> None:
    of = old[0]
    assume(of is not Any)
    wider = data.draw(st.sampled_from([Any, of | None]))
    assert said(as_task(of), as_task(wider)) == []
