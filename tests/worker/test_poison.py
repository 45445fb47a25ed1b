"""Poison of every kind in the middle of good tasks: these are all done, and each bad one is kept whole, with a message
that names the place."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import re
import sys
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import asyncpg
import msgspec
import pytest

import notifyq

from ..helpers.machine import Probe
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow

INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2::text::jsonb) RETURNING id"
SOON = 1.0  # seconds: far more than a wake-up takes, and less than the heartbeat that would find it too


class User(msgspec.Struct):
    id: int
    tags: list[str] = []


class Good(notifyq.Task):
    name: str = ""


class Strict(notifyq.Task):
    user: User
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    day: datetime.date | None = None
    key: uuid.UUID | None = None
    anything: Any = None


class Raise(notifyq.Task):
    max_attempts = 1
    what: str


class RaiseThread(notifyq.Task):
    max_attempts = 1
    what: str


class Return(notifyq.Task):
    what: str


class Odd(notifyq.Task):
    """Its handlers do what they should not."""

    max_attempts = 1
    timeout = 0.1
    what: str


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Deaf(BaseException):
    def __str__(self) -> str:
        raise SystemExit("not even that")

    __repr__ = __str__


def deep() -> None:
    deep()


EXCEPTIONS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "exit": (lambda: SystemExit(3), "SystemExit: 3"),
    "interrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "generator": (GeneratorExit, "GeneratorExit"),
    "cancelled": (asyncio.CancelledError, "CancelledError"),
    "group": (lambda: ExceptionGroup("both", [ValueError(1), OSError(2)]), "ExceptionGroup: both (2 sub-exceptions)"),
    "base group": (lambda: BaseExceptionGroup("b", [KeyboardInterrupt()]), "BaseExceptionGroup: b (1 sub-exception)"),
    "memory": (MemoryError, "MemoryError"),
    "async stop": (lambda: StopAsyncIteration(1), "RuntimeError|StopAsyncIteration: 1"),
    "stop": (lambda: StopIteration(1), "RuntimeError: coroutine raised StopIteration"),
    "mute": (Mute, "Mute: <its __str__ raised ValueError>"),
    "deaf": (Deaf, "Deaf: <its __str__ raised SystemExit>"),
    "nul": (lambda: ValueError("a\x00b"), r"ValueError: a\x00b"),
    "surrogate": (lambda: ValueError("a\ud800b"), r"ValueError: a\ud800b"),
    "long": (lambda: ValueError("x" * 1_000_000), "ValueError: xxx"),
}

cycle: list[Any] = []
cycle.append(cycle)
RESULTS: dict[str, tuple[Any, str]] = {
    "object": (object(), "its result, a object, can't be written as JSON"),
    "cycle": (cycle, "its result, a list, can't be written as JSON: RecursionError"),
    "surrogate": ("\ud800", "its result, a str, can't be written as JSON"),
    "nul": ("a\x00b", "PostgreSQL can't store its outcome: .*Unicode"),
    "nul inside": ({"list": ["\x00"]}, "PostgreSQL can't store its outcome: .*Unicode"),
    "not JSON": (msgspec.Raw(b"{"), "PostgreSQL can't store its outcome"),
}

leak: contextvars.ContextVar[str] = contextvars.ContextVar("leak")


class Bench:
    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.good = good = Seen()
        self.leaks: list[str] = []
        self.behind: list[asyncio.Task[Any]] = []

        @app.handler
        async def run_good(task: Good) -> str:
            if leak.get(None) is not None:
                self.leaks.append(leak.get())
            await anyio.lowlevel.checkpoint()
            good.add(task.name)
            return task.name

        @app.handler
        async def run_strict(task: Strict) -> None:
            good.add("strict")

        @app.handler
        async def run_raise(task: Raise) -> None:
            await anyio.lowlevel.checkpoint()
            raise EXCEPTIONS[task.what][0]()

        @app.handler
        def run_raise_thread(task: RaiseThread) -> None:
            raise EXCEPTIONS[task.what][0]()

        @app.handler
        async def run_return(task: Return) -> Any:
            return RESULTS[task.what][0]

        app.handler(self.run_odd)

    async def run_odd(self, task: Odd) -> Any:
        match task.what:
            case "never returns":
                await anyio.Event().wait()
            case "swallows its cancellation":
                try:
                    await anyio.Event().wait()
                except BaseException:
                    return "finished anyway"
            case "raises when cancelled":
                try:
                    await anyio.Event().wait()
                finally:
                    raise OSError("while cleaning up")
            case "leaves a context variable":
                leak.set("left behind")
            case "fails and leaves a context variable":
                leak.set("left behind")
                raise ValueError("and failed")
            case "recurses":
                deep()
            case "cancels itself" | "cancels itself, and returns":
                me = asyncio.current_task()
                assert me is not None
                me.cancel()
                if task.what == "cancels itself":
                    await anyio.lowlevel.checkpoint()
            case "leaves a task behind":
                self.behind.append(asyncio.create_task(asyncio.Event().wait()))
            case "prints":
                print("x" * 2_000_000)
        return None


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def insert(db: Any, type: str, payload: str | dict[str, Any]) -> int:
    text = payload if isinstance(payload, str) else msgspec.json.encode(payload).decode()
    id: int = await db.fetchval(INSERT, type, text)
    return id


async def row(db: Any, id: int) -> dict[str, Any]:
    return dict(await db.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id))


async def nothing_live(db: Any) -> None:
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)


BAD_PAYLOADS = {
    "[1, 2]": "Expected `object`, got `array`",
    '"text"': "Expected `object`, got `str`",
    "null": "Expected `object`, got `null`",
    "17": "Expected `object`, got `int`",
    "{}": "Object missing required field `user`",
    '{"user": {}}': r"missing required field `id` - at `\$.user`",
    '{"user": {"id": "x"}}': r"Expected `int`, got `str` - at `\$.user.id`",
    '{"user": {"id": 1.5}}': r"Expected `int`, got `float` - at `\$.user.id`",
    '{"user": {"id": 1, "tags": ["a", null]}}': r"Expected `str`, got `null` - at `\$.user.tags\[1\]`",
    '{"user": {"id": 1}, "share": 1.01}': r"Expected `float` <= 1.0 - at `\$.share`",
    '{"user": {"id": 1}, "share": 1e400}': r"Number out of range - at `\$.share`",
    '{"user": {"id": 1e5000}}': r"at `\$.user.id`",
    '{"user": {"id": 1}, "day": "2026-02-30"}': r"Invalid RFC3339.* - at `\$.day`",
    '{"user": {"id": 1}, "key": "no"}': r"Invalid UUID - at `\$.key`",
    '{"user": {"id": 1}, "$type": "Good"}': r"Invalid value 'Good' - at `\$.\$type`",
}
GOOD_PAYLOADS = (
    '{"user": {"id": 1}, "more": {"than": ["it", "knows"]}}',
    '{"user": {"id": 1, "more": null}, "$type": "Strict"}',
    '{"user": {"id": 1e400}, "share": 1e-400}',
    '{"user": {"id": 1}, "anything": 1e300}',
    '{"user": {"id": 1}, "anything": "\\u0001 \\\\u0000 \\ud83d\\ude00"}',
    '{"user": {"id": 1}, "anything": %s}' % ("[" * 200 + "]" * 200),
)
DEEP = '{"user": {"id": 1}, "anything": %s}' % ("[" * 3000 + "]" * 3000)
if sys.version_info < (3, 13):  # which lets C code go deeper than PostgreSQL lets jsonb
    BAD_PAYLOADS[DEEP] = "RecursionError"
else:
    GOOD_PAYLOADS = (*GOOD_PAYLOADS, DEEP)


async def test_payloads(bench: Bench, db: Any, dsn: str) -> None:
    """Each is dead at once with msgspec's message, which has the path, and its handler isn't called. Additional fields
    are fine."""
    bad = {}
    for number, payload in enumerate(BAD_PAYLOADS):
        bad[payload] = await insert(db, "Strict", payload)
        await insert(db, "Good", {"name": str(number)})
    for payload in GOOD_PAYLOADS:
        await insert(db, "Strict", payload)
    for refused in ('{"user": "\\u0000"}', '{"user": "\\ud800"}', "{", ""):  # PostgreSQL's own guard
        with pytest.raises(asyncpg.DataError):
            await insert(db, "Strict", refused)
    async with working(bench.app, dsn, concurrency=4):
        await nothing_live(db)
    assert bench.good.items.count("strict") == len(GOOD_PAYLOADS)
    assert len(bench.good.items) == len(GOOD_PAYLOADS) + len(bad)
    for payload, id in bad.items():
        found = await row(db, id)
        assert (found["state"], found["attempts"], found["result"]) == ("dead", 1, None), payload[:100]
        assert re.search(BAD_PAYLOADS[payload], found["error"]), (payload[:100], found["error"])
        same = await db.fetchval("SELECT payload = $1::text::jsonb FROM notifyq.all_tasks WHERE id = $2", payload, id)
        assert same, "the row is kept whole"


async def test_large_payloads(bench: Bench, db: Any, dsn: str) -> None:
    """50 MB, and 26 MB that PostgreSQL can't compress, are dead with a clear message. 10 MB are fine."""
    sent = """INSERT INTO notifyq.task (type, payload) SELECT 'Good', jsonb_build_object('name', text)
              FROM (VALUES (repeat('x', 50000000)),
                           ((SELECT string_agg(sha256(n::text::bytea)::text, '') FROM generate_series(1, 400000) n)),
                           (repeat('x', 10000000))) AS t (text) RETURNING id"""
    ids = [found[0] for found in await db.fetch(sent)]
    await insert(db, "Good", {"name": "small"})
    async with working(bench.app, dsn):
        await nothing_live(db)
    assert {len(name) for name in bench.good.items} == {5, 10_000_000}
    kept = """SELECT state, error, octet_length(payload ->> 'name') >= 26000000 FROM notifyq.all_tasks
              WHERE id = ANY ($1::bigint[])"""
    for found in await db.fetch(kept, ids[:2]):
        assert tuple(found) == ("dead", "its payload is larger than 16,777,216 bytes", True)


