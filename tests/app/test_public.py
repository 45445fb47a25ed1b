"""What users import: exactly what is documented, and typed as the contract's example uses it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import notifyq

pytestmark = pytest.mark.slow

PUBLIC = {
    "App",
    "Task",
    "Context",
    "Progress",
    "Ref",
    "Retry",
    "Cancel",
    "Dead",
    "EnqueueOptions",
    "Ids",
    "NotifyqError",
    "ConfigError",
    "DatabaseError",
    "SchemaError",
    "TaskFailed",
    "TaskDead",
    "TaskCancelled",
    "SyncClient",
    "WorkerInfo",
}

EXAMPLE = """
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone

import anyio
import asyncpg
import msgspec
import notifyq
import psycopg
from notifyq.testing import Drained, Ran, advance, assert_enqueued, drain, enqueued, refute_enqueued, run_inline


class User(msgspec.Struct):
    id: str
    email: str


class SendVerificationEmail(notifyq.Task, tag="SEND_VERIFICATION_EMAIL"):
    max_attempts = 5
    timeout = 30.0
    user: User
    verification_key: str


class Thumbnail(notifyq.Task):
    queue = "images"
    priority = 5
    limit_key = ("path",)
    limit = 3
    rate = "100/minute"
    order_key = "all"
    backoff = timedelta(seconds=3)
    path: str
    width: int = 200


class Move(notifyq.Task):  # the names of settings, as fields of the payload, are no mistake
    queue: str
    priority: int
    rate: float
    limit: int | None = None
    limit_key: str = ""


class Other(notifyq.Task):
    pass


app = notifyq.App()


@app.handler
async def send_verification_email(task: SendVerificationEmail, ctx: notifyq.Context) -> None:
    print(task.user.email, ctx.attempt + 1, ctx.created_at.year)
    if ctx.attempt > 3:
        raise notifyq.Dead("no such mailbox")


@app.handler
def thumbnail(task: Thumbnail) -> dict[str, int] | notifyq.Retry:
    return {"width": task.width} if task.width else notifyq.Retry(delay=5.0, reason="later")


class Part(notifyq.Task):
    n: int


@app.handler(batch=100, linger=0.05, middleware=False)
async def parts(tasks: list[Part], ctxs: list[notifyq.Context]) -> list[int | notifyq.Retry | ValueError]:
    return [task.n if ctx.attempt else ValueError("odd") for task, ctx in zip(tasks, ctxs)]


@app.handler(batch=10, middleware=False)
def others(tasks: list["Other"]) -> None:
    print(len(tasks))


class Pool:
    pass


@app.lifespan
@asynccontextmanager
async def lifespan(given: notifyq.App) -> AsyncGenerator[tuple[Pool, int], None]:
    yield Pool(), given.registry is app.registry


async def bare() -> AsyncGenerator[Pool, None]:
    yield Pool()


@app.middleware
async def timing(
    task: notifyq.Task, ctx: notifyq.Context, call: Callable[[notifyq.Task, notifyq.Context], Awaitable[object]]
) -> object:
    return await call(task, ctx)


class Transfer(notifyq.Task):
    cents: int


@app.handler
async def transfer(task: Transfer, pool: Pool, ctx: notifyq.Context) -> None:
    async with ctx.transaction(isolation="serializable") as conn:
        found: str = await conn.execute("SELECT $1", task.cents)
        print(found, pool)
        await app.enqueue(Thumbnail(path="x"), conn=conn)


