"""Which handler runs which type, and with what. Everything that can be wrong with either is found here, where it is
written; what handlers need of the lifespan, when a worker starts."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from copy import copy
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeGuard, Union, cast, get_args, get_origin

import msgspec

from . import settings
from .codec import type_name
from .config import check_name, in_seconds, is_int, is_number
from .cron import Cron
from .errors import ConfigError
from .lifespan import Lifespan
from .payloads import jsonable
from .rules import rules_of
from .task import Call, Context, Middleware, Task
from .unique import check_rule

LINGER_SECONDS = 0.05


class Need(NamedTuple):
    """A parameter of a handler beside the task, and what it is given."""

    name: str
    type: Any  # Context; a class, of which the lifespan yields an instance; None: its default
    default: Any
    keyword: bool


class HandlerOptions(NamedTuple):
    """What @app.handler(...) says."""

    batch: int | None = None  # the most tasks of a call; None: it is called with one
    linger: float = 0.0  # seconds
    middleware: bool = True

    @classmethod
    def checked(cls, batch: object, linger: object, middleware: bool) -> HandlerOptions:
        """Raises ConfigError for what can't be."""
        if batch is not None and (not is_int(batch) or not 1 <= batch <= 10_000):
            raise ConfigError(f"@app.handler(batch={batch!r}): expected 1 to 10000 tasks")
        linger = in_seconds(linger)
        if linger is not None and not (_seconds(linger) and 0 <= linger <= 3600):
            raise ConfigError(f"@app.handler(linger={linger!r}): expected seconds, 0 to 3600, or a timedelta")
        if linger is not None and batch is None:
            raise ConfigError("@app.handler(linger=...) says how long to gather a batch; expected batch= beside it")
        return cls(batch, LINGER_SECONDS if linger is None else linger, middleware)


class Handler:
    """One registered handler: how to decode its task, how to call it, and its type's settings."""

    __slots__ = (
        "around", "backoff", "batch", "decode", "function", "is_async", "is_plain", "linger", "max_attempts",
        "middleware", "name", "needs", "task", "timeout", "type", "wants_context",
    )  # fmt: skip

    def __init__(
        self, function: Callable[..., Any], task: type[Task], needs: Sequence[Need], options: HandlerOptions
    ) -> None:
        self.function = function
        self.name = _name(function)
        self.task = task
        self.type = type_name(task)
        self.decode: Callable[[bytes], Task] = msgspec.json.Decoder(task).decode
        self.needs = needs
        self.wants_context = bool(needs) and needs[0].type is Context and not needs[0].keyword
        self.is_async = _is_async(function)
        self.is_plain = not (self.is_async or _is_async(innermost(function)))  # it needs a thread until it ends
        self.max_attempts = task.max_attempts
        self.backoff = in_seconds(task.backoff)
        self.timeout = in_seconds(task.timeout)
        self.around: Middleware | None = None
        self.batch, self.linger, self.middleware = options

    def call(self, task: Any, context: Any) -> Any:
        """With a task and its context; a batch handler, with lists of both."""
        return self.function(task, context) if self.wants_context else self.function(task)

    def bound(self, given: Sequence[object] | None, around: Middleware | None) -> Handler:
        """The same, called through `around`, with what it needs of `given`. Raises ConfigError if that isn't there, or
        can't be around it."""
        handler = copy(self)
        handler.around = around if self.middleware else None
        if handler.around is not None and self.batch is not None:
            raise ConfigError(
                f"batch handler {self.name}: this app has middleware, which goes around one task; "
                "say that this one goes without: @app.handler(batch=..., middleware=False)"
            )
        if any(need.type is not None for need in self.needs[self.wants_context :]):
            values = [_value(self.name, need, given) for need in self.needs]
            handler.function, handler.wants_context = _filled(self.function, self.needs, values), True
        return handler


