"""Fields and results that JSON can't hold are refused where the handler is registered, with the cure."""

from __future__ import annotations

import abc
import collections
import dataclasses
import datetime
import functools
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypedDict

import msgspec
import pytest

import notifyq
from notifyq import ConfigError, Task
from notifyq.testing import run_inline

if TYPE_CHECKING:
    from decimal import Decimal

CURE = "a msgspec.Struct, a dataclass or a TypedDict"


class Money:
    """A type that msgspec doesn't know."""


class Model:
    """A class as pydantic makes them."""

    __pydantic_fields__: ClassVar[dict[str, object]] = {}


class Code(str):
    __slots__ = ()


class Closed(Protocol):
    def close(self) -> None: ...


class Line(msgspec.Struct):
    price: Money


class Basket(TypedDict):
    lines: list[Line]


@dataclasses.dataclass
class Address:
    street: str


class Event(abc.ABC):  # noqa: B024
    """Its subclasses can be written."""


@dataclasses.dataclass
class Sent(Event):
    to: str


class Plain(Task):
    n: int = 0


class Direct(Task):
    price: Money


class Listed(Task):
    prices: list[Money | None]


class Nested(Task):
    basket: Basket


class AsKey(Task):
    prices: dict[Money, int]


class Either(Task):
    price: Money | int


class OfPydantic(Task):
    user: Model


class Text(Task):
    code: Code


class Queued(Task):
    items: collections.deque[int]


class Shaped(Task):
    thing: Closed


class Called(Task):
    back: Callable[[], int]


class Misspelt(Task):
    at: datetime.Datetime  # type: ignore[name-defined]  # pyright: ignore


class NoSyntax(Task):
    at: "int |"  # type: ignore[valid-type]  # noqa: F722  # pyright: ignore


class Unimported(Task):
    price: Decimal


class Fine(Task):
    any: Any
    thing: object
    key: Hashable
    items: Iterable[int]
    some: Sequence[Address]
    unset: int | msgspec.UnsetType = msgspec.UNSET


FIELDS: list[tuple[type[Task], str]] = [
    (Direct, rf"the field 'price' is a .*Money, which can't be read from JSON; make it {CURE}"),
    (Listed, "the field 'prices' is a .*Money"),
    (Nested, "the field 'price' of Line is a .*Money"),
    (AsKey, "the field 'prices' is a .*Money"),
    (Either, f"custom type.*Money.*; make it {CURE}"),
    (OfPydantic, rf"the field 'user' is a .*Model.*; make it {CURE}, or a dict: model_dump\("),
    (Text, "the field 'code' is a .*Code"),
    (Queued, "the field 'items' is a collections.deque"),
    (Shaped, "the field 'thing' is a .*Closed"),
    (Called, "the field 'back' is a collections.abc.Callable"),
    (Misspelt, "Misspelt: .*AttributeError: module 'datetime' has no attribute 'Datetime'"),
    (NoSyntax, "NoSyntax: .*SyntaxError"),
    (Unimported, "Unimported: name 'Decimal' is not defined; .* define or import them there"),
]


@pytest.mark.parametrize(("task", "words"), FIELDS, ids=lambda value: getattr(value, "__name__", ""))
def test_fields_that_cannot_be_filled(task: type[Task], words: str) -> None:
    async def handler(task: Any) -> None: ...

    handler.__annotations__["task"] = task
    with pytest.raises(ConfigError, match=words):
        notifyq.App().handler(handler)


@pytest.mark.anyio
async def test_enqueue_says_so_of_a_class_without_a_handler(dsn: str) -> None:
    app = notifyq.App()

    async with app.connect(dsn):
        with pytest.raises(ConfigError, match=f"Unset: the field 'price' is a .*Money.*{CURE}"):
            await app.enqueue(Unset())


class Unset(Task):
    price: Money | None = None


@pytest.mark.anyio
async def test_what_json_has_is_taken_by_its_abstract_names() -> None:
    app = notifyq.App()

    @app.handler
    async def fine(task: Fine) -> list[object]:
        return [task.any, task.thing, task.key, list(task.items), task.some, task.unset is msgspec.UNSET]

    ran = await run_inline(app, Fine(1, {"a": 1}, "k", [1, 2], [Address("x")]))
    assert ran.result == [1, {"a": 1}, "k", [1, 2], [{"street": "x"}], True]


RESULTS: list[tuple[Any, str]] = [
    (Money, f"its result is a .*Money, which can't be written as JSON; make it {CURE}"),
    (Money | None, "its result is a .*Money"),
    (list[Money], "its result is a .*Money"),
    (dict[str, Sequence[Money | notifyq.Retry]], "its result is a .*Money"),
    (Basket, "the field 'price' of Line of its result is a .*Money"),
    (Model, r"its result is a .*Model.*model_dump\("),
    (Code, "its result is a .*Code"),
    ("Money", "its result is a .*Money"),
    (complex, "its result is a complex"),
]


@pytest.mark.parametrize(("annotation", "words"), RESULTS, ids=str)
def test_results_that_cannot_be_written(annotation: Any, words: str) -> None:
    async def handler(task: Plain) -> Any: ...

    handler.__annotations__["return"] = annotation
    with pytest.raises(ConfigError, match=words):
        notifyq.App().handler(handler)


@pytest.mark.parametrize(
    "annotation",
    [
        None, Any, object, NoReturn, int, Address, Event, Sent, Closed, "Nowhere", "int |", Iterable[int], Hashable,
        collections.OrderedDict[str, int], Awaitable[Money], notifyq.Dead, int | notifyq.Cancel | None, "Iterator[int]",
        bytearray, tuple[int, ...], Address | int | dict[str, int],
    ],
    ids=str,
)  # fmt: skip
def test_annotations_that_say_nothing_against_it(annotation: Any) -> None:
    async def handler(task: Plain) -> Any: ...

    handler.__annotations__["return"] = annotation
    notifyq.App().handler(handler)


@pytest.mark.anyio
async def test_a_wrapper_or_a_middleware_may_make_json_of_a_result() -> None:
    def as_text(function: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[str]]:
        @functools.wraps(function)
        async def wrapper(*args: Any) -> str:
            return type(await function(*args)).__name__

        return wrapper

    async def money(task: Plain) -> Money:
        return Money()

    wrapped = notifyq.App()
    wrapped.handler(as_text(money))
    assert (await run_inline(wrapped, Plain())).result == "Money"

    around = notifyq.App()

    @around.middleware
    async def named(task: Task, ctx: notifyq.Context, call: Any) -> object:
        return type(await call(task, ctx)).__name__

    around.handler(money)
    assert (await run_inline(around, Plain())).result == "Money"
    with pytest.raises(ConfigError, match=r"its result is a .*Money"):
        around.handler(middleware=False)(money)
