"""Which handler runs which type. Everything that can be wrong with either is found here, where it is written."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args

import msgspec

from .codec import type_name
from .config import check_name
from .errors import ConfigError
from .task import Context, Task


class Handler:
    """One registered handler: how to decode its task, how to call it, and its type's settings."""

    __slots__ = (
        "backoff", "decode", "function", "is_async", "max_attempts", "name", "task", "timeout", "type", "wants_context",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any], task: type[Task], wants_context: bool) -> None:
        self.function = function
        self.name = _name(function)
        self.task = task
        self.type = type_name(task)
        self.decode: Callable[[bytes], Task] = msgspec.json.Decoder(task).decode
        self.wants_context = wants_context
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
        )
        self.max_attempts = task.max_attempts
        self.backoff = task.backoff
        self.timeout = task.timeout

    def call(self, task: Task, context: Context) -> Any:
        return self.function(task, context) if self.wants_context else self.function(task)


class Registry:
    """The handlers of an app by type. Together their tasks form one tagged union, which `union` is."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def add(self, function: Callable[..., Any], scope: Mapping[str, Any]) -> None:
        """Register a handler; `scope` is where names of a postponed annotation may be local.

        Raises ConfigError for a handler without a task type, a second one for a type, or a type with settings
        that can't be.
        """
        task, wants_context = _signature(function, scope)
        _check_task(task)
        handler = Handler(function, task, wants_context)
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

    def get(self, type: str) -> Handler | None:
        return self._handlers.get(type)

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

    def check(self, type: str, payload: bytes) -> None:
        """Raise ConfigError unless a handler here takes this type with this payload (JSON)."""
        handler = self._handlers.get(type)
        if handler is None:
            near = difflib.get_close_matches(type, self._handlers, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(near)}?" if near else f"known types: {', '.join(self.types) or 'none'}"
            raise ConfigError(f"no handler takes type {type!r}; {known}")
        try:
            handler.decode(payload)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ConfigError(f"the payload doesn't fit {type}: {error}") from error


def _signature(function: Callable[..., Any], scope: Mapping[str, Any]) -> tuple[type[Task], bool]:
    name = _name(function)
    example = "async def send(task: SendMail) -> None, or with (task: SendMail, ctx: notifyq.Context)"
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"@app.handler got {function!r}; expected a function: {example}")
    parameters = list(inspect.signature(function).parameters.values())
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"handler {name} is a generator (it has a `yield`); a handler returns its result")
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not positional or len(required) > 2 or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise ConfigError(f"handler {name}{inspect.signature(function)} is called with a task and a context: {example}")
    annotation, globals = positional[0].annotation, _globals(function)
    if annotation is inspect.Parameter.empty:
        raise ConfigError(f"handler {name}: its first parameter has no type, which says what it handles: {example}")
    while isinstance(annotation, str):  # postponed, or in quotes, or both
        try:
            annotation = eval(annotation, globals, dict(scope))
        except Exception as error:
            raise ConfigError(
                f"handler {name}: the type {annotation!r} of its first parameter can't be looked up ({error}); "
                "import it at run time, not under TYPE_CHECKING"
            ) from error
    if not (isinstance(annotation, type) and issubclass(annotation, Task)) or annotation is Task:
        raise ConfigError(
            f"handler {name}: its first parameter is a {annotation!r}, expected a subclass of notifyq.Task"
        )
    if len(positional) == 1:
        return annotation, False
    second = positional[1]
    needed, fits = second.default is second.empty, _is_context(second.annotation, globals, scope)
    if needed and fits is False:
        raise ConfigError(
            f"handler {name}: its second parameter is a {second.annotation!r}, but it is given a notifyq.Context"
        )
    return annotation, needed or fits is True


def _is_context(annotation: Any, globals: dict[str, Any], scope: Mapping[str, Any]) -> bool | None:
    """Whether a Context fits; None: who knows. Its name may exist for type checkers alone."""
    while isinstance(annotation, str):
        try:
            annotation = eval(annotation, globals, dict(scope))
        except Exception:
            return True if re.search(r"(?<![\w.])(notifyq\.)?Context\b", annotation) else None
    if annotation in (inspect.Parameter.empty, Any):
        return None
    choices = get_args(annotation) or (annotation,)
    if Context in choices:
        return True
    return False if all(isinstance(choice, type) and not issubclass(Context, choice) for choice in choices) else None


def _globals(function: Callable[..., Any]) -> dict[str, Any]:
    """Of the module where it was written, through partials, wrappers and objects with a __call__."""
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    found: dict[str, Any] = getattr(inner, "__globals__", None) or getattr(type(inner).__call__, "__globals__", {})
    return found


def _check_task(task: type[Task]) -> None:
    name = _name(task)
    config = task.__struct_config__
    if not isinstance(config.tag, str) or config.tag_field != "$type":
        raise ConfigError(
            f"task {name}: its tag is {config.tag!r} in {config.tag_field!r}; a tag is a str, tag_field stays"
        )
    check_name("type", config.tag)
    if config.array_like:
        raise ConfigError(f"task {name} is array_like; a payload is a JSON object")
    for setting in ("max_attempts", "backoff", "timeout"):
        if setting in task.__struct_fields__:
            raise ConfigError(
                f"task {name}: {setting!r} is a setting of the class, not a field of the payload; write "
                f"`{setting} = ...` without an annotation, or name the field otherwise"
            )
    attempts, backoff, timeout = task.max_attempts, task.backoff, task.timeout
    if not isinstance(attempts, int) or not 1 <= attempts <= 32767:
        raise ConfigError(f"task {name}: max_attempts is {attempts!r}; expected 1 to 32767")
    if not _seconds(backoff) or backoff < 0:
        raise ConfigError(f"task {name}: backoff is {backoff!r}; expected seconds, 0 or more")
    if timeout is not None and (not _seconds(timeout) or timeout <= 0):
        raise ConfigError(f"task {name}: timeout is {timeout!r}; expected seconds above 0, or None")
    try:
        msgspec.json.Decoder(task)
    except NameError as error:
        raise ConfigError(
            f"task {name}: {error}; the types of fields are looked up in its module at run time, so define or import "
            "them there"
        ) from error
    except TypeError as error:
        raise ConfigError(f"task {name}: msgspec can't decode its fields: {error}") from error


def _seconds(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