class Registry:
    """The handlers of an app by type. Together their tasks form one tagged union, which `union` is."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._middleware: list[Middleware] = []  # the outermost first
        self.lifespan: Lifespan | None = None
        self.crons: dict[str, Cron] = {}  # by name

    def bound(self, given: Sequence[object] | None) -> Registry:
        """The same handlers, to be run: through the middleware, and given what the lifespan yields (None: no lifespan).

        Raises ConfigError for one that needs something else.
        """
        registry = Registry()
        around = functools.reduce(_nested, self._middleware) if self._middleware else None
        registry._handlers = {handler.type: handler.bound(given, around) for handler in self._handlers.values()}
        registry.crons = self.crons
        return registry

    def surround(self, function: Middleware) -> None:
        """Put middleware around each handler, inside of what is there. Raises ConfigError for what can't be any."""
        called = _unwrapped(function)
        try:
            inspect.signature(called).bind(None, None, None)
        except TypeError:
            fits = False
        else:
            fits = _is_async(called) or _is_async(innermost(called))
        if not fits:
            raise ConfigError(f"@app.middleware got {function!r}; expected: async def f(task, ctx, call) -> object")
        self._middleware.append(called)

    def add(
        self, function: Callable[..., Any], scope: Mapping[str, Any], options: HandlerOptions | None = None
    ) -> None:
        """Register a handler; `scope` is where names of a postponed annotation may be local.

        Raises ConfigError for a handler without a task type, a second one for a type, or a type with settings
        that can't be.
        """
        options = options or HandlerOptions()
        function = _unwrapped(function)
        task, needs = _signature(function, scope, options.batch is not None)
        check_task(task)
        if not (self._middleware and options.middleware) and inspect.unwrap(function) is function:
            _check_result(function, scope)  # others may make JSON of it
        handler = Handler(function, task, needs, options)
        other = self._handlers.get(handler.type)
        if other is not None and other.task is task:
            raise ConfigError(
                f"{task.__name__} has two handlers, {other.name} and {handler.name}; a type has one: let it call both"
            )
        if other is not None:
            raise ConfigError(
                f"two task classes have the type {handler.type!r}: {_name(other.task)} and {_name(task)}; "
                f'give one another tag: class {task.__name__}(notifyq.Task, tag="...")'
            )
        self._handlers[handler.type] = handler

    def of(self, function: Callable[..., Any]) -> Handler | None:
        """The one that was registered with this function."""
        function = _unwrapped(function)
        return next((handler for handler in self._handlers.values() if handler.function is function), None)

    def get(self, type: str) -> Handler | None:
        return self._handlers.get(type)

    @property
    def handlers(self) -> list[Handler]:
        return list(self._handlers.values())

    @property
    def types(self) -> list[str]:
        """The types handled here, sorted."""
        return sorted(self._handlers)

    @property
    def max_attempts(self) -> list[int]:
        """Beside `types`: what each allows where the row doesn't say."""
        return [self._handlers[type].max_attempts for type in self.types]

    @property
    def union(self) -> Any:
        """All registered task types as one tagged union, for msgspec.json.schema and the like."""
        return Union[tuple(self._handlers[type].task for type in self.types)]  # noqa: UP007 - built at run time

    def check(self, type: str, payload: bytes, also: Iterable[str] = ()) -> Task:
        """The task of this type with this payload (JSON). Raises ConfigError unless a handler here takes it; `also` are
        other types that may have been meant."""
        handler = self._handlers.get(type)
        if handler is None:
            types = sorted({*self.types, *also})
            near = difflib.get_close_matches(type, types, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(near)}?" if near else f"known types: {', '.join(types) or 'none'}"
            raise ConfigError(f"no handler takes type {type!r}; {known}")
        return decode_as(handler.task, type, payload)


def decode_as(task: type[Task], type: str, payload: bytes) -> Task:
    """Raises ConfigError for a payload that doesn't fit."""
    try:
        return msgspec.json.decode(payload, type=task)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ConfigError(f"the payload doesn't fit {type}: {error}") from error


