"""What goes into the payload, result and errors columns is JSON, and reads back as it was."""

from __future__ import annotations

import datetime as dt
import enum
import json
import uuid
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import notifyq
from notifyq import codec
from notifyq.client.options import Options
from notifyq.codec import describe, encode_error, encode_payload, encode_result, type_name
from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.errors import ConfigError

from ..helpers.databases import database


class Color(enum.Enum):
    RED = "red"


class Inner(msgspec.Struct):
    type: str
    n: int | None = None


class Everything(notifyq.Task, tag='A "tag"\\\n\U0001f600'):
    type: str  # a field of this name has nothing to do with the tag
    flag: bool
    number: int
    real: float
    text: str
    at: dt.datetime
    day: dt.date
    span: dt.timedelta
    key: uuid.UUID
    data: bytes
    money: Decimal
    color: Color
    maybe: str | None
    items: list[Inner]
    table: dict[str, Any]


TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    # A whole number beyond 2**53 is no float any more when it comes back from jsonb, unless its field says float.
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(-1e15, 1e15) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT | st.just("$type"), children, max_size=3),
    max_leaves=8,
)  # fmt: skip
EVERYTHING = st.builds(
    Everything,
    type=TEXT,
    flag=st.booleans(),
    number=st.integers(-(2**63), 2**64 - 1),
    real=FLOATS,
    text=TEXT,
    at=st.datetimes(timezones=st.just(dt.UTC)),
    day=st.dates(),
    span=st.timedeltas(min_value=dt.timedelta(-10_000), max_value=dt.timedelta(10_000)),
    key=st.uuids(),
    data=st.binary(max_size=20),
    money=st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12),
    color=st.just(Color.RED),
    maybe=st.none() | TEXT,
    items=st.lists(st.builds(Inner, type=TEXT, n=st.none() | st.integers(-5, 5)), max_size=3),
    table=st.dictionaries(TEXT | st.just("$type"), JSON, max_size=3),
)


@given(EVERYTHING)
def test_a_payload_comes_back_as_it_went(task: Everything) -> None:
    text = encode_payload(task)
    assert msgspec.json.Decoder(Everything).decode(text) == task
    assert list(json.loads(text)) == list(Everything.__struct_fields__), "the fields, and no tag"


@pytest.fixture(scope="module")
async def shared(server: Server, template: str) -> Any:
    """A connection to one database for all of hypothesis's examples."""
    async with database(server, template) as dsn:
        conn = await connection.connect(dsn, role="test")
        yield conn
        await conn.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(EVERYTHING, min_size=1, max_size=3))
async def test_postgresql_gives_back_what_it_was_given(shared: Any, tasks: list[Everything]) -> None:
    """jsonb orders keys, drops space and writes numbers its own way: 1e22 becomes 10000000000000000000000."""
    payloads = [encode_payload(task).decode() for task in tasks]
    types = [type_name(Everything)] * len(tasks)
    rows = await shared.fetch(SQL["enqueue_many"], types, payloads, *Options.check(queue="codec").columns, None)
    stored = await shared.fetch(
        "DELETE FROM notifyq.task WHERE id = ANY ($1) RETURNING id, payload, type", [row[0] for row in rows]
    )
    decode = msgspec.json.Decoder(Everything).decode
    back = {row["id"]: decode(row["payload"]) for row in stored if row["type"] == type_name(Everything)}
    for row, task in zip(rows, tasks, strict=True):
        found = back[row[0]]
        assert found == task


class Bare(notifyq.Task):
    pass


class Defaults(notifyq.Task, omit_defaults=True):
    a: int = 1


class Tricky(notifyq.Task, rename={"kind": "$$type", "quote": "'", "comma": ","}):
    kind: str = "x"
    quote: str = '","'
    comma: str = '{"$type":"Tricky"'


class Keyword(notifyq.Task, kw_only=True, tag=lambda name: name.upper()):
    type: str = "EVIL"


@pytest.mark.parametrize(
    ("task", "type", "payload"),
    [
        (Bare(), "Bare", {}),
        (Defaults(), "Defaults", {}),
        (Defaults(a=2), "Defaults", {"a": 2}),
        (Tricky(), "Tricky", {"$$type": "x", "'": '","', ",": '{"$type":"Tricky"'}),
        (Keyword(), "KEYWORD", {"type": "EVIL"}),
    ],
)
def test_the_tag_is_the_type_and_not_in_the_payload(task: notifyq.Task, type: str, payload: Any) -> None:
    assert type_name(task.__class__) == type
    assert json.loads(encode_payload(task)) == payload
    assert msgspec.json.Decoder(task.__class__).decode(encode_payload(task)) == task


