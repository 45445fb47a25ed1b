"""Any change of any type that passes as compatible decodes queued tasks: hypothesis against msgspec."""

from __future__ import annotations

import enum
import json
import uuid
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from msgspec import Meta

import notifyq
from notifyq.payloads.compatible import breaks

from .test_compatible import aware, numbered, of, said, sized, task

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
    """Two types that are drawn alike, up to some place."""
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
    """For any two types: if nothing is said to break, payloads of the one decode as the other."""
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
