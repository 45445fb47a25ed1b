"""Handlers and task types: what is found wrong is found where it is written, with its name and the cure."""

from __future__ import annotations

import functools
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Protocol, TypeVar

import msgspec
import pytest

import notifyq
from notifyq.errors import ConfigError
from notifyq.registry import Handler, Registry

if TYPE_CHECKING:
    from decimal import Decimal

    from notifyq import Context as Ctx


class Mail(notifyq.Task, tag="MAIL"):
    to: str
    cc: list[str] = msgspec.field(default_factory=list)


class Other(notifyq.Task):
    n: int = 0


@pytest.fixture
def app() -> notifyq.App:
    return notifyq.App()


CONTEXT = notifyq.Context(id=1, queue="q", attempt=1, max_attempts=10, priority=0, created_at=datetime.now(UTC))


def only(app: notifyq.App) -> Handler:
    (type,) = app.registry.types
    handler = app.registry.get(type)
    assert handler is not None
    return handler


# --- Handlers that can be


def test_a_handler_is_returned_as_it_was(app: notifyq.App) -> None:
    async def mail(task: Mail) -> int:
        return 1

    assert app.handler(mail) is mail
    assert (only(app).type, only(app).task, only(app).is_async) == ("MAIL", Mail, True)
    assert only(app).name == "tests.app.test_registry.test_a_handler_is_returned_as_it_was.<locals>.mail"


def test_tag_and_class_name(app: notifyq.App) -> None:
    @app.handler
    async def mail(task: Mail) -> None: ...

    @app.handler
    def other(task: Other) -> None: ...

    assert app.registry.types == ["MAIL", "Other"]
    assert app.registry.max_attempts == [10, 10]


def test_a_class_of_the_same_function(app: notifyq.App) -> None:
    """Local, with a postponed annotation, as in a test or a factory."""

    class Local(notifyq.Task):
        n: int

    @app.handler
    async def local(task: Local, ctx: notifyq.Context) -> None: ...

    assert only(app).task is Local
    assert only(app).decode(b'{"n": 3}') == Local(n=3)


def one(task: Mail) -> Any:
    return [task]


def two(task: Mail, ctx: notifyq.Context) -> Any:
    return [task, ctx]


def bare(task: Mail, ctx) -> Any:  # type: ignore[no-untyped-def]
    return [task, ctx]


def for_checkers_alone(task: Mail, ctx: Ctx) -> Any:
    return [task, ctx]


def optional(task: Mail, ctx: notifyq.Context | None = None) -> Any:
    return [task, ctx]


def optional_for_checkers_alone(task: Mail, context: Context | None = None) -> Any:  # type: ignore[name-defined]  # noqa: F821
    return [task, context]


def with_a_default(task: Mail, retries: int = 3) -> Any:
    return [task, retries]


def with_anothers_context(task: Mail, context: ssl.SSLContext | None = None) -> Any:
    return [task, context]


def with_anothers_for_checkers(task: Mail, context: lib.Context | None = None) -> Any:  # type: ignore[name-defined]  # noqa: F821
    return [task, context]


def with_more(task: Mail, *args: Any, **kwargs: Any) -> Any:
    return [task, *args]


def with_options(task: Mail, *, dry: bool = False) -> Any:
    return [task, dry]


def quoted(task: "Mail") -> Any:  # noqa: UP037 - and postponed: a string in a string
    return [task]


@pytest.mark.parametrize(
    ("function", "rest"),
    [
        (one, []),
        (two, [CONTEXT]),
        (bare, [CONTEXT]),
        (for_checkers_alone, [CONTEXT]),
        (optional, [CONTEXT]),
        (optional_for_checkers_alone, [CONTEXT]),
        (with_a_default, [3]),
        (with_anothers_context, [None]),
        (with_anothers_for_checkers, [None]),
        (with_more, []),
        (with_options, [False]),
        (quoted, []),
    ],
)
def test_what_a_handler_is_called_with(app: notifyq.App, function: Callable[..., Any], rest: list[object]) -> None:
    app.handler(function)
    mail = Mail(to="a")
    assert only(app).call(mail, CONTEXT) == [mail, *rest]


