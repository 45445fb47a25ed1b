"""The Django tasks that are declared for the backend. The notifyq type of each is its module path.

A task gets in here when its decorator runs: Django then lets the backend validate it. A row's type is only looked up
among these, so no name in a row is ever imported. A task of a type that this process doesn't know is left to a worker
that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

import msgspec

from notifyq.config import check_name
from notifyq.errors import ConfigError
from notifyq.task import Task

from . import framework


class Call(Task):
    """The payload: the arguments of the function."""

    args: list[Any] = msgspec.field(default_factory=list[Any])
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class Declared(NamedTuple):
    """A Django task, and the class of its payload."""

    task: framework.Task[..., Any]
    call: type[Call]


_by_type: dict[str, Declared] = {}
BY_TYPE: Final[Mapping[str, Declared]] = MappingProxyType(_by_type)


def call_class(name: str, module: str | None, tag: str, settings: Mapping[str, Any]) -> type[Call]:
    """A Task class for one Django task, with these class settings."""
    made = msgspec.defstruct(name, [], bases=(Call,), tag=tag, module=module, namespace=dict(settings))
    return cast("type[Call]", made)


def declare(task: framework.Task[..., Any], settings: Mapping[str, Any] = MappingProxyType({})) -> Declared:
    """The declared task that this one is, or is a copy of with other options; declared now if it wasn't.

    settings  class settings of its type, from the backend that it is first declared for

    Raises InvalidTask for a module path that can't be a type.
    """
    path = task.module_path
    known = _by_type.get(path)
    if known is None or known.task.func is not task.func:  # new, or its module was reloaded
        try:
            check_name("type", path)
        except ConfigError as error:
            raise framework.InvalidTask(str(error)) from error
        call = call_class(task.func.__name__, task.func.__module__, path, settings)
        _by_type[path] = known = Declared(task, call)
    return known
