"""The handlers of an app, by the type of the task they take.

A handler, a task type or a setting that can't be is refused when it is registered, where it is written. Whether the
lifespan yields what the handlers need shows when a worker starts.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from inspect import Parameter
from typing import Any, NamedTuple, TypeGuard, Union

import msgspec

from . import settings
from .codec import type_name
from .config import check_name, in_seconds, is_int, is_number
from .cron import Cron
from .errors import ConfigError
from .lifespan import Lifespan
from .loops import awaited
from .payloads import jsonable
from .rules import rules_of
from .signature import Need, check_result, innermost, is_async, name_of, read_signature, unwrap_static
from .task import Call, Context, Middleware, Task
from .unique import check_rule

LINGER_SECONDS = 0.05


class HandlerOptions(NamedTuple):
    """The arguments of @app.handler(...)."""

    batch: int | None = None  # at most this many tasks in a call; None: it is called with one task, not with a list
    linger: float = 0.0  # seconds to gather a batch
    middleware: bool = True  # whether the app's middleware goes around it

    @classmethod
    def validated(cls, batch: object, linger: object, middleware: bool) -> HandlerOptions:
        """Raises ConfigError for an argument that can't be."""
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
        self.name = name_of(function)
        self.task = task
        self.type = type_name(task)
        self.decode: Callable[[bytes], Task] = msgspec.json.Decoder(task).decode
        self.needs = needs
        self.wants_context = bool(needs) and needs[0].type is Context and not needs[0].is_keyword
        self.is_async = is_async(function)
        self.is_plain = not (self.is_async or is_async(innermost(function)))  # it occupies a thread until it returns
        self.max_attempts = task.max_attempts
        self.backoff = in_seconds(task.backoff)
        self.timeout = in_seconds(task.timeout)
        self.around: Middleware | None = None
        self.batch, self.linger, self.middleware = options

    def call(self, task: Any, context: Any) -> Any:
        """With a task and its context; a batch handler, with lists of both."""
        return self.function(task, context) if self.wants_context else self.function(task)

    def bound(self, given: Sequence[object] | None, around: Middleware | None) -> Handler:
        """The same handler, called through the middleware `around`, and given what it needs from `given`. Raises
        ConfigError if `given` lacks that, or if middleware can't go around it."""
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
    """The handlers of an app, by type."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._middleware: list[Middleware] = []  # the outermost first
        self.lifespan: Lifespan | None = None
        self.crons: dict[str, Cron] = {}  # by name

    def bound(self, given: Sequence[object] | None) -> Registry:
        """The same handlers, ready to run: called through the middleware, and given what the lifespan yields.

        given  None: the app has no lifespan

        Raises ConfigError for a handler that needs something else.
        """
        registry = Registry()
        around = functools.reduce(_nested, self._middleware) if self._middleware else None
        registry._handlers = {handler.type: handler.bound(given, around) for handler in self._handlers.values()}
        registry.crons = self.crons
        return registry

    def surround(self, function: Middleware) -> None:
        """Put middleware around each handler, inside of the middleware added before. Raises ConfigError for a function
        that can't be middleware."""
        called = unwrap_static(function)
        try:
            inspect.signature(called).bind(None, None, None)
        except TypeError:
            fits = False
        else:
            fits = is_async(called) or is_async(innermost(called))
        if not fits:
            raise ConfigError(f"@app.middleware got {function!r}; expected: async def f(task, ctx, call) -> object")
        self._middleware.append(called)

    def add(
        self, function: Callable[..., Any], scope: Mapping[str, Any], options: HandlerOptions | None = None
    ) -> None:
        """Register a handler.

        scope  the local names that a postponed annotation may use

        Raises ConfigError for a handler without a task type, for a second handler of a type, and for a type with
        settings that can't be.
        """
        options = options or HandlerOptions()
        function = unwrap_static(function)
        task, needs = read_signature(function, scope, is_batch=options.batch is not None)
        check_task(task)
        if not (self._middleware and options.middleware) and inspect.unwrap(function) is function:
            check_result(function, scope)  # middleware or a wrapper may make JSON of any result
        handler = Handler(function, task, needs, options)
        other = self._handlers.get(handler.type)
        if other is not None and other.task is task:
            raise ConfigError(
                f"{task.__name__} has two handlers, {other.name} and {handler.name}; a type has one: let it call both"
            )
        if other is not None:
            raise ConfigError(
                f"two task classes have the type {handler.type!r}: {name_of(other.task)} and {name_of(task)}; "
                f'give one another tag: class {task.__name__}(notifyq.Task, tag="...")'
            )
        self._handlers[handler.type] = handler

    def of(self, function: Callable[..., Any]) -> Handler | None:
        """The handler that was registered with this function."""
        function = unwrap_static(function)
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
        """In the order of `types`: how many attempts each allows, unless the row says otherwise."""
        return [self._handlers[type].max_attempts for type in self.types]

    @property
    def union(self) -> Any:
        """All registered task types as one tagged union, for msgspec.json.schema and the like."""
        return Union[tuple(self._handlers[type].task for type in self.types)]  # noqa: UP007 - built at run time

    def check(self, type: str, payload: bytes, also: Iterable[str] = ()) -> Task:
        """The task of this type with this payload (JSON). Raises ConfigError unless a handler here takes it.

        also  types of other registries, which the message may suggest
        """
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


def _value(whose: str, need: Need, given: Sequence[object] | None) -> object:
    """What this parameter is given: the thing of exactly its type, or else the one that is an instance of it."""
    if need.type is None or need.type is Context:
        return need.default if need.type is None else Context
    things = given or ()
    found = [thing for thing in things if type(thing) is need.type]
    found = found or [thing for thing in things if isinstance(thing, need.type)]
    if len(found) == 1:
        return found[0]
    if not found and need.default is not Parameter.empty:
        return need.default
    listed = ", ".join(name_of(type(thing)) for thing in things) or "nothing"
    has = f"the app's lifespan yields {listed}" if given is not None else "this app has no lifespan, to yield one"
    why = f"{len(found)} things of that type" if found else "nothing of that type"
    raise ConfigError(f"handler {whose}: its parameter {need.name!r} is a {name_of(need.type)}: {why}; {has}")


def _filled(function: Callable[..., Any], needs: Sequence[Need], values: Sequence[object]) -> Callable[..., Any]:
    """`function`, to be called with a task and its Context. In `values`, the class Context stands for the latter."""
    args = [value for need, value in zip(needs, values, strict=True) if not need.is_keyword]
    named = {need.name: value for need, value in zip(needs, values, strict=True) if need.is_keyword}

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


def check_task(task: type[Task]) -> None:
    name = name_of(task)
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