def _signature(function: Callable[..., Any], scope: Mapping[str, Any], batch: bool) -> tuple[type[Task], list[Need]]:
    name = _name(function)
    example = "async def send(task: SendMail) -> None, or with (task: SendMail, ctx: notifyq.Context)"
    if batch:
        example = "async def send(tasks: list[SendMail], ctxs: list[notifyq.Context]) -> None"
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"@app.handler got {function!r}; expected a function: {example}")
    parameters = list(inspect.signature(function).parameters.values())
    if _is_a(inspect.isgeneratorfunction, function) or _is_a(inspect.isasyncgenfunction, function):
        raise ConfigError(f"handler {name} is a generator (it has a `yield`); a handler returns its result")
    if not parameters or parameters[0].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        raise ConfigError(f"handler {name}{inspect.signature(function)} is called with a task and a context: {example}")
    annotation, globals = parameters[0].annotation, _globals(function)
    if annotation is Parameter.empty:
        method = parameters[0].name in ("self", "cls")
        cure = "; of a method, register what is bound: app.handler(Service().send)" if method else ""
        raise ConfigError(
            f"handler {name}: its first parameter has no type, which says what it handles: {example}{cure}"
        )
    try:
        annotation = _looked_up(annotation, globals, scope)
    except Exception as error:
        raise ConfigError(
            f"handler {name}: the type {annotation!r} of its first parameter can't be looked up ({error}); "
            "import it at run time, not under TYPE_CHECKING"
        ) from error
    item: Any = _looked_up(_item(annotation), globals, scope)
    if batch and item is None:
        raise ConfigError(
            f"handler {name}: its first parameter is a {annotation!r}; with batch= it is a list: {example}"
        )
    if not batch and isinstance(item, type) and issubclass(item, Task):
        raise ConfigError(
            f"handler {name}: its first parameter is a {annotation!r}, which a batch handler has: "
            "@app.handler(batch=100)"
        )
    annotation = cast("Any", item if batch else annotation)
    if not (isinstance(annotation, type) and issubclass(annotation, Task)) or annotation is Task:
        raise ConfigError(
            f"handler {name}: its first parameter is a {annotation!r}, expected a subclass of notifyq.Task"
        )
    rest = [p for p in parameters[1:] if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    needs: list[Need] = []
    for index, p in enumerate(rest):
        second = index == 0 and p.kind is not Parameter.KEYWORD_ONLY
        needed = _needed(f"handler {name}: its parameter {p.name!r}", p, second, batch, globals, scope)
        needs.append(Need(p.name, needed, p.default, p.kind is Parameter.KEYWORD_ONLY))
    return annotation, needs


def _needed(
    whose: str, p: Parameter, second: bool, batch: bool, globals: dict[str, Any], scope: Mapping[str, Any]
) -> Any:
    """The type of what it is given, as Need has it. Raises ConfigError for one that nothing can be given to."""
    required = p.default is Parameter.empty
    context = "list[notifyq.Context]" if batch else "notifyq.Context"
    expected = f"expected {context}, or a class of which the app's lifespan yields an instance"
    try:
        annotation = _looked_up(p.annotation, globals, scope)
    except Exception as error:  # it may exist for type checkers alone, where that is enough
        if re.search(r"(?<![\w.])(notifyq\.)?Context\b", p.annotation):
            return Context
        if not required:
            return None
        if second and p.name.strip("_") in ("ctx", "context", "ctxs", "contexts"):
            return Context
        raise ConfigError(
            f"{whose}: the type {p.annotation!r} can't be looked up ({error}); import it at run time, "
            "not under TYPE_CHECKING"
        ) from error
    if batch and _looked_up(_item(annotation), globals, scope) is Context:
        return Context
    choices = [choice for choice in _choices(annotation) if choice is not type(None)]
    if batch and Context in choices:
        raise ConfigError(f"{whose} is a {p.annotation!r}; {expected}")
    classes: list[type] = [choice for choice in choices if isinstance(choice, type)]
    maybe = not classes or not {*classes}.isdisjoint(Context.__mro__)
    if Context in choices or (required and second and maybe):
        return Context
    if len(choices) == len(classes) == 1 and _can_be_yielded(classes[0]):
        return classes[0]
    if not required:
        return None
    if p.annotation is Parameter.empty:
        raise ConfigError(f"{whose} has no type, which would say what it is given; {expected}")
    raise ConfigError(f"{whose} is a {p.annotation!r}; {expected}")


def _check_result(function: Callable[..., Any], scope: Mapping[str, Any]) -> None:
    """Raise ConfigError if it says that it returns what can't be a result."""
    try:
        annotation = _looked_up(inspect.signature(function).return_annotation, _globals(function), scope)
    except Exception:  # it may exist for type checkers alone
        return
    if annotation is not Parameter.empty:
        jsonable.check_result(f"handler {_name(function)}", annotation)


def _item(annotation: Any) -> Any:
    """X of list[X], or of Sequence[X] and what else a list is; else None."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    origin, items = get_origin(annotation), get_args(annotation)
    return items[0] if isinstance(origin, type) and issubclass(list, origin) and len(items) == 1 else None


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The classes of a union, as far as there are any behind Annotated and [...]."""
    if annotation in (Parameter.empty, Any):
        return ()
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return (cast("object", origin or annotation),)


def _can_be_yielded(choice: type) -> bool:
    try:
        isinstance(None, choice)  # a Protocol that isn't runtime_checkable can't be asked
    except TypeError:
        return False
    return choice.__module__ != "builtins" and not issubclass(choice, Task)


def _looked_up(annotation: Any, globals: dict[str, Any], scope: Mapping[str, Any]) -> Any:
    """What a postponed annotation, or one in quotes, or both, stands for. Raises whatever its names raise."""
    while isinstance(annotation, str):
        try:
            annotation = eval(annotation, globals, dict(scope))
        except TypeError:  # Pool[Record], of a class that can be subscripted in its stubs alone: asyncpg's can
            name, bracket, _ = annotation.partition("[")
            if not bracket:
                raise
            annotation = eval(name, globals, dict(scope))
    return annotation


def _value(whose: str, need: Need, given: Sequence[object] | None) -> object:
    """What it is given: the one of its very type, or else the one of its kind."""
    if need.type is None or need.type is Context:
        return need.default if need.type is None else Context
    things = given or ()
    found = [thing for thing in things if type(thing) is need.type]
    found = found or [thing for thing in things if isinstance(thing, need.type)]
    if len(found) == 1:
        return found[0]
    if not found and need.default is not Parameter.empty:
        return need.default
    listed = ", ".join(_name(type(thing)) for thing in things) or "nothing"
    has = f"the app's lifespan yields {listed}" if given is not None else "this app has no lifespan, to yield one"
    why = f"{len(found)} things of that type" if found else "nothing of that type"
    raise ConfigError(f"handler {whose}: its parameter {need.name!r} is a {_name(need.type)}: {why}; {has}")


def _filled(function: Callable[..., Any], needs: Sequence[Need], values: Sequence[object]) -> Callable[..., Any]:
    """`function`, to be called with a task and its Context, which stands in `values` where it belongs."""
    args = [value for need, value in zip(needs, values, strict=True) if not need.keyword]
    named = {need.name: value for need, value in zip(needs, values, strict=True) if need.keyword}

    def call(task: Task, context: Context) -> Any:
        more = {name: context if value is Context else value for name, value in named.items()}
        return function(task, *(context if value is Context else value for value in args), **more)

    return call


def _nested(outer: Middleware, inner: Middleware) -> Middleware:
    async def both(task: Task, context: Context, call: Call) -> object:
        async def rest(task: Task, context: Context) -> object:
            return await awaited(inner(task, context, call))

        return await outer(task, context, rest)

    return both


def is_awaitable(value: object) -> bool:
    """Whether it is a coroutine, or anything else to await. Every result is asked, so this is quick: 0.05 µs."""
    return hasattr(type(value), "__await__")


async def awaited(value: object) -> object:
    """What comes of awaiting `value`, and what that returns, until there is nothing more to await.

    A plain wrapper around an `async def` returns a coroutine, and so does an `async def` that forgot an `await`.
    """
    while is_awaitable(value):
        value = await cast("Awaitable[object]", value)
    return value


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a staticmethod: in the body of its class a decorator is given the descriptor."""
    while isinstance(function, staticmethod):
        function = function.__func__
    return function


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it does nothing but make a coroutine. What a plain wrapper does is known when it has run."""
    return _is_a(inspect.iscoroutinefunction, function)


def _is_a(kind: Callable[[object], bool], function: Callable[..., Any]) -> bool:
    """Whether a function, or the __call__ of an object, is of this kind, inside of partials too."""
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, inside of partials and wrappers."""
    inner: Callable[..., Any] = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return inner


def _globals(function: Callable[..., Any]) -> dict[str, Any]:
    """Of the module where it was written, through partials, wrappers and objects with a __call__."""
    inner = innermost(function)
    found: dict[str, Any] = getattr(inner, "__globals__", None) or getattr(type(inner).__call__, "__globals__", {})
    return found


def check_task(task: type[Task]) -> None:
    name = _name(task)
    config = task.__struct_config__
    if not isinstance(config.tag, str) or config.tag_field != "$type":
        raise ConfigError(
            f"task {name}: its tag is {config.tag!r} in {config.tag_field!r}; a tag is a str, tag_field stays"
        )
    check_name("type", config.tag)
    if config.array_like:
        raise ConfigError(f"task {name} is array_like; a payload is a JSON object")
    for setting in ("max_attempts", "backoff", "timeout", "unique", "unique_for", "unique_states", "on_conflict"):
        if setting in task.__struct_fields__:
            raise ConfigError(
                f"task {name}: {setting!r} is a setting of the class, not a field of the payload; write "
                f"`{setting} = ...` without an annotation, or name the field otherwise"
            )
    attempts, backoff, timeout = task.max_attempts, in_seconds(task.backoff), in_seconds(task.timeout)
    if not is_int(attempts) or not 1 <= attempts <= 32767:
        raise ConfigError(f"task {name}: max_attempts is {attempts!r}; expected 1 to 32767")
    if not _seconds(backoff) or backoff < 0:
        raise ConfigError(f"task {name}: backoff is {backoff!r}; expected seconds, 0 or more, or a timedelta")
    if timeout is not None and (not _seconds(timeout) or timeout <= 0):
        raise ConfigError(f"task {name}: timeout is {timeout!r}; expected seconds above 0, or None")
    settings.check(task)
    check_rule(task)
    rules_of(task)
    jsonable.decoder(task)


def _seconds(value: object) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