class Mailer:
    async def __call__(self, task: Mail, ctx: notifyq.Context) -> None: ...

    async def method(self, task: Mail) -> None: ...

    @classmethod
    async def of_class(cls, task: Mail) -> None: ...

    @staticmethod
    async def static(task: Mail) -> None: ...


async def with_arguments(first: int, task: Mail, ctx: notifyq.Context) -> None: ...


@functools.wraps(two)
async def wrapper(*args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    "function",
    [
        Mailer(),
        Mailer().method,
        Mailer.of_class,
        Mailer.static,
        functools.partial(with_arguments, 1),
        functools.partial(functools.partial(with_arguments, 1)),
        wrapper,
    ],
    ids=["__call__", "method", "classmethod", "staticmethod", "partial", "partial of one", "wrapped"],
)
def test_all_that_can_be_called(app: notifyq.App, function: Any) -> None:
    """And each is seen to be async, or it would be run in a thread and give back a coroutine."""
    app.handler(function)
    assert only(app).task is Mail
    assert only(app).is_async


# --- Handlers that can't


class Sending(Protocol):
    def send(self) -> None: ...


def untyped(task) -> None: ...  # type: ignore[no-untyped-def]
def of_an_int(task: int) -> None: ...
def of_any_task(task: notifyq.Task) -> None: ...
def of_a_struct(task: msgspec.Struct) -> None: ...
def of_two(task: Mail | Other) -> None: ...
def of_unknown(task: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def of_checkers_alone(task: Decimal) -> None: ...
def nothing() -> None: ...
def keyword(*, task: Mail) -> None: ...
def only_more(*tasks: Mail) -> None: ...
def three(task: Mail, ctx: notifyq.Context, db: Any) -> None: ...
def needs_a_keyword(task: Mail, *, ctx: Any) -> None: ...
def of_a_database(task: Mail, db: dict[str, str]) -> None: ...
def of_another_task(task: Mail, other: Other) -> None: ...
def of_a_protocol(task: Mail, pool: Sending) -> None: ...
def of_one_of_two(task: Mail, pool: ssl.SSLContext | Mailer) -> None: ...
def of_unknown_things(task: Mail, pool: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def generator(task: Mail) -> Iterator[int]:
    yield 1


async def async_generator(task: Mail) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (untyped, "handler tests.app.test_registry.untyped: its first parameter has no type, which says what it"),
        (lambda task: None, "handler tests.app.test_registry.<lambda>: its first parameter has no type"),
        (of_an_int, "its first parameter is a <class 'int'>, expected a subclass of notifyq.Task"),
        (of_any_task, "its first parameter is a <class 'notifyq.task.Task'>, expected a subclass"),
        (of_a_struct, "its first parameter is a <class 'msgspec.Struct'>, expected a subclass"),
        (of_two, "expected a subclass of notifyq.Task"),
        (of_unknown, "can't be looked up (name 'Nowhere' is not defined); import it at run time, not under TYPE_CHECK"),
        (of_checkers_alone, "the type 'Decimal' of its first parameter can't be looked up"),
        (nothing, "handler tests.app.test_registry.nothing() -> 'None' is called with a task and a context: async"),
        (keyword, "is called with a task and a context"),
        (only_more, "is called with a task and a context"),
        (three, "handler tests.app.test_registry.three: its parameter 'db' is a 'Any'; expected notifyq.Context"),
        (needs_a_keyword, "its parameter 'ctx' is a 'Any'; expected notifyq.Context"),
        (of_a_database, "its parameter 'db' is a 'dict[str, str]'; expected notifyq.Context, or a class of which the"),
        (of_another_task, "its parameter 'other' is a 'Other'; expected"),
        (of_a_protocol, "its parameter 'pool' is a 'Sending'; expected"),
        (of_one_of_two, "its parameter 'pool' is a 'ssl.SSLContext | Mailer'; expected"),
        (of_unknown_things, "its parameter 'pool': the type 'Nowhere' can't be looked up (name 'Nowhere'"),
        (generator, "handler tests.app.test_registry.generator is a generator (it has a `yield`); a handler"),
        (async_generator, "is a generator"),
        (Mail, "@app.handler got <class 'tests.app.test_registry.Mail'>; expected a function: async def send("),
        ("mail", "@app.handler got 'mail'; expected a function"),
        (None, "@app.handler got None; expected a function"),
        (Mailer.method, "its first parameter has no type"),
    ],
)  # fmt: skip
def test_handlers_that_cannot_be(app: notifyq.App, function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        app.handler(function)
    assert app.registry.types == []


def test_two_handlers_for_one_type(app: notifyq.App) -> None:
    app.handler(one)
    message = r"^Mail has two handlers, .*\.one and .*\.two; a type has one: let it call both$"
    with pytest.raises(ConfigError, match=message):
        app.handler(two)
    assert only(app).function is one


def test_two_tasks_with_one_tag(app: notifyq.App) -> None:
    class Letter(notifyq.Task, tag="MAIL"):
        pass

    async def letter(task: Letter) -> None: ...

    app.handler(one)
    with pytest.raises(
        ConfigError,
        match=r"two task classes have the type 'MAIL': tests\.app\.test_registry\.Mail and .*Letter; "
        r'give one another tag: class Letter\(notifyq\.Task, tag="\.\.\."\)',
    ):
        app.handler(letter)


# --- Tasks that can't be

T = TypeVar("T")


def tagged(**options: Any) -> type[notifyq.Task]:
    class Tagged(notifyq.Task, **options):
        n: int = 0

    return Tagged


def with_settings(**settings: Any) -> type[notifyq.Task]:
    return type("Settings", (notifyq.Task,), settings)


class AttemptsField(notifyq.Task):
    max_attempts: int = 3  # type: ignore[misc]


class TimeoutField(notifyq.Task):
    timeout: float  # type: ignore[misc]


class Unsupported(notifyq.Task):
    both: list[int] | set[int]


class Box(notifyq.Task, Generic[T]):
    item: T


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (tagged(tag=5), "its tag is 5 in '$type'; a tag is a str, tag_field stays"),
        (tagged(tag_field="kind"), "its tag is 'Tagged' in 'kind'; a tag is a str, tag_field stays"),
        (tagged(tag=False), "its tag is None"),
        (tagged(tag=""), "type '': expected 1 to 200 characters"),
        (tagged(tag="x" * 201), "expected 1 to 200 characters, none of them NUL"),
        (tagged(tag="a\x00b"), "none of them NUL"),
        (tagged(array_like=True), "Tagged is array_like; a payload is a JSON object"),
        (AttemptsField, "AttemptsField: 'max_attempts' is a setting of the class, not a field of the payload"),
        (TimeoutField, "'timeout' is a setting of the class"),
        (with_settings(max_attempts=0), "max_attempts is 0; expected 1 to 32767"),
        (with_settings(max_attempts=32768), "max_attempts is 32768"),
        (with_settings(max_attempts="3"), "max_attempts is '3'"),
        (with_settings(max_attempts=None), "max_attempts is None"),
        (with_settings(max_attempts=True), "max_attempts is True; expected 1 to 32767"),
        (with_settings(backoff=True), "backoff is True; expected seconds, 0 or more"),
        (with_settings(timeout=True), "timeout is True; expected seconds above 0, or None"),
        (with_settings(backoff=-1), "backoff is -1; expected seconds, 0 or more"),
        (with_settings(backoff=float("nan")), "backoff is nan"),
        (with_settings(backoff="2"), "backoff is '2'"),
        (with_settings(timeout=0), "timeout is 0; expected seconds above 0, or None"),
        (with_settings(timeout=float("inf")), "timeout is inf"),
        (with_settings(timeout="1 min"), "timeout is '1 min'"),
        (Unsupported, "Unsupported: msgspec can't decode its fields: "),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be(app: notifyq.App, task: type[notifyq.Task], message: str) -> None:
    async def handler(task: Any) -> None: ...

    handler.__annotations__["task"] = task
    with pytest.raises(ConfigError, match=re.escape(message)):
        app.handler(handler)
    assert app.registry.types == []


def test_fields_whose_types_are_nowhere_at_run_time(app: notifyq.App) -> None:
    class Priced(notifyq.Task):
        price: Decimal

    async def priced(task: Priced) -> None: ...

    with pytest.raises(ConfigError, match=r"Priced: name 'Decimal' is not defined; .*define or import them there"):
        app.handler(priced)


def test_a_generic_task_is_not_one_type(app: notifyq.App) -> None:
    async def box(task: Box[int]) -> None: ...

    with pytest.raises(ConfigError, match=r"expected a subclass of notifyq\.Task"):
        app.handler(box)


def test_settings_of_a_class_are_inherited(app: notifyq.App) -> None:
    class Base(notifyq.Task):
        max_attempts = 3
        backoff = 0

    class Child(Base):
        timeout: ClassVar[float | None] = 1.5
        n: int

    @app.handler
    async def child(task: Child) -> None: ...

    handler = only(app)
    assert (handler.max_attempts, handler.backoff, handler.timeout) == (3, 0, 1.5)
    assert Child.__struct_fields__ == ("n",)


# --- The union, and decoding


def test_the_types_form_one_tagged_union(app: notifyq.App) -> None:
    app.handler(one)
    assert app.registry.union is Mail
    assert msgspec.json.decode(b'{"$type": "MAIL", "to": "a"}', type=app.registry.union) == Mail(to="a")

    @app.handler
    async def other(task: Other) -> None: ...

    found: object = msgspec.json.decode(b'{"$type": "Other"}', type=app.registry.union)
    assert found == Other()
    schema = msgspec.json.schema(app.registry.union)
    assert schema["discriminator"]["propertyName"] == "$type"


class Strict(notifyq.Task, forbid_unknown_fields=True, rename="camel"):
    at: datetime
    user_id: Annotated[int, msgspec.Meta(ge=1)]
    items: list[Mail | Other] = msgspec.field(default_factory=list)


@pytest.fixture
def registry() -> Registry:
    app = notifyq.App()

    @app.handler
    async def strict(task: Strict) -> None: ...

    app.handler(one)
    return app.registry


@pytest.mark.parametrize(
    ("type", "payload", "message"),
    [
        ("MAIL", "{}", "the payload doesn't fit MAIL: Object missing required field `to`"),
        ("MAIL", '{"to": 5}', "Expected `str`, got `int` - at `$.to`"),
        ("MAIL", '{"to": "a", "cc": ["x", null]}', "Expected `str`, got `null` - at `$.cc[1]`"),
        ("MAIL", "[]", "Expected `object`, got `array`"),
        ("MAIL", "null", "Expected `object`, got `null`"),
        ("MAIL", "{", "Input data was truncated"),
        ("MAIL", "", "Input data was truncated"),
        ("MAIL", '{"$type": "Strict", "to": "a"}', "Invalid value 'Strict' - at `$.$type`"),
        ("MAIL", '{"new": ' + "[" * 100_000, "recursion"),
        ("Strict", '{"at": "2020-01-01T00:00:00Z", "userId": 0}', "Expected `int` >= 1 - at `$.userId`"),
        ("Strict", '{"at": "soon", "userId": 1}', "Invalid RFC3339 encoded datetime - at `$.at`"),
        ("Strict", '{"at": "2020-01-01T00:00:00Z", "userId": 1, "x": 1}', "Object contains unknown field `x`"),
        ("Strict", '{"at": "2020-01-01T00:00:00Z", "userId": 1, "items": [{"$type": "No"}]}', "at `$.items[0].$type`"),
        ("MIAL", "{}", "no handler takes type 'MIAL'; did you mean MAIL?"),
        ("XYZ", "{}", "no handler takes type 'XYZ'; known types: MAIL, Strict"),
    ],
)  # fmt: skip
def test_a_payload_that_does_not_fit(registry: Registry, type: str, payload: str, message: str) -> None:
    with pytest.raises(ConfigError, match="(?i)" + re.escape(message)):
        registry.check(type, payload.encode())


@pytest.mark.parametrize(
    ("type", "payload"),
    [
        ("MAIL", '{"to": "a"}'),
        ("MAIL", '{"to": "a", "new field": [1, 2]}'),
        ("MAIL", '{"$type": "MAIL", "to": "a"}'),
        ("Strict", '{"at": "2020-01-01T00:00:00+01:00", "userId": 1, "items": [{"$type": "MAIL", "to": "x"}]}'),
    ],
)
def test_a_payload_that_fits(registry: Registry, type: str, payload: str) -> None:
    registry.check(type, payload.encode())


def test_an_empty_registry_says_so() -> None:
    with pytest.raises(ConfigError, match="no handler takes type 'X'; known types: none"):
        Registry().check("X", b"{}")
