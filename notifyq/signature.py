"""What a handler's signature says: which task it takes, and what else it is given.

Everything that can be wrong with a signature is found when the handler is registered, where it is written.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, cast, get_args, get_origin

from .errors import ConfigError
from .payloads import jsonable
from .task import Context, Task


class Need(NamedTuple):
    """A parameter of a handler after the task, and what it is given."""

    name: str
    type: Any  # Context; a class, of which the lifespan yields an instance; None: the parameter's default
    default: Any
    is_keyword: bool


class Signature(NamedTuple):
    task: type[Task]
    needs: list[Need]


class _Reader(NamedTuple):
    """Looks up the annotations of one handler, and names it in errors."""

    name: str
    is_batch: bool
    globals: dict[str, Any]
    scope: Mapping[str, Any]

    def look_up(self, annotation: Any) -> Any:
        """What an annotation stands for that is postponed, in quotes, or both. Raises whatever its names raise."""
        while isinstance(annotation, str):
            try:
                annotation = eval(annotation, self.globals, dict(self.scope))
            except TypeError:  # Pool[Record], of a class that only its stubs let be subscripted, as asyncpg's do
                name, bracket, _ = annotation.partition("[")
                if not bracket:
                    raise
                annotation = eval(name, self.globals, dict(self.scope))
        return annotation

    def look_up_item(self, annotation: Any) -> Any:
        """X of list[X], or of Sequence[X] and other types that a list has; else None."""
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        origin, items = get_origin(annotation), get_args(annotation)
        is_list = isinstance(origin, type) and issubclass(list, origin) and len(items) == 1
        return self.look_up(items[0]) if is_list else None


def read_signature(function: Callable[..., Any], scope: Mapping[str, Any], *, is_batch: bool) -> Signature:
    """The task and the needs of a handler. Raises ConfigError for a function that can't be one.

    scope  the local names that an annotation may use
    """
    example = "async def send(task: SendMail) -> None, or with (task: SendMail, ctx: notifyq.Context)"
    if is_batch:
        example = "async def send(tasks: list[SendMail], ctxs: list[notifyq.Context]) -> None"
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"@app.handler got {function!r}; expected a function: {example}")
    name = name_of(function)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if _is_a(inspect.isgeneratorfunction, function) or _is_a(inspect.isasyncgenfunction, function):
        raise ConfigError(f"handler {name} is a generator (it has a `yield`); a handler returns its result")
    if not parameters or parameters[0].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        raise ConfigError(f"handler {name}{signature} is called with a task and a context: {example}")
    reader = _Reader(name, is_batch, _globals(function), scope)
    task = _read_task(reader, parameters[0], example)
    needs: list[Need] = []
    rest = [p for p in parameters[1:] if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    for index, p in enumerate(rest):
        is_keyword = p.kind is Parameter.KEYWORD_ONLY
        needed = _read_need(reader, p, is_second=index == 0 and not is_keyword)
        needs.append(Need(p.name, needed, p.default, is_keyword))
    return Signature(task, needs)


def check_result(function: Callable[..., Any], scope: Mapping[str, Any]) -> None:
    """Raise ConfigError if the function is annotated with a type that can't be a result."""
    name = name_of(function)
    try:
        annotation = inspect.signature(function).return_annotation
        annotation = _Reader(name, False, _globals(function), scope).look_up(annotation)
    except Exception:  # it may exist for type checkers only
        return
    if annotation is not Parameter.empty:
        jsonable.check_result(f"handler {name}", annotation)


