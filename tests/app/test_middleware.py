"""Middleware: what runs around a handler, and what it may change."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import notifyq
from notifyq import Context, Task
from notifyq.errors import ConfigError
from notifyq.testing import run_inline

from ..helpers.rows import ended, errors
from ..helpers.running import working

Call = Callable[[Task, Context], Awaitable[object]]


class Note(notifyq.Task):
    max_attempts = 1
    name: str = ""


class Mailer:
    pass


class Plain(notifyq.Task):
    max_attempts = 1


async def test_the_first_is_the_outermost_and_may_change_what_passes(app: notifyq.App, db: Any, dsn: str) -> None:
    seen: list[str] = []

    @app.handler
    async def note(task: Note, ctx: Context) -> str:
        seen.append(f"note {task.name} {ctx.priority}")
        return "result"

    @app.middleware
    async def outer(task: Task, ctx: Context, call: Call) -> object:
        seen.append("outer")
        result = await call(task, ctx)
        seen.append("outer ends")
        return f"{result}, seen by outer"

    @app.handler
    def plain(task: Plain) -> str:
        seen.append("plain")
        assert threading.current_thread() is not threading.main_thread()
        return "result of a thread"

    @app.middleware
    async def inner(task: Task, ctx: Context, call: Call) -> object:
        seen.append("inner")
        if isinstance(task, Note) and task.name == "kept":
            return "never run"
        return f"{await call(Note('changed') if isinstance(task, Note) else task, ctx)}, by inner"

    async with app.connect(dsn):
        refs = [await app.enqueue(task) for task in (Note("a"), Note("kept"), Plain())]
        async with working(app, dsn, concurrency=1, drain=True) as worker:
            await worker.done.wait()
    results = [(await ended(db, ref.id, "done"))["result"] for ref in refs]
    assert results == [
        b'"result, by inner, seen by outer"',
        b'"never run, seen by outer"',
        b'"result of a thread, by inner, seen by outer"',
    ]
    assert seen == [
        *("outer", "inner", "note changed 0", "outer ends"),
        *("outer", "inner", "outer ends"),
        *("outer", "inner", "plain", "outer ends"),
    ]


async def test_what_it_raises_counts_as_the_handlers(app: notifyq.App, db: Any, dsn: str) -> None:
    class Slow(notifyq.Task):
        max_attempts = 1
        timeout = 0.1

    class Bad(notifyq.Task):
        max_attempts = 1

    @app.middleware
    async def strict(task: Task, ctx: Context, call: Call) -> object:
        if isinstance(task, Note):
            raise notifyq.Cancel("not today")
        if isinstance(task, Slow):
            await anyio.sleep(60)
        try:
            return await call(task, ctx)
        except ZeroDivisionError as error:
            raise ValueError("as seen by the middleware") from error

    @app.handler
    async def note(task: Note) -> None: ...

    @app.handler
    async def slow(task: Slow) -> None: ...

    @app.handler
    def bad(task: Bad) -> float:
        return 1 / 0

    async with app.connect(dsn), working(app, dsn):
        refs = [await app.enqueue(task) for task in (Note(), Slow(), Bad())]
        states = ["cancelled", "dead", "dead"]
        found = [(await ended(db, ref.id, state))["error"] for ref, state in zip(refs, states, strict=True)]
    assert found == ["not today", "timed out after 0.1 s", "ValueError: as seen by the middleware"]
    assert "ZeroDivisionError" in (await errors(db, refs[2].id))[0]["traceback"]


async def two(task: Task, ctx: Context) -> None: ...


def blocking(task: Task, ctx: Context, call: Call) -> None: ...


async def yields(task: Task, ctx: Context, call: Call) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("wrong", [two, blocking, yields, None, "timing"])
def test_middleware_that_cannot_be(app: notifyq.App, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="expected: async def f\\(task, ctx, call\\)"):
        app.middleware(wrong)


async def test_inline(app: notifyq.App) -> None:
    @app.lifespan
    async def lifespan() -> AsyncIterator[Mailer]:
        yield Mailer()

    @app.middleware
    async def around(task: Task, ctx: Context, call: Call) -> object:
        return f"{await call(task, ctx)}, by the middleware"

    @app.handler
    async def note(task: Note, mailer: Mailer) -> str:
        return type(mailer).__name__

    assert (await run_inline(app, Note())).result == "Mailer, by the middleware"
