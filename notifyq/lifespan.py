"""The app's lifespan: it makes what a worker's handlers share before the first of them runs, and closes it after the
last.

It is entered before the worker connects, so that a slow start costs no lease, and left after the worker has stopped.
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

LEAVE_SECONDS = 5.0  # that its end may take

Lifespan: TypeAlias = Callable[[], Awaitable[AbstractAsyncContextManager[object]]]


def validated_lifespan(function: Callable[..., Any], app: object) -> Lifespan:
    """A function that makes the context manager. Raises ConfigError for a function that can't be a lifespan."""
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
    """Call the function, and make a context manager of what it returns, if that isn't one already.

    The kind of the function says nothing, since a plain wrapper may stand around a lifespan. So look at its result.
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
    """Do the work inside of the lifespan, and give it what the lifespan yields; None: there is no lifespan.

    Raises what the work raises, even if the lifespan suppresses it. An error of the lifespan itself is logged, and
    raised as a NotifyqError.
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
        # The lifespan may end in peace even if the work was cancelled, but not for ever.
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
    if type(given) is tuple:  # a NamedTuple is one thing, which a handler may need as such
        return cast("tuple[object, ...]", given)
    return () if given is None else (given,)


def _failed(when: str, error: Exception) -> NotifyqError:
    logger.error("the lifespan failed", exc_info=error, extra={"fields": {"at": when}})
    return NotifyqError(f"the lifespan failed at its {when}: {describe(error)}")
