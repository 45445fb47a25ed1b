"""The lifespan: around all handlers, what it gives to them, and how it fails."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import anyio
import asyncpg
import pytest

import notifyq
from notifyq import Context, lifespan
from notifyq.errors import ConfigError, NotifyqError

from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.rows import ended, state
from ..helpers.running import working
from ..helpers.waiting import Seen


class Note(notifyq.Task):
    max_attempts = 1
    name: str = ""


class Pool:
    pass


class SpecialPool(Pool):
    pass


class Mailer:
    pass


class Both(NamedTuple):
    pool: Pool
    mailer: Mailer


async def test_it_is_around_all_handlers_and_around_the_middleware(app: notifyq.App, db: Any, dsn: str) -> None:
    seen = Seen()
    go_on = anyio.Event()

    @app.lifespan
    async def lifespan(given: notifyq.App) -> AsyncIterator[Pool]:
        seen.add(("enter", given is app, await db.fetchval("SELECT count(*) FROM notifyq.worker")))
        try:
            yield Pool()
        finally:
            seen.add(("leave", await state(db, ref.id), await db.fetchval("SELECT count(*) FROM notifyq.worker")))

    @app.handler
    async def note(task: Note, pool: Pool) -> None:
        seen.add("begin")
        await go_on.wait()
        seen.add("end")

    async with app.connect(dsn), working(app, dsn) as worker:
        ref = await app.enqueue(Note())
        await seen.reach(2)
        worker.stop.set()
        go_on.set()
        await worker.stopped()
    assert seen.items == [("enter", True, 0), "begin", "end", ("leave", "done", 0)]


async def test_what_handlers_are_given(app: notifyq.App) -> None:
    pool, special, mailer = Pool(), SpecialPool(), Mailer()
    both = Both(pool, mailer)
    context: Any = object()
    got: list[Any] = []

    def called(function: Callable[..., Any], *given: object) -> list[Any]:
        app = notifyq.App()
        app.handler(function)
        handler = app.registry.bound(given).get("Note")
        assert handler is not None
        got.clear()
        handler.call(Note(), context)
        return got

    def exact(task: Note, pool: Pool) -> None:
        got.extend([pool])

    def kind(task: Note, ctx: Context, pool: "Optional[Pool]") -> None:  # noqa: UP037, UP045
        got.extend([ctx, pool])

    def after(task: Note, mailer: Mailer, ctx: Context, *, pool: Annotated[Pool, "x"]) -> None:
        got.extend([mailer, ctx, pool])

    def keyword(task: Note, *, ctx: Context) -> None:
        got.extend([ctx])

    def only_positional(
        task: Note, retries: int = 3, pool: Pool | None = None, mailer: Mailer | None = None, /
    ) -> None:
        got.extend([retries, pool, mailer])

    def named(task: Note, both: Both) -> None:
        got.extend([both])

    def as_in_stubs(task: Note, pool: asyncpg.Pool[asyncpg.Record] | None = None) -> None:
        got.extend([pool])

    assert called(exact, special, pool) == [pool]
    assert called(kind, special, mailer) == [context, special]
    assert called(after, pool, mailer) == [mailer, context, pool]
    assert called(keyword) == [context]
    assert called(only_positional, mailer) == [3, None, mailer]
    assert called(named, both) == [both]
    assert called(as_in_stubs) == [None]


async def test_a_real_pool_as_its_stubs_have_it(app: notifyq.App, dsn: str, db: Any) -> None:
    @app.lifespan
    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[tuple[Any, Mailer], None]:
        async with asyncpg.create_pool(dsn, min_size=0) as pool:
            yield pool, Mailer()

    @app.handler
    async def note(task: Note, pool: asyncpg.Pool[asyncpg.Record], mailer: Mailer) -> int:
        return int(await pool.fetchval("SELECT 42"))

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Note())
        assert (await ended(db, ref.id, "done"))["result"] == b"42"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "nothing of that type; this app has no lifespan, to yield one"),
        ((), "nothing of that type; the app's lifespan yields nothing"),
        ((Mailer(), 5), "nothing of that type; the app's lifespan yields tests.app.test_lifespan.Mailer, builtins.int"),
        ((SpecialPool(), SpecialPool()), "2 things of that type; the app's lifespan yields"),
        ((Pool(), Pool(), SpecialPool()), "2 things of that type"),
    ],
)
async def test_what_is_missing_is_said_when_the_worker_starts(
    app: notifyq.App, dsn: str, db: Any, given: Any, message: str
) -> None:
    @app.handler
    async def note(task: Note, ctx: Context, pool: Pool) -> None: ...

    left = Seen()
    if given is not None:

        @app.lifespan
        async def lifespan() -> AsyncIterator[Any]:
            yield given
            left.add(1)

    where = r"handler tests\.app\.test_lifespan\..*note: its parameter 'pool' is a tests\.app\.test_lifespan\.Pool: "
    with pytest.raises(ConfigError, match=where + re.escape(message)):
        await app.run_worker(dsn=dsn)
    assert not await db.fetchval("SELECT count(*) FROM notifyq.worker")


@pytest.mark.parametrize("at", ["start", "end"])
async def test_a_lifespan_that_fails(app: notifyq.App, db: Any, dsn: str, logged: Logged, at: str) -> None:
    @app.handler
    async def note(task: Note) -> None: ...

    @app.lifespan
    async def lifespan() -> AsyncIterator[None]:
        if at == "start":
            raise OSError("no such host")
        yield
        raise OSError("no such host")

    async with app.connect(dsn):
        ref = await app.enqueue(Note())
    with pytest.raises(NotifyqError, match=f"^the lifespan failed at its {at}: OSError: no such host$") as caught:
        await app.run_worker(dsn=dsn, drain=True)
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__, OSError)
    assert await state(db, ref.id) == ("done" if at == "end" else "ready")
    assert [fields["at"] for fields in logged("the lifespan failed")] == [at]


@pytest.mark.parametrize("at", ["start", "end"])
async def test_a_lifespan_that_fails_on_the_command_line(dsn: str, tmp_path: Path, at: str) -> None:
    before, after = (
        ("raise OSError('no such host')", "pass") if at == "start" else ("pass", "raise OSError('no such host')")
    )
    (tmp_path / "failing.py").write_text(
        "import notifyq\napp = notifyq.App()\nclass Note(notifyq.Task): pass\n"
        "@app.handler\nasync def note(task: Note): pass\n"
        f"@app.lifespan\nasync def lifespan():\n    {before}\n    yield\n    {after}\n"
    )
    command = [sys.executable, "-m", "notifyq", "worker", "failing:app", "--drain", "--dsn", dsn]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=limit())
    assert ended.returncode == 1
    assert f"the lifespan failed at its {at}: OSError: no such host" in ended.stderr
    assert "failing.py" in ended.stderr, "a traceback"
    assert "bug in notifyq" not in ended.stderr


async def test_a_lifespan_that_does_not_end(
    app: notifyq.App, dsn: str, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setattr(lifespan, "LEAVE_SECONDS", 0.1)

    @app.handler
    async def note(task: Note) -> None: ...

    @app.lifespan
    async def hangs() -> AsyncIterator[None]:
        yield
        await anyio.sleep(60)

    with pytest.raises(NotifyqError, match=r"failed at its end: TimeoutError: it took more than 0\.1 s"):
        await app.run_worker(dsn=dsn, drain=True)
    assert logged("the lifespan failed")


async def test_cancelled_there_is_time_to_leave(app: notifyq.App, dsn: str) -> None:
    left = Seen()

    @app.handler
    async def note(task: Note) -> None: ...

    @app.lifespan
    async def lifespan() -> AsyncIterator[None]:
        async with anyio.create_task_group():  # which has a scope of its own
            try:
                yield
            finally:
                await anyio.sleep(0.01)
                left.add("in peace")

    async with anyio.create_task_group() as group:

        async def run(*, task_status: Any) -> None:
            await app.run_worker(dsn=dsn, task_status=task_status)

        await group.start(run)
        group.cancel_scope.cancel()
    assert left.items == ["in peace"]


async def test_an_error_of_the_worker_is_raised_whatever_the_lifespan_makes_of_it(
    app: notifyq.App, empty_dsn: str
) -> None:
    @app.handler
    async def note(task: Note) -> None: ...

    @app.lifespan
    async def swallows() -> AsyncIterator[None]:
        try:
            yield
        except notifyq.SchemaError:
            pass

    with pytest.raises(notifyq.SchemaError):
        await app.run_worker(dsn=empty_dsn)


async def no_yield() -> None: ...


def blocking_one() -> Iterator[None]:
    yield


async def of_two(app: Any, other: Any) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("wrong", [no_yield, blocking_one, of_two, None])
def test_lifespans_that_cannot_be(app: notifyq.App, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"@app\.lifespan"):
        app.lifespan(wrong)


def test_one_lifespan(app: notifyq.App) -> None:
    async def lifespan() -> AsyncIterator[None]:
        yield

    assert app.lifespan(lifespan) is lifespan
    with pytest.raises(ConfigError, match="this app has a lifespan"):
        app.lifespan(lifespan)