def _read_task(reader: _Reader, p: Parameter, example: str) -> type[Task]:
    """The type of the first parameter; of a batch handler, that of its items."""
    name, annotation = reader.name, p.annotation
    if annotation is Parameter.empty:
        is_method = p.name in ("self", "cls")
        cure = "; of a method, register what is bound: app.handler(Service().send)" if is_method else ""
        raise ConfigError(
            f"handler {name}: its first parameter has no type, which says what it handles: {example}{cure}"
        )
    try:
        annotation = reader.look_up(annotation)
    except Exception as error:
        raise ConfigError(
            f"handler {name}: the type {annotation!r} of its first parameter can't be looked up ({error}); "
            "import it at run time, not under TYPE_CHECKING"
        ) from error
    item = reader.look_up_item(annotation)
    if reader.is_batch and item is None:
        raise ConfigError(
            f"handler {name}: its first parameter is a {annotation!r}; with batch= it is a list: {example}"
        )
    if not reader.is_batch and isinstance(item, type) and issubclass(item, Task):
        raise ConfigError(
            f"handler {name}: its first parameter is a {annotation!r}, which a batch handler has: "
            "@app.handler(batch=100)"
        )
    task = cast("Any", item if reader.is_batch else annotation)
    if not (isinstance(task, type) and issubclass(task, Task)) or task is Task:
        raise ConfigError(f"handler {name}: its first parameter is a {task!r}, expected a subclass of notifyq.Task")
    return task


def _read_need(reader: _Reader, p: Parameter, *, is_second: bool) -> Any:
    """What Need.type is for this parameter. Raises ConfigError if nothing can be given to it."""
    whose = f"handler {reader.name}: its parameter {p.name!r}"
    is_required = p.default is Parameter.empty
    context = "list[notifyq.Context]" if reader.is_batch else "notifyq.Context"
    expected = f"expected {context}, or a class of which the app's lifespan yields an instance"
    try:
        annotation = reader.look_up(p.annotation)
    except Exception as error:  # it may exist for type checkers only, which is enough for a Context and for a default
        if re.search(r"(?<![\w.])(notifyq\.)?Context\b", p.annotation):
            return Context
        if not is_required:
            return None
        if is_second and p.name.strip("_") in ("ctx", "context", "ctxs", "contexts"):
            return Context
        raise ConfigError(
            f"{whose}: the type {p.annotation!r} can't be looked up ({error}); import it at run time, "
            "not under TYPE_CHECKING"
        ) from error
    if reader.is_batch and reader.look_up_item(annotation) is Context:
        return Context
    choices = [choice for choice in _choices(annotation) if choice is not type(None)]
    if reader.is_batch and Context in choices:
        raise ConfigError(f"{whose} is a {p.annotation!r}; {expected}")
    classes: list[type] = [choice for choice in choices if isinstance(choice, type)]
    may_be_context = not classes or not {*classes}.isdisjoint(Context.__mro__)
    if Context in choices or (is_required and is_second and may_be_context):
        return Context
    if len(choices) == len(classes) == 1 and _can_be_yielded(classes[0]):
        return classes[0]
    if not is_required:
        return None
    if p.annotation is Parameter.empty:
        raise ConfigError(f"{whose} has no type, which would say what it is given; {expected}")
    raise ConfigError(f"{whose} is a {p.annotation!r}; {expected}")


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The classes of a union, without Annotated and without what stands in [...]."""
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
        isinstance(None, choice)  # raises for a Protocol that isn't runtime_checkable
    except TypeError:
        return False
    return choice.__module__ != "builtins" and not issubclass(choice, Task)


# Functions behind wrappers.


def unwrap_static(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a staticmethod. In the body of its class, a decorator gets the descriptor."""
    while isinstance(function, staticmethod):
        function = function.__func__
    return function


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, inside of partials and wrappers."""
    inner: Callable[..., Any] = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return inner


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call only makes a coroutine. A plain wrapper may return one too, which only its call shows."""
    return _is_a(inspect.iscoroutinefunction, function)


def _is_a(kind: Callable[[object], bool], function: Callable[..., Any]) -> bool:
    """Whether a function, or the __call__ of an object, is of this kind, inside of partials too."""
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004


def _globals(function: Callable[..., Any]) -> dict[str, Any]:
    """The globals of the module where the function is written, through partials, wrappers and objects with a
    __call__."""
    inner = innermost(function)
    found: dict[str, Any] = getattr(inner, "__globals__", None) or getattr(type(inner).__call__, "__globals__", {})
    return found


def name_of(thing: Any) -> str:
    """`package.module.name`, for messages."""
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
