"""The Django tasks that code has declared for the backend, each under a notifyq type of its own, its module path.

Nothing that a row says is ever imported. Django has the backend validate a task when its decorator is run: that is
where it gets in here. A row's type is looked up among these as any type is among the handlers, and one that this
process doesn't know is left for a worker that does.
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
    """The payload: what the function is called with."""

    args: list[Any] = msgspec.field(default_factory=list[Any])
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class Declared(NamedTuple):
    task: framework.Task[..., Any]
    call: type[Call]


_by_type: dict[str, Declared] = {}
BY_TYPE: Final[Mapping[str, Declared]] = MappingProxyType(_by_type)


def call_class(name: str, module: str | None, tag: str, settings: Mapping[str, Any]) -> type[Call]:
    """A task class with these class settings."""
    made = msgspec.defstruct(name, [], bases=(Call,), tag=tag, module=module, namespace=dict(settings))
    return cast("type[Call]", made)


def declare(task: framework.Task[..., Any], settings: Mapping[str, Any] = MappingProxyType({})) -> Declared:
    """The one that this is, or is a copy of with other options. Raises InvalidTask for a path that is no type.

    settings  of the backend that the task was first declared for: class settings of its type
    """
    path = task.module_path
    known = _by_type.get(path)
    if known is None or known.task.func is not task.func:  # a module that was reloaded
        try:
            check_name("type", path)
        except ConfigError as error:
            raise framework.InvalidTask(str(error)) from error
        call = call_class(task.func.__name__, task.func.__module__, path, settings)
        _by_type[path] = known = Declared(task, call)
    return known