async def test_odd_rows(bench: Bench, db: Any, dsn: str, probe: Probe) -> None:
    """Only a person with all rights sets such columns, to the ends of their ranges. The tasks run, or wait, like
    others."""
    odd = [
        "created_at", "'infinity'",
        "created_at", "'-infinity'",
        "created_at", "'4713-01-01 BC'",
        "created_at", "'294276-12-31'",
        "run_at", "'-infinity'",
        "run_at", "'4713-01-01 BC'",
        "attempts", "32767",
        "attempts", "-32768",
        "max_attempts", "32767",
        "priority", "-32768",
        "errors", "'\"none\"'",
        "promoted", "true",
    ]  # fmt: skip
    for column, value in zip(odd[::2], odd[1::2], strict=True):
        await db.execute(f"INSERT INTO notifyq.task (type, {column}) VALUES ('Good', {value})")
    for far in ("infinity", "294276-12-31"):
        await db.execute("INSERT INTO notifyq.task (type, run_at) VALUES ('Good', $1::text::timestamptz)", far)
    async with working(bench.app, dsn):
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 2)
        assert len(bench.good.items) == len(odd) // 2
        await insert(db, "Good", {"name": "after"})
        with probe.within(SOON):
            await bench.good.reach(len(odd) // 2 + 1)
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks WHERE state = 'scheduled'") == 2


async def test_what_handlers_raise(bench: Bench, db: Any, dsn: str) -> None:
    """Whatever a handler raises, in a thread too, is the failure of that task alone, and the error names the handler's
    line."""
    ids = {}
    for what in EXCEPTIONS:
        for type in ("Raise", "RaiseThread"):
            ids[type, what] = await insert(db, type, {"what": what})
            await insert(db, "Good", {"name": f"beside {type} {what}"})
    async with working(bench.app, dsn, concurrency=4):
        await nothing_live(db)
        assert len(bench.good.items) == len(ids)
    for (type, what), id in ids.items():
        found = await row(db, id)
        assert found["state"] == "dead", (type, what)
        want = EXCEPTIONS[what][1]
        assert any(found["error"].startswith(text) for text in want.split("|")), (type, what, found["error"])
        assert len(found["error"]) < 10_000
        [kept] = msgspec.json.decode(found["errors"])
        assert "test_poison.py" in kept["traceback"] or what == "deaf", (type, what)


async def test_what_handlers_return(bench: Bench, db: Any, dsn: str) -> None:
    """A result isn't JSON, or PostgreSQL refuses it: only that task is dead, and others of its batch are done."""
    ids = {}
    for what in RESULTS:
        ids[what] = await insert(db, "Return", {"what": what})
        await insert(db, "Good", {"name": f"beside {what}"})
    async with working(bench.app, dsn):
        await nothing_live(db)
    assert len(bench.good.items) == len(RESULTS)
    for what, id in ids.items():
        found = await row(db, id)
        assert found["state"] == "dead", what
        assert re.search(RESULTS[what][1], found["error"]), (what, found["error"])
    done = "SELECT count(*) FROM notifyq.all_tasks WHERE state = 'done' AND result IS NOT NULL AND attempts = 1"
    assert await db.fetchval(done) == len(RESULTS)


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_what_handlers_do(bench: Bench, db: Any, dsn: str, concurrency: int) -> None:
    """Each runs between good tasks, on few runners, so that the next task would suffer."""
    expected = {
        "never returns": "timed out after 0.1 s",
        "swallows its cancellation": None,
        "raises when cancelled": "OSError: while cleaning up",
        "leaves a context variable": None,
        "fails and leaves a context variable": "ValueError: and failed",
        "recurses": "RecursionError",
        "cancels itself": "CancelledError",
        "cancels itself, and returns": None,
        "leaves a task behind": None,
        "prints": None,
    }
    ids = {}
    for what in expected:
        for n in range(4):
            ids[what] = await insert(db, "Odd", {"what": what})
            await insert(db, "Good", {"name": f"beside {what} {n}"})
    async with working(bench.app, dsn, concurrency=concurrency):
        await nothing_live(db)
    for task in bench.behind:
        assert not task.done(), "what a handler has begun is its own affair"
        task.cancel()
    assert len(bench.good.items) == 4 * len(expected)
    assert await db.fetchval("SELECT count(*) FROM notifyq.finished WHERE type = 'Good' AND attempts > 1") == 0
    assert bench.leaks == []
    for what, error in expected.items():
        found = await row(db, ids[what])
        assert found["state"] == ("dead" if error else "done"), (what, found["error"])
        assert (found["error"] or "").startswith(error or "")


async def test_an_unknown_type_waits_for_a_worker_that_knows_it(
    bench: Bench, db: Any, dsn: str, logged: Callable[[str], list[dict[str, Any]]], probe: Probe
) -> None:
    """The task is left unhandled: it doesn't fail, no worker claims it again and again, and people see it. A worker
    that knows the type runs it at once when it starts."""
    types = ["Later", "", "x" * 200, "'; DROP TABLE", "%s %d {}", "zeilen\numbruch", "\N{PILE OF POO}"]
    knower, seen = notifyq.App(), Seen()

    class Later(notifyq.Task):
        n: int = 0

    @knower.handler
    async def later(task: Later) -> None:
        seen.add(task.n)

    async with working(bench.app, dsn):
        for n, type in enumerate(types):
            await insert(db, type, {"n": n})
            await insert(db, "Good", {})
        await bench.good.reach(len(types))
        unhandled = (
            "SELECT count(*) FROM notifyq.task WHERE withheld AND worker IS NULL AND attempts = 0 AND errors IS NULL"
        )
        await eventually(lambda: db.fetchval(unhandled), len(types))
        assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks WHERE state = 'ready'") == len(types)
        told = logged("no handler here")
        assert sum(fields["tasks"] for fields in told) == len(types), "once for each, and no more"
        async with working(knower, dsn):
            with probe.within(SOON):
                await seen.reach(1)
        assert seen.items == [0]


@pytest.mark.parametrize("tasks", [15, 150], ids=["few", "more than it has slots"])
async def test_a_sleeping_worker_that_knows_the_type_is_woken(
    bench: Bench, db: Any, dsn: str, logged: Callable[[str], list[dict[str, Any]]], tasks: int, probe: Probe
) -> None:
    """Two fleets sleep at the bell. A worker of one claims a task of a type that it doesn't know, and releases it; the
    other runs it at once."""
    knower, seen = notifyq.App(), Seen()

    class Other(notifyq.Task):
        n: int

    @knower.handler
    async def other(task: Other) -> None:
        seen.add(task.n)

    many = """INSERT INTO notifyq.task (type, payload)
              SELECT 'Other', jsonb_build_object('n', n) FROM generate_series(1, $1::integer) n"""
    async with working(bench.app, dsn, concurrency=20), working(knower, dsn, concurrency=20):
        for round in range(1, 6):
            await db.execute(many, tasks)
            with probe.within(SOON):
                await seen.reach(round * tasks)
            await nothing_live(db)
    assert sorted(seen.items) == sorted([*range(1, tasks + 1)] * 5)
    assert logged("no handler here"), "a worker that didn't know the type claimed it"
