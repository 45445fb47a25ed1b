"""Checks of async calls, made when a function is called: that an event loop runs, and that it is the right one.

A coroutine that isn't awaited does nothing, and Python only warns of it. A connection that two event loops use breaks
for both. Both mistakes are made in plain functions: they can't await, and run in a thread without an event loop or with
one of its own. There the call itself raises.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from .errors import ConfigError

_Function = TypeVar("_Function", bound=Callable[..., Coroutine[Any, Any, Any]])


def checked_at_call(check: Callable[..., object]) -> Callable[[_Function], _Function]:
    """Decorate an `async def`: `check` gets the same arguments when it is called, before it is awaited.

    The result is still a coroutine function to type checkers, frameworks and asyncio.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        if sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(call)
        else:
            call._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
        return cast("_Function", call)

    return decorate


def running(what: str, cure: str) -> asyncio.AbstractEventLoop:
    """The event loop that runs in this thread. Raises ConfigError if none does.

    what  the call, for the message
    cure  what to write instead
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigError(
            f"{what}: no event loop of asyncio runs here (in a plain function, a thread, or trio), so nothing can "
            f"await this; {cure}"
        ) from None


def same(home: object, what: str, whose: str, cure: str) -> None:
    """Raise ConfigError unless `home`, the event loop of some connections, is the one that runs in this thread.

    whose  what opened those connections, for the message
    """
    if running(what, cure) is not home:
        raise ConfigError(
            f"{what}: this is another event loop than that of {whose}, whose connections would break for all users; "
            f"{cure}"
        )


def is_awaitable(value: object) -> bool:
    """Whether it is a coroutine, or anything else that can be awaited. Every result is checked, in 0.05 µs."""
    return hasattr(type(value), "__await__")


async def awaited(value: object) -> object:
    """Await `value`, then what that returns, and so on; return the first value that can't be awaited.

    A plain wrapper around an `async def` returns a coroutine, and so does an `async def` that lacks an `await`.
    """
    while is_awaitable(value):
        value = await cast("Awaitable[object]", value)
    return value
