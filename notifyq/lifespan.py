"""The app's lifespan: what a worker's handlers share, made before the first of them and unmade after the last.

It is entered before the worker connects, so that a slow start costs no lease, and left when the worker has stopped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias, cast

import anyio

from . import log
from .codec import describe
from .errors import ConfigError, NotifyqError

logger = log.logger("notifyq.lifespan")

LEAVE_SECONDS = 5.0

Lifespan: TypeAlias = Callable[[], Awaitable[AbstractAsyncContextManager[object]]]


def checked(function: Callable[..., Any], app: object) -> Lifespan:
    """What makes the context manager. Raises ConfigError for a function that can't be a lifespan."""
    example = "@app.lifespan async def lifespan(): ...; yield pool; ..."
    if not callable(function) or inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(f"@app.lifespan got {function!r}; expected an `async def` with a `yield`: {example}")
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    required = [p for p in parameters if p.default is p.empty]
    if len(required) > 1 or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise ConfigError(f"@app.lifespan: {function!r} is called without arguments, or with the app: {example}")
    return functools.partial(_opened, function, *([app] if required else []))


async def _opened(function: Callable[..., Any], *args: object) -> AbstractAsyncContextManager[object]:
    """Call it, and make a context manager of what it returns, if that isn't one already.

    What it returns decides, not what kind of function it is: a plain wrapper around a lifespan is none of these kinds.
    """
    made = function(*args)
    if inspect.isawaitable(made):
        made = await made
    if inspect.isasyncgen(made):
        generator = cast("AsyncGenerator[object, None]", made)
        return asynccontextmanager(lambda: generator)()
    if not isinstance(made, AbstractAsyncContextManager):
        raise ConfigError(f"{function!r} returned a {type(made).__name__}; expected an `async def` with a `yield`")
    return cast("AbstractAsyncContextManager[object]", made)


async def within(lifespan: Lifespan | None, work: Callable[[Sequence[object] | None], Awaitable[None]]) -> None:
    """Do the work inside of the lifespan, with what that yields.

    What the work raises is raised, whatever the lifespan makes of it. What the lifespan raises is logged, and ends in a
    NotifyqError.
    """
    if lifespan is None:
        await work(None)
        return
    raised: BaseException | None = None
    failed: Exception | None = None
    with anyio.CancelScope() as limit:
        try:
            manager = await lifespan()
            given = await manager.__aenter__()
        except Exception as error:
            raise _failed("start", error) from error
        try:
            await work(_things(given))
        except BaseException as error:
            raised = error
        # However the work ended, cancelled say, there is time to leave; but not for ever.
        limit.shield, limit.deadline = True, anyio.current_time() + LEAVE_SECONDS
        try:
            await manager.__aexit__(type(raised) if raised else None, raised, raised.__traceback__ if raised else None)
        except Exception as error:
            if error is not raised:
                failed = _failed("end", error)
                failed.__cause__ = error
    if limit.cancelled_caught:
        failed = _failed("end", TimeoutError(f"it took more than {LEAVE_SECONDS:g} s"))
    if raised is not None:
        raise raised
    if failed is not None:
        raise failed


def _things(given: object) -> Sequence[object]:
    if type(given) is tuple:  # and not a NamedTuple, which may well be asked for as such
        return cast("tuple[object, ...]", given)
    return () if given is None else (given,)


def _failed(when: str, error: Exception) -> NotifyqError:
    logger.error("the lifespan failed", exc_info=error, extra={"fields": {"at": when}})
    return NotifyqError(f"the lifespan failed at its {when}: {describe(error)}")
