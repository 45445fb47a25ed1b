"""Which types JSON can hold, for the fields of payloads and for results.

msgspec accepts every class as the type of a field, since a program may give it hooks for the class. notifyq has no
hooks. A task with such a field would be refused at each enqueue, and a handler that returns such a result would end
each task as dead. So both are refused when the handler is registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import msgspec

from ..errors import ConfigError
from ..task import Task

CURE = "make it a msgspec.Struct, a dataclass or a TypedDict"
# A value of each type that JSON is decoded to. A class can be decoded if one of these is an instance of it: object and
# Iterable, for example.
DECODED: tuple[object, ...] = (None, True, 1, 1.0, "", [], {})
ENCODED = (bool, int, float, str, bytes, list, tuple, dict, set, frozenset)
SUBCLASSES_ENCODED = (list, tuple, dict, set, frozenset)  # msgspec encodes a subclass as its base class

_Decode = Callable[[bytes], Task]


def decoder(task: type[Task]) -> _Decode:
    """The function that decodes payloads of a task class. Raises ConfigError for a field that JSON can't hold."""
    name = f"task {task.__module__}.{task.__qualname__}"
    try:
        decode = msgspec.json.Decoder(task).decode
    except NameError as error:
        raise ConfigError(
            f"{name}: {error}; the types of fields are looked up in its module at run time, so define or import "
            "them there"
        ) from error
    except Exception as error:  # a postponed annotation is evaluated, and may raise anything
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, TypeError):
            why = f"{error}; {CURE}" if "custom type" in str(error) else str(error)
        raise ConfigError(f"{name}: msgspec can't decode its fields: {why}") from error
    for where, cls in _custom(task):
        if not _can_be_decoded(cls):
            raise ConfigError(f"{name}: {where} is a {_shown(cls)}, which can't be read from JSON; {_cure(cls)}")
    return decode


def check_result(whose: str, annotation: object) -> None:
    """Raise ConfigError if no value of this type can be written as JSON. `whose` is the handler, for the message."""
    for part in _parts(annotation):
        for where, cls in [("", part), *_custom(part)]:
            if isinstance(cls, type) and not _can_be_encoded(cls):
                what = f"{where} of its result" if where else "its result"
                raise ConfigError(f"{whose}: {what} is a {_shown(cls)}, which can't be written as JSON; {_cure(cls)}")


def _custom(cls: object) -> Iterator[tuple[str, type]]:
    """The classes inside a type for which msgspec needs hooks; before each, the field that it is in."""
    import msgspec.inspect as mi

    def walk(value: Any, where: str) -> Iterator[tuple[str, type]]:
        if isinstance(value, mi.CustomType):
            yield where, value.cls
        elif isinstance(value, mi.Field):
            yield from walk(value.type, f"the field {value.name!r}{where and f' of {owners[-1]}'}")
        elif isinstance(value, mi.Type):
            owner = getattr(value, "cls", None)
            if owner is not None:
                if owner in seen:
                    return
                seen.add(owner)
                owners.append(owner.__name__)
            for name in value.__struct_fields__:
                yield from walk(getattr(value, name), where)
            if owner is not None:
                owners.pop()
        elif isinstance(value, tuple):
            for part in cast("tuple[object, ...]", value):
                yield from walk(part, where)

    owners: list[str] = []
    seen: set[object] = set()
    try:
        info = mi.type_info(cls)
    except Exception:  # msgspec can't decode the type, or can't look up a name in it
        return
    if not isinstance(info, mi.CustomType):
        yield from walk(info, "")


def _can_be_decoded(cls: type) -> bool:
    try:
        return any(isinstance(value, cls) for value in DECODED)
    except TypeError:  # of a Protocol that isn't runtime_checkable
        return False


def _can_be_encoded(cls: type) -> bool:
    """Whether instances of this class, or of a subclass, can be written as JSON."""
    import msgspec.inspect as mi

    below: list[type] = type.__subclasses__(cls)
    if inspect.isabstract(cls) or getattr(cls, "_is_protocol", False) or hasattr(cls, "__await__"):
        return True
    if issubclass(cls, (*SUBCLASSES_ENCODED, BaseException, type(None))):
        return True
    try:
        if any(issubclass(known, cls) for known in ENCODED) or not isinstance(mi.type_info(cls), mi.CustomType):
            return True
    except Exception:
        return True
    return any(_can_be_encoded(one) for one in below)


def _parts(annotation: Any) -> Iterator[object]:
    """The classes in an annotation: the members of a union, and the types inside a list or a dict."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif isinstance(origin, type):
        yield origin
        if issubclass(origin, SUBCLASSES_ENCODED) or any(issubclass(known, origin) for known in SUBCLASSES_ENCODED):
            for part in get_args(annotation):
                yield from _parts(part)
    elif (value := getattr(annotation, "__value__", None)) is not None:  # type Name = ...
        yield from _parts(value)
    else:
        yield annotation


def _cure(cls: type) -> str:
    if hasattr(cls, "__pydantic_fields__") or hasattr(cls, "model_dump"):
        return f"{CURE}, or a dict: model_dump(mode='json') of the pydantic model, and model_validate() back"
    return f"{CURE}, or a type that JSON has (a str, a number, a list, a dict)"


def _shown(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