class OtherField(notifyq.Task, tag_field="kind"):
    n: int = 5


class IntTag(notifyq.Task, tag=5):
    n: int = 5


class NoTag(notifyq.Task, tag=False):
    n: int = 5


class Array(notifyq.Task, array_like=True):
    n: int = 5


@pytest.mark.parametrize("task", [OtherField(), IntTag(), NoTag(), Array()])
def test_a_class_that_no_handler_has_checked(task: notifyq.Task) -> None:
    """If another tag were cut off than was written, fields or a whole payload would be lost without an error."""
    with pytest.raises(
        ConfigError, match="must be a JSON object with a str as its tag; leave tag_field and array_like"
    ):
        encode_payload(task)


class Holder(notifyq.Task):
    value: Any


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "task Holder can't be written as JSON: .*object"),
        (1j, "task Holder can't be written as JSON"),
        (circle(), "task Holder can't be written as JSON: .*[Rr]ecursion"),
        ("\ud800", "task Holder can't be written as JSON: .*surrogates"),
        ({object(): 1}, "task Holder can't be written as JSON"),
        ("x" * (16 * 1024 * 1024), r"task Holder: its payload is 16,777,228 bytes, the limit is 16,777,216"),
    ],
    ids=["object", "complex", "circle", "surrogate", "key", "large"],
)
def test_what_cannot_be_a_payload(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_payload(Holder(value))


@given(JSON)
def test_a_result_is_json_or_nothing(value: Any) -> None:
    text = encode_result(value)
    assert text is None if value is None else json.loads(text or b"") == value


@given(st.integers(1, 32767), st.text())
@example(1, "\x00")
@example(1, "\ud800")
@example(1, "x" * 20_000)
def test_an_error_is_always_written(attempt: int, text: str) -> None:
    """It is written without what PostgreSQL refuses, NUL and lone surrogates, and no longer than people read."""
    found = json.loads(encode_error(attempt, text))
    assert found["attempt"] == attempt
    assert "\x00" not in found["error"]
    assert len(found["error"]) <= codec.TEXT_LIMIT + 20
    if "\x00" not in text and len(text) <= codec.TEXT_LIMIT and text.isprintable():
        assert found["error"] == text
    if len(text) > codec.TEXT_LIMIT:
        assert found["error"].startswith(text[:100])
        assert found["error"].endswith(text[-100:])


async def test_postgresql_takes_every_error(shared: Any) -> None:
    for text in ("\x00", "\ud800\udfff", "\\u0000", '"', "\U0010ffff" * 9000, "\x1b[31m"):
        row = await shared.fetchval("SELECT $1::jsonb ->> 'error'", encode_error(1, text))
        assert row is not None


class Rude(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Endless(Exception):
    def __str__(self) -> str:
        return str(self)


def test_describe_never_raises() -> None:
    assert describe(ValueError("no")) == "ValueError: no"
    assert describe(ValueError()) == "ValueError"
    assert describe(KeyError("k")) == "KeyError: 'k'"
    assert describe(Rude()) == "Rude: <its __str__ raised SystemExit>"
    assert describe(Endless()) == "Endless: <its __str__ raised RecursionError>"
    assert describe(ExceptionGroup("two", [ValueError(), TypeError()])) == "ExceptionGroup: two (2 sub-exceptions)"


def deep(n: int) -> None:
    if n == 0:
        raise ValueError("at the bottom")
    other(n - 1)


def other(n: int) -> None:
    deep(n)


def test_a_traceback_keeps_its_tail() -> None:
    with pytest.raises(ValueError, match="at the bottom") as caught:
        deep(100)
    found = json.loads(encode_error(2, "oh", caught.value))["traceback"].splitlines()
    assert len(found) == codec.TRACEBACK_LINES
    assert found[-1] == "ValueError: at the bottom"
    assert any("raise ValueError" in line for line in found)
    rude = json.loads(encode_error(1, "oh", Rude()))
    assert rude["error"] == "oh"


def test_an_error_of_a_hundred_megabytes_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search through it took seconds, in which the event loop stood still."""
    lengths: list[int] = []
    storable = codec.storable

    def counted(text: str) -> str:
        lengths.append(len(text))
        return storable(text)

    monkeypatch.setattr(codec, "storable", counted)
    error = ValueError("x" * 100_000_000)
    found = json.loads(encode_error(1, describe(error), error))
    assert found["error"].startswith("ValueError: xxx")
    assert found["traceback"].endswith("xxx")
    assert max(lengths) < 10_000
