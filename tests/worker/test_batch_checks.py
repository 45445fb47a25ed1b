"""Batch handlers that can't be are refused; middleware, inline runs and types."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import notifyq
from notifyq import Context, Retry
from notifyq.errors import ConfigError
from notifyq.testing import Ran, run_inline

from ..helpers.batches import Bench, Item, Pool, Score, Slow
from ..helpers.waiting import Seen


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench


def one(task: Item) -> None: ...


def listed(tasks: list[Item]) -> None: ...


def of_ints(tasks: list[int]) -> None: ...


def one_context(tasks: list[Item], ctx: Context) -> None: ...


def both(tasks: list[Item], *, given: "list[str]") -> None: ...  # noqa: UP037


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (listed, {"batch": 0}, r"@app\.handler\(batch=0\): expected 1 to 10000 tasks"),
        (listed, {"batch": True}, r"@app\.handler\(batch=True\): expected"),
        (listed, {"batch": 2.5}, r"@app\.handler\(batch=2\.5\): expected"),
        (listed, {"batch": 10_001}, "expected 1 to 10000 tasks"),
        (listed, {"batch": 2, "linger": -0.1}, r"@app\.handler\(linger=-0\.1\): expected seconds, 0 to 3600"),
        (listed, {"batch": 2, "linger": float("nan")}, "expected seconds"),
        (listed, {"batch": 2, "linger": "1"}, "expected seconds"),
        (listed, {"batch": 2, "linger": True}, r"linger=True\): expected seconds"),
        (listed, {"linger": 1}, "expected batch= beside it"),
        (
            one,
            {"batch": 2},
            r"its first parameter is a <class '.*Item'>; with batch= it is a list: async def send\(tasks: list",
        ),
        (listed, {}, r"first parameter is a list\[.*Item\], which a batch handler has: @app\.handler\(batch=100\)"),
        (of_ints, {"batch": 2}, "expected a subclass of notifyq.Task"),
        (one_context, {"batch": 2}, r"parameter 'ctx' is a 'Context'; expected list\[notifyq\.Context\]"),
        (both, {"batch": 2}, r"parameter 'given' is a .*; expected list\[notifyq\.Context\], or a class of which"),
    ],
)
def test_what_cannot_be(function: Any, options: dict[str, Any], message: str) -> None:
    app = notifyq.App()
    with pytest.raises(ConfigError, match=message):
        app.handler(**options)(function)
    assert not app.registry.types


async def test_middleware_goes_around_one_task(dsn: str) -> None:
    for around in (True, False):
        app, seen = notifyq.App(), Seen()
        app.handler(batch=2, middleware=around)(listed)

        @app.handler
        async def slow(task: Slow) -> None: ...

        @app.middleware
        async def timing(task: notifyq.Task, ctx: Context, call: Any) -> object:
            seen.add(type(task).__name__)  # noqa: B023 - called in this round
            return await call(task, ctx)

        async with app.connect(dsn):
            await app.enqueue_many([Item(), Slow()])
            if around:
                with pytest.raises(ConfigError, match="listed: this app has middleware, which goes around one task"):
                    await app.run_worker(drain=True)
            else:
                await app.run_worker(drain=True)
                assert set(seen.items) == {"Slow"}


async def test_inline(bench: Bench) -> None:
    assert await run_inline(bench.app, Item("result")) == Ran(state="done", result={"ok": True})
    assert bench.seen.items == [[1]]
    ran = await run_inline(bench.app, [Item(how) for how in ("", "result", "error", "cancel")], id=7)
    assert [one.state for one in ran] == ["done", "done", "retry", "cancelled"]
    assert bench.seen.items[1] == [7, 8, 9, 10]
    ran = await run_inline(bench.app, [Item() for _ in range(25)])
    assert len(ran) == 25
    assert [len(ids) for ids in bench.seen.items[2:]] == [10, 10, 5]
    with pytest.raises(ValueError, match="all of it"):
        await run_inline(bench.app, Item("raise"), raises=True)
    with pytest.raises(ConfigError, match="tasks of types Item and Slow"):
        await run_inline(bench.app, [Item(), Slow()])
    with pytest.raises(ConfigError, match="expected an instance"):
        await run_inline(bench.app, [])


async def test_given_and_typed() -> None:
    app = notifyq.App()

    @app.lifespan
    async def pool() -> AsyncIterator[Pool]:
        yield Pool()

    @app.handler(batch=5)
    async def score(tasks: list[Score], pool: Pool, ctxs: list[Context]) -> list[tuple[int, str] | Retry] | None:
        return [(task.n + ctx.id, type(pool).__name__) for task, ctx in zip(tasks, ctxs, strict=True)]

    ran = await run_inline(app, [Score(10), Score(20)])
    assert [one.result for one in ran] == [(11, "Pool"), (22, "Pool")]


async def _async(value: Any) -> Any:
    return value
