"""Handlers behind decorators, partials, staticmethods, objects: the body always runs."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import notifyq
from notifyq import Context, Task
from notifyq.testing import run_inline

from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import eventually


class T(Task):
    n: int = 1


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain wrapper as people write it, which is used for def and async def alike."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def in_a_loop_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Roughly what asgiref's async_to_sync does. It blocks, so it may not run on the worker's loop."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(function(*args, **kwargs))

    return wrapper


def forgetful(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that forgets to await."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


async def double(task: T) -> int:
    await anyio.lowlevel.checkpoint()
    return 2 * task.n


async def double_more(task: T, ctx: Context, *, times: int) -> int:
    await anyio.lowlevel.checkpoint()
    return 2 * task.n * times * ctx.attempt


class Doubles:
    async def method(self, task: T) -> int:
        return await double(task)

    def plain(self, task: T) -> Awaitable[int]:
        return double(task)

    @staticmethod
    async def static(task: T) -> int:
        return await double(task)

    @classmethod
    async def of_class(cls, task: T) -> int:
        return await double(task)

    async def __call__(self, task: T) -> int:
        return await double(task)


class PlainCall:
    def __call__(self, task: T) -> Awaitable[int]:
        return double(task)


def future(task: T) -> Any:
    async def later() -> int:
        return await asyncio.ensure_future(double(task))

    return later()


FORMS: dict[str, Callable[..., Any]] = {
    "plain wrapper": logged(double),
    "two plain wrappers": logged(logged(double)),
    "wrapper that runs a loop": in_a_loop_of_its_own(double),
    "wrapper of a wrapper that runs a loop": logged(in_a_loop_of_its_own(double)),
    "async wrapper that forgets": forgetful(double),
    "async wrapper that forgets, twice": forgetful(forgetful(double)),
    "partial": functools.partial(double_more, times=1),
    "partial of a wrapper": functools.partial(logged(double_more), times=1),
    "wrapper of a partial": logged(functools.partial(double_more, times=1)),
    "partial of an object": functools.partial(Doubles()),
    "staticmethod": staticmethod(double),
    "staticmethod of a wrapper": staticmethod(logged(double)),
    "static": Doubles.static,
    "classmethod": Doubles.of_class,
    "method": Doubles().method,
    "method, plain": Doubles().plain,
    "object": Doubles(),
    "object, plain": PlainCall(),
    "future": future,
}


@pytest.mark.parametrize("form", FORMS)
async def test_what_can_be_awaited_is_awaited(dsn: str, form: str) -> None:
    app = notifyq.App()
    app.handler(FORMS[form])
    ran = await run_inline(app, T(n=4), raises=True)
    assert (ran.state, ran.result) == ("done", 8)
    async with app.connect(dsn), working(app, dsn):
        assert await (await app.enqueue(T(n=5), max_attempts=1)).result(timeout=limit()) == 10


async def test_it_is_awaited_on_the_worker_s_loop(dsn: str) -> None:
    """So it may use what is connected there. Only the wrapper has run in a thread."""
    app, threads = notifyq.App(), list[int]()

    class Inner(Task):
        pass

    @app.handler
    async def inner(task: Inner) -> str:
        return "inner"

    @app.handler
    @logged
    async def outer(task: T) -> int:
        threads.append(threading.get_ident())
        return (await app.enqueue(Inner())).id

    async with app.connect(dsn), working(app, dsn):
        id = await (await app.enqueue(T(), max_attempts=1)).result(timeout=limit())
        assert await app.ref(id).result(timeout=limit()) == "inner"
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("form", ["partial", "partial of an object", "staticmethod", "object", "method", "classmethod"])
def test_what_only_makes_a_coroutine_needs_no_thread(form: str) -> None:
    app = notifyq.App()
    app.handler(FORMS[form])
    assert app.registry.handlers[0].is_async


async def test_what_it_raises_and_how_long_it_may_take_count(dsn: str) -> None:
    app = notifyq.App()

    class Slow(Task):
        timeout = 0.05

    @app.handler
    @logged
    async def fails(task: T) -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("kaboom")

    @app.handler
    @logged
    async def slow(task: Slow) -> None:
        await anyio.sleep_forever()

    with pytest.raises(ValueError, match="kaboom"):
        await run_inline(app, T(), raises=True)
    assert (await run_inline(app, T())).reason == "ValueError: kaboom"
    assert (await run_inline(app, Slow())).reason == "timed out after 0.05 s"


async def test_what_a_coroutine_raises_that_was_forgotten_is_raised_in_tests() -> None:
    """The handler itself returned a coroutine. That one raises when it is awaited."""

    async def fails(task: T) -> None:
        raise ValueError("kaboom")

    for handler in (forgetful(fails), logged(forgetful(fails))):
        app = notifyq.App()
        app.handler(handler)
        with pytest.raises(ValueError, match="kaboom"):
            await run_inline(app, T(), raises=True)


async def test_a_batch_handler(dsn: str) -> None:
    app = notifyq.App()

    @app.handler(batch=10)
    @logged
    async def batch(tasks: list[T], ctxs: list[Context]) -> list[int]:
        await anyio.lowlevel.checkpoint()
        return [task.n + ctx.attempt for task, ctx in zip(tasks, ctxs, strict=True)]

    assert [ran.result for ran in await run_inline(app, [T(n=1), T(n=2)])] == [2, 3]


async def test_items_of_a_batch_that_are_not_awaited_say_so() -> None:
    app = notifyq.App()
    made: list[Any] = []

    @app.handler(batch=10)
    async def batch(tasks: list[T]) -> list[Any]:
        made.extend(double(task) for task in tasks)
        return made

    [ran] = await run_inline(app, [T()])
    assert ran.state == "dead"
    assert "await them first" in (ran.reason or "")
    for coroutine in made:
        coroutine.close()


async def test_middleware_behind_a_wrapper_or_that_forgets_to_await() -> None:
    app, told = notifyq.App(), list[object]()

    @app.middleware
    async def outer(task: Task, ctx: Context, call: Callable[[Task, Context], Awaitable[object]]) -> object:
        result = await call(task, ctx)
        told.append(result)
        return result

    @app.middleware
    @logged
    async def wrapped(task: Task, ctx: Context, call: Callable[[Task, Context], Awaitable[object]]) -> object:
        return await call(task, ctx)

    @app.middleware
    async def forgets(task: Task, ctx: Context, call: Callable[[Task, Context], Awaitable[object]]) -> object:
        return call(task, ctx)

    app.handler(logged(double))
    assert (await run_inline(app, T(n=2))).result == 4
    assert told == [4]


async def test_one_middleware_that_forgets_to_await() -> None:
    app = notifyq.App()

    @app.middleware
    async def forgets(task: Task, ctx: Context, call: Callable[[Task, Context], Awaitable[object]]) -> object:
        return call(task, ctx)

    app.handler(double)
    assert (await run_inline(app, T(n=2))).result == 4


def test_middleware_that_is_plain_is_refused_where_it_is_registered() -> None:
    def plain(task: Task, ctx: Context, call: Callable[[Task, Context], Awaitable[object]]) -> object:
        return call(task, ctx)

    with pytest.raises(notifyq.ConfigError, match="expected: async def"):
        notifyq.App().middleware(plain)  # type: ignore[type-var]


class Smtp:
    pass


async def generator() -> AsyncIterator[Smtp]:
    yield Smtp()


async def with_app(app: notifyq.App) -> AsyncIterator[Smtp]:
    assert isinstance(app, notifyq.App)
    yield Smtp()


class Lifespans:
    async def __call__(self) -> AsyncIterator[Smtp]:
        yield Smtp()


async def made() -> AbstractAsyncContextManager[Smtp]:
    return asynccontextmanager(generator)()


LIFESPANS: dict[str, Any] = {
    "plain wrapper of what makes a context manager": logged(made),
    "plain wrapper": logged(generator),
    "plain wrapper, with the app": logged(with_app),
    "plain wrapper of a context manager": logged(asynccontextmanager(generator)),
    "context manager of a plain wrapper": asynccontextmanager(logged(generator)),
    "async wrapper that forgets": forgetful(asynccontextmanager(generator)),
    "partial": functools.partial(generator),
    "staticmethod": staticmethod(generator),
    "object": Lifespans(),
}


@pytest.mark.parametrize("form", LIFESPANS)
async def test_a_lifespan_behind_something(form: str) -> None:
    app = notifyq.App()
    if form == "async wrapper that forgets":
        with pytest.raises(notifyq.ConfigError, match="expected an `async def` with a `yield`"):
            app.lifespan(LIFESPANS[form])
        return
    app.lifespan(LIFESPANS[form])

    @app.handler
    async def needs(task: T, smtp: Smtp) -> str:
        return type(smtp).__name__

    assert (await run_inline(app, T())).result == "Smtp"


async def test_a_lifespan_that_turns_out_to_be_none() -> None:
    app = notifyq.App()

    @contextmanager
    def blocking() -> Iterator[Smtp]:
        yield Smtp()

    @app.lifespan
    def plain() -> Any:
        return blocking()

    app.handler(double)
    with pytest.raises(notifyq.NotifyqError, match=r"returned a _GeneratorContextManager; expected an `async def`"):
        await run_inline(app, T())


@pytest.mark.parametrize("kind", ["generator", "async generator"])
async def test_generators(kind: str) -> None:
    """A generator is refused where that can be seen. If a wrapper turns out to return one, the task is dead, with the
    reason."""

    def values(task: T) -> Iterator[int]:
        yield task.n

    async def async_values(task: T) -> AsyncIterator[int]:
        yield task.n

    class Object:
        def __call__(self, task: T) -> Iterator[int]:
            yield task.n

    function: Callable[..., Any] = values if kind == "generator" else async_values
    for refused in (function, functools.partial(function), staticmethod(function), Object()):
        with pytest.raises(notifyq.ConfigError, match="is a generator"):
            notifyq.App().handler(refused)
    app = notifyq.App()
    app.handler(logged(function))
    ran = await run_inline(app, T())
    assert ran.state == "dead"
    assert "a handler returns its result as a whole" in (ran.reason or "")


async def test_a_wrapper_may_drain_a_generator() -> None:
    app = notifyq.App()

    def drained(function: Callable[..., Iterator[int]]) -> Callable[..., list[int]]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> list[int]:
            return list(function(*args))

        return wrapper

    @app.handler
    @drained
    def values(task: T) -> Iterator[int]:
        yield from range(task.n)

    assert (await run_inline(app, T(n=3))).result == [0, 1, 2]


async def test_crons_of_staticmethods_and_wrappers(dsn: str, db: Any) -> None:
    app, ran = notifyq.App(), list[str]()

    class Other(Task):
        pass

    class _Handlers:  # pyright: ignore[reportUnusedClass]
        @app.cron("* * * * * *")
        @app.handler
        @staticmethod
        async def static(task: T) -> None:
            ran.append("static")

    @app.cron("* * * * * *")
    @app.handler
    @logged
    async def wrapped(task: Other) -> None:
        ran.append("wrapped")

    async def both() -> bool:
        return {*ran} == {"static", "wrapped"}

    async with working(app, dsn):
        await eventually(both, True)
