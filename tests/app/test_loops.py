"""Calls that are never awaited, and calls from another event loop, are refused where they are made. Nothing else
breaks."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import asyncpg
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm

import notifyq
from notifyq.testing import enqueued

from ..helpers.machine import limit
from ..helpers.running import working


class Sent(notifyq.Task):
    n: int = 0


class Plain(notifyq.Task):
    n: int = 0


def calls(app: notifyq.App) -> dict[str, Callable[[], object]]:
    """Each of App's and Ref's calls that uses the connections of connect(), not awaited."""
    return {
        "enqueue": lambda: app.enqueue(Sent()),
        "enqueue_many": lambda: app.enqueue_many([Sent()]),
        "enqueue_many, then": lambda: app.enqueue_many([Sent()], then=Sent()),
        "cancel": lambda: app.cancel(5),
        "Ref.cancel": lambda: app.ref(5).cancel(),
        "Ref.result": lambda: app.ref(5).result(timeout=1),
        "Ref.progress": lambda: app.ref(5).progress(),
    }


CALLS = list(calls(notifyq.App()))


def said(call: Callable[[], object]) -> str:
    """What a call says in its ConfigError."""
    with pytest.raises(notifyq.ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", CALLS)
async def test_a_plain_function_hears_at_the_call_that_it_is_not_awaited(dsn: str, name: str) -> None:
    app = notifyq.App()
    async with app.connect(dsn):
        text = await anyio.to_thread.run_sync(said, calls(app)[name])
        assert "no event loop of asyncio" in text
        assert "anyio.from_thread.run(" in text
        assert "SyncClient" in text or "notifyq." in text
        assert await enqueued(app, Sent) == []


@pytest.mark.parametrize("name", CALLS[:3])
def test_code_that_has_not_connected_hears_it_too(name: str) -> None:
    text = said(calls(notifyq.App())[name])
    assert "no event loop of asyncio" in text
    assert "notifyq.SyncClient(app).enqueue" in text


async def test_a_plain_handler_that_forgot_it_fails_and_says_why(dsn: str) -> None:
    app = notifyq.App()

    @app.handler
    def plain(task: Plain) -> None:
        app.enqueue(Sent())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Plain(), max_attempts=1)
        with pytest.raises(notifyq.TaskDead, match=r"nothing can await this; .*SyncClient"):
            await ref.result(timeout=limit())


async def test_a_blocking_connection_is_refused_at_the_call(dsn: str) -> None:
    app = notifyq.App()
    engine = sqlalchemy.create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"))
    with psycopg.connect(dsn) as bare, engine.connect() as alchemy, sqlalchemy.orm.Session(engine) as session:
        scoped = sqlalchemy.orm.scoped_session(sqlalchemy.orm.sessionmaker(engine))
        for conn in (bare, alchemy, session, scoped):
            for call in (
                functools.partial(app.enqueue, Sent(), conn=conn),  # type: ignore[arg-type]
                functools.partial(app.enqueue_many, [Sent()], conn=conn),
            ):
                assert "SyncClient(app).enqueue(task, conn=...)" in said(call)  # on a loop
                assert "SyncClient(app).enqueue(task, conn=...)" in await anyio.to_thread.run_sync(said, call)
        scoped.remove()
    engine.dispose()


@pytest.mark.parametrize("name", CALLS)
async def test_another_event_loop_is_refused_and_breaks_nothing(dsn: str, name: str) -> None:
    app = notifyq.App()

    def elsewhere() -> str:
        async def main() -> str:
            return said(calls(app)[name])

        return asyncio.run(main())

    async with app.connect(dsn):
        refs = [await app.enqueue(Sent(n=n)) for n in range(3)]  # connections that are there to be broken
        for text in [await anyio.to_thread.run_sync(elsewhere) for _ in range(12)]:
            assert "another event loop" in text
            assert "anyio.from_thread.run(" in text
        refs += [await app.enqueue(Sent(n=n)) for n in range(3, 15)]
        assert [ref.id for ref in refs] == sorted({ref.id for ref in refs})
        assert await app.cancel(refs[0].id)


async def test_a_connection_of_another_loop_is_refused_too(dsn: str) -> None:
    app = notifyq.App()
    conn = await asyncpg.connect(dsn)
    pool = await asyncpg.create_pool(dsn, min_size=1)
    async with pool.acquire() as acquired:
        for one in (conn, pool, acquired):

            async def main(one: Any = one) -> str:
                return said(lambda: app.enqueue(Sent(), conn=one))

            assert "another event loop" in await anyio.to_thread.run_sync(asyncio.run, main())
    assert (await app.enqueue(Sent(), conn=conn)).id
    assert (await app.enqueue(Sent(), conn=pool)).id
    await conn.close()
    await pool.close()


async def test_what_the_messages_advise_works(dsn: str) -> None:
    app = notifyq.App()
    client = notifyq.SyncClient(app)

    @app.handler
    def plain(task: Plain) -> list[int]:
        one: notifyq.Ref = anyio.from_thread.run(app.enqueue, Sent(n=1))
        two: notifyq.Ref = anyio.from_thread.run(functools.partial(app.enqueue, Sent(n=2), priority=3))
        three = client.enqueue(Sent(n=3))
        return [one.id, two.id, three.id]

    @app.handler
    async def sent(task: Sent) -> int:
        return task.n

    async with app.connect(dsn), working(app, dsn):
        with client.connect(dsn):
            ids = await (await app.enqueue(Plain())).result(timeout=limit())
        assert [await app.ref(id).result(timeout=limit()) for id in ids] == [1, 2, 3]


async def test_a_worker_s_connections_are_not_used_from_another_loop(dsn: str) -> None:
    """ctx.results() and ctx.transaction() in a plain handler, which tries asyncio.run()."""
    app = notifyq.App()

    @app.handler
    async def sent(task: Sent) -> int:
        return task.n

    @app.handler
    def plain(task: Plain, ctx: notifyq.Context) -> list[str]:
        async def results() -> None:
            await ctx.results()

        async def transaction() -> None:
            async with ctx.transaction():
                pass

        def unawaited() -> None:
            ctx.results()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]

        loops = [said(lambda: asyncio.run(results())), said(lambda: asyncio.run(transaction())), said(unawaited)]
        return [*loops, repr(anyio.from_thread.run(ctx.results))]

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Plain(), after=[await app.enqueue(Sent(n=7))])
        results, transaction, unawaited, right = await ref.result(timeout=limit())
        assert "another event loop" in results
        assert "anyio.from_thread.run(ctx.results)" in results
        assert "another event loop" in transaction
        assert "anyio.from_thread.run(ctx.results)" in unawaited
        assert right == "[7]"


async def test_a_worker_on_another_loop_runs_but_its_handlers_need_connections_of_their_own(dsn: str) -> None:
    app = notifyq.App()

    @app.handler
    async def plain(task: Plain) -> str:
        return said(lambda: app.enqueue(Sent()))

    async with app.connect(dsn):
        ref = await app.enqueue(Plain())
        await anyio.to_thread.run_sync(asyncio.run, app.run_worker(drain=True))
        assert "another event loop" in await ref.result(timeout=limit())
        await app.enqueue(Sent())


def test_what_needs_asyncio_says_so_where_there_is_none() -> None:
    """Under trio, for example, no asyncio loop runs."""
    app = notifyq.App()
    for coroutine in (app.connect().__aenter__(), app.run_worker()):
        with pytest.raises(notifyq.ConfigError, match="no event loop of asyncio"):
            coroutine.send(None)


async def test_it_is_still_a_coroutine_function(dsn: str) -> None:
    """asyncio, anyio, frameworks that ask before they call, and callers that pass it on need that."""
    app = notifyq.App()
    assert asyncio.iscoroutinefunction(app.enqueue)
    assert inspect.signature(app.enqueue).parameters.keys() == {"task", "conn", "options"}
    async with app.connect(dsn):
        call = app.enqueue(Sent())
        assert isinstance(call, Coroutine)
        refs = [await call, await asyncio.create_task(app.enqueue(Sent())), *await asyncio.gather(app.enqueue(Sent()))]
        async with anyio.create_task_group() as group:
            group.start_soon(app.enqueue, Sent())
        assert len({ref.id for ref in refs}) == 3
        assert len(await enqueued(app, Sent)) == 4


async def test_one_that_is_dropped_on_a_loop_is_warned_of_by_its_name(dsn: str) -> None:
    app = notifyq.App()

    def drop() -> None:
        app.enqueue(Sent())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
        gc.collect()

    async with app.connect(dsn):
        with pytest.warns(RuntimeWarning, match=r"'App\.enqueue' was never awaited"):
            drop()


async def test_a_client_without_async_is_for_any_thread(dsn: str) -> None:
    app, ids = notifyq.App(), []
    with notifyq.SyncClient(app).connect(dsn) as client:
        threads = [threading.Thread(target=lambda: ids.append(client.enqueue(Sent()).id)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
    assert len(set(ids)) == 3
