"""Middleware and the lifespan: what is around handlers, and what they are given."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import anyio
import asyncpg
import pytest

import notifyq
from notifyq import Context, Task, lifespan
from notifyq.errors import ConfigError, NotifyqError
from notifyq.testing import drain, run_inline

from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.rows import ended, errors, state
from ..helpers.running import working
from ..helpers.waiting import Seen

Call = Callable[[Task, Context], Awaitable[object]]


class Note(notifyq.Task):
    max_attempts = 1
    name: str = ""


class Plain(notifyq.Task):
    max_attempts = 1


class Pool:
    pass


class SpecialPool(Pool):
    pass


class Mailer:
    pass


class Both(NamedTuple):
    pool: Pool
    mailer: Mailer


@pytest.fixture
def app() -> notifyq.App:
    return notifyq.App()


def example(name: str) -> dict[str, Any]:
    """The example of a page of docs/, run."""
    text = (Path(__file__).parents[2] / "docs" / name).read_text()
    space: dict[str, Any] = {"__name__": name}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, name, "exec", dont_inherit=True), space)
    return space


# --- Middleware


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


# --- The lifespan


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
        ((Mailer(), 5), "nothing of that type; the app's lifespan yields tests.app.test_around.Mailer, builtins.int"),
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

    where = r"handler tests\.app\.test_around\..*note: its parameter 'pool' is a tests\.app\.test_around\.Pool: "
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


# --- The examples


async def test_the_example_of_handlers(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("handlers.md")
    app: notifyq.App = space["app"]
    async with app.connect(dsn):
        await app.enqueue(space["SendMail"](to="a@b.c"))
        await app.run_worker(drain=True)
    sent, timed, closed = capsys.readouterr().out.splitlines()
    assert (sent, closed) == ("sent to a@b.c", "closed")
    assert re.fullmatch(r"SendMail 1 took 0\.\d\d\d s", timed)


async def test_the_example_of_batches(dsn: str, db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("handlers.md")
    app: notifyq.App = space["app"]
    async with app.connect(dsn):
        await app.enqueue_many([space["Index"](document=n, text="x" * (n % 2)) for n in range(4)], max_attempts=1)
        await app.run_worker(drain=True)
    assert capsys.readouterr().out.splitlines()[0] == "indexing 4"
    rows = await db.fetch("SELECT coalesce(result #>> '{}', error) FROM notifyq.all_tasks ORDER BY id")
    assert [row[0] for row in rows] == ["ValueError: no text", "document 1", "ValueError: no text", "document 3"]


async def test_the_example_of_after(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("after.md")
    app: notifyq.App = space["app"]
    async with app.connect(dsn):
        await space["publish"]("Atlas")
        await drain(app)
    assert capsys.readouterr().out.splitlines() == ["Atlas: page 1, page 2, page 3", "Atlas is there, with 3 pages"]


async def test_the_example_of_transactions(dsn: str, db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("transactions.md")
    app: notifyq.App = space["app"]
    await db.execute("CREATE TABLE account (name text, cents bigint CHECK (cents >= 0))")
    await db.execute("INSERT INTO account VALUES ('me', 100), ('you', 0)")
    async with app.connect(dsn):
        good = await app.enqueue(space["Transfer"](source="me", target="you", cents=70))
        bad = await app.enqueue(space["Transfer"](source="me", target="you", cents=70), max_attempts=1)
        await app.run_worker(drain=True, concurrency=1)
    assert [await state(db, ref.id) for ref in (good, bad)] == ["done", "dead"]
    assert [tuple(row) for row in await db.fetch("SELECT * FROM account ORDER BY name")] == [("me", 30), ("you", 70)]
    assert capsys.readouterr().out == "you has more\n"


async def test_the_example_of_a_web_application(dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("NOTIFYQ_DSN", dsn)
    web = example("web.md")["web"]
    async with (
        web.router.lifespan_context(web),
        httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://test") as client,
    ):
        answer = await client.post("/signup?to=a@b.c")
        assert answer.status_code == 202
        row = await ended(db, answer.json()["task"], "done")
        assert row["result"] == b'"sent to a@b.c"'
        late = (await client.post("/signup?to=d@e.f")).json()["task"]
    assert await state(db, late) in ("ready", "done"), "stopped gracefully: nothing is left running"
    assert not await db.fetchval("SELECT count(*) FROM notifyq.worker")