async def use(dsn: str | None, tasks: Sequence[notifyq.Task], connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    async with app.connect(dsn) as connected:
        task = SendVerificationEmail(user=User(id="1", email="a@b.c"), verification_key="k")
        ref: notifyq.Ref = await connected.enqueue(task)
        id: int = ref.id
        word: str = await ref.result(str, timeout=5)
        anything = await app.ref(id).result()
        try:
            whole: User | None = await ref.result(User | None)
            print(whole)
        except (notifyq.TaskDead, notifyq.TaskCancelled, TimeoutError) as failed:
            error: str | None = failed.error if isinstance(failed, notifyq.TaskFailed) else None
            print(error)
        async for step in ref.progress():
            print(word, anything, step.fraction + 1, step.note)
        cancelled: bool = await ref.cancel() or await app.cancel(5)
        await app.enqueue(task, queue="mail", delay=60, priority=5)
        await app.enqueue(task, run_at=datetime.now(timezone.utc), max_attempts=3)
        await app.enqueue(task, delay=timedelta(minutes=5))
        await app.enqueue(task, conn=connection)
        ids: list[int] = await app.enqueue_many(tasks)
        both: tuple[list[int], notifyq.Ref] = await app.enqueue_many(tasks, then=Thumbnail(path="x"), on_dead="run")
        await app.enqueue(task, after=[both[1], *ids], on_dead="cancel")
        async with anyio.create_task_group() as group:
            info: notifyq.WorkerInfo = await group.start(app.run_worker)
            print(id, ids, info.bell_ms, cancelled)
        await app.run_worker(queues=["default", "mail:5"], concurrency=100, stop=anyio.Event())
        await app.run_worker({"mail": 5, "default": None}, drain=True)


async def of_psycopg(connection: psycopg.AsyncConnection) -> list[int]:
    return await app.enqueue_many([Thumbnail(path="x")], conn=connection)


def blocking(connection: psycopg.Connection) -> None:
    with notifyq.SyncClient(app).connect() as client:
        ref: notifyq.Ref = client.enqueue(Thumbnail(path="x"), queue="mail")
        ids: list[int] = client.enqueue_many([Thumbnail(path="x")], conn=connection, delay=5)
        print(ref.id, ids)


async def tested(dsn: str, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    ran: Ran = await run_inline(app, Thumbnail(path="x"), attempt=2, raises=True)
    assert ran.state == "done", ran.reason
    every: list[Ran] = await run_inline(app, [Part(1), Part(2)])
    print(every, await parts([Part(1)], []))
    async with app.connect(dsn):
        assert await drain(app, with_scheduled=True) == Drained(done=1)
        due: int = await advance(app, 60)
        mails: list[SendVerificationEmail] = await assert_enqueued(
            app, SendVerificationEmail, user={"email": "a@b.c"}, queue="mail", count=due)
        thumbnails = await enqueued(connection, Thumbnail, {"queue": 5}, delay=60)
        print(mails[0].user.email, thumbnails[0].width)
        await refute_enqueued(dsn, Thumbnail, path="x")


async def direct() -> None:
    # A handler is still the function it was.
    await send_verification_email(SendVerificationEmail(User("1", "e"), "k"), notifyq.Context(
        id=1, queue="q", attempt=1, max_attempts=2, priority=0, created_at=datetime.now(timezone.utc)))
    print(thumbnail(Thumbnail(path="x")))
    try:
        await app.enqueue(Thumbnail(path="x"))
    except notifyq.SchemaError as error:
        assert isinstance(error, notifyq.NotifyqError)
"""

# Each a line that replaces the last of the example's, and must not pass.
MISTAKES = [
    'Thumbnail(path=5)',
    'Thumbnail()',
    'app.enqueue("not a task")',
    'app.enqueue(Thumbnail(path="x"), delay="60")',
    'app.enqueue(Thumbnail(path="x"), priorty=5)',
    'app.enqueue(Thumbnail(path="x"), conn="postgresql://")',
    'notifyq.SyncClient(app).enqueue(Thumbnail(path="x"), conn=app)',
    'app.run_worker(concurrency="many")',
    'app.ref("5")',
    'app.ref(5).result(timeout="5")',
    'notifyq.Retry(delay="5")',
    'thumbnail(5)',
    'app.middleware(bare)',
    'app.lifespan(transfer)',
    'app.middleware(thumbnail)',
    'notifyq.Missing',
    'assert_enqueued(app, Thumbnail(path="x"))',
    'run_inline(app, Thumbnail)',
    'app.handler(batch="many")',
    'app.handler(thumbnail, batch=5)',
    'parts(Part(1), [])',
    'app.enqueue(Thumbnail(path="x"), after=["x"])',
    'app.enqueue_many([], then=Thumbnail)',
]  # fmt: skip

# The same, as statements: they aren't awaited, or a class's setting is of another type.
STATEMENTS = [
    'app.enqueue(Thumbnail(path="x"))',
    'app.enqueue_many([Thumbnail(path="x")])',
    'app.enqueue_many([Thumbnail(path="x")], then=Thumbnail(path="x"))',
    'app.cancel(5)',
    'app.ref(5).cancel()',
    'app.ref(5).result()',
    'app.ref(5).result(int)',
    'class Wrong(notifyq.Task): max_attempts = "5"',
    'class Wrong(notifyq.Task): timeout = "5"',
]  # fmt: skip
WRONG = [*(f"print({mistake})" for mistake in MISTAKES), *STATEMENTS]


def test_all_is_what_is_documented() -> None:
    assert set(notifyq.__all__) == PUBLIC
    assert list(notifyq.__all__) == sorted(notifyq.__all__)
    exported = {
        name for name, value in vars(notifyq).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert exported == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_everything_public_is_explained(name: str) -> None:
    thing = getattr(notifyq, name)
    assert inspect.getdoc(thing)
    for method, value in vars(thing).items():
        if inspect.isfunction(value) and not method.startswith("_"):
            assert value.__doc__, f"{name}.{method}"
            assert "return" in value.__annotations__, f"{name}.{method}"


def test_the_tree_of_errors_and_their_exit_codes() -> None:
    codes = {"NotifyqError": 1, "ConfigError": 2, "DatabaseError": 3, "SchemaError": 4}
    for name, code in codes.items():
        error: Any = getattr(notifyq, name)
        assert issubclass(error, notifyq.NotifyqError)
        assert error.exit_code == code


README = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), re.DOTALL)
[FIRST] = [block for block in README if "app = notifyq.App()" in block]
[FAILURES] = [block for block in README if "class Charge(" in block]
# What the example of failures calls, and the reader knows the rest of.
CALLED = """
async def busy() -> bool:
    return False

async def refused() -> bool:
    return True
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project: the example, those of the README, and each mistake in a file of its own."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "readme.py").write_text("\n\n".join([FIRST, CALLED, FAILURES]))
    (folder / "example.py").write_text(EXAMPLE)
    for number, mistake in enumerate(WRONG):
        (folder / f"mistake{number}.py").write_text(f"{EXAMPLE}\n\nasync def wrong() -> None:\n    {mistake}\n")
    return folder


def run(folder: Path, *command: str) -> tuple[int, str]:
    found = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout + found.stderr


def wrong_lines(output: str) -> set[str]:
    """The files that were complained about, each only for its last line."""
    last = EXAMPLE.count("\n") + 4
    found = set()
    for line in output.splitlines():
        if ".py:" in line and "error" in line:
            file, number = line.strip().split(":")[:2]
            assert int(number) == last, line
            found.add(Path(file).name)
    return found


def test_mypy_strict_from_outside(folder: Path) -> None:
    options = ("--strict", "--python-executable", sys.executable, "--cache-dir", str(folder / "cache"))
    _, output = run(folder, "mypy", *options, ".")
    assert wrong_lines(output) == {f"mistake{n}.py" for n in range(len(WRONG))}, output


def test_pyright_strict_from_outside(folder: Path) -> None:
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "include": ["."]}))
    _, output = run(folder, "pyright", "--pythonpath", sys.executable)
    assert wrong_lines(output) == {f"mistake{n}.py" for n in range(len(WRONG))}, output


def test_the_example_runs() -> None:
    space: dict[str, Any] = {"__name__": "example"}
    exec(compile(EXAMPLE, "example.py", "exec", dont_inherit=True), space)
    assert space["app"].registry.types == ["Other", "Part", "SEND_VERIFICATION_EMAIL", "Thumbnail", "Transfer"]
