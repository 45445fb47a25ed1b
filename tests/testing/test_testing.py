"""The testing kit: what it says of a task is what a worker would have done, and what it finds is what is there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

import notifyq
from notifyq.database import connection
from notifyq.embedded import Server
from notifyq.errors import ConfigError, DatabaseError
from notifyq.testing import (
    Databases,
    Drained,
    Ran,
    advance,
    assert_enqueued,
    drain,
    enqueued,
    refute_enqueued,
    run_inline,
)

from ..helpers.databases import admin
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen


class User(msgspec.Struct):
    id: int
    email: str


class Mail(notifyq.Task, tag="MAIL"):
    to: str
    user: User | None = None
    copies: list[User] = msgspec.field(default_factory=list)
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    queue: str = ""  # a field of the payload, whatever a class may say of its queue


class Act(notifyq.Task):
    """Does as it is told."""

    max_attempts = 3
    backoff = 100.0
    how: str = "done"


class Slow(notifyq.Task):
    timeout = 0.01


class Thread(notifyq.Task):
    pass


class Chain(notifyq.Task):
    left: int
    delay: float | None = None


class Unhandled(notifyq.Task):
    pass


class Receipt(msgspec.Struct):
    number: int
    at: datetime


NOW = datetime(2030, 1, 1, tzinfo=UTC)
app = notifyq.App()
contexts: list[notifyq.Context] = []


@app.handler
async def mail(task: Mail) -> None:
    pass


@app.handler
async def act(task: Act, ctx: notifyq.Context) -> Receipt | notifyq.Dead | object:
    contexts.append(ctx)
    match task.how:
        case "done":
            return Receipt(number=7, at=NOW)
        case "raise":
            raise KeyError("no such thing")
        case "retry":
            raise notifyq.Retry(delay=30, reason="busy")
        case "dead":
            return notifyq.Dead("refused")
        case "cancel":
            raise notifyq.Cancel("not needed")
        case "exit":
            raise SystemExit(3)
        case "once":
            if ctx.attempt == 1:
                raise ValueError("the first time")
            return None
        case _:
            return object()


@app.handler
async def slow(task: Slow) -> None:
    await anyio.sleep(3600)


@app.handler
def thread(task: Thread) -> Receipt | notifyq.Retry:
    return Receipt(number=threading.get_ident(), at=NOW)


@app.handler
async def chain(task: Chain) -> None:
    if task.left:
        await app.enqueue(Chain(left=task.left - 1, delay=task.delay), queue=f"q{task.left}", delay=task.delay)


@pytest.fixture
async def connected(dsn: str) -> AsyncIterator[notifyq.App]:
    async with app.connect(dsn):
        yield app


# ------------------------------------------------------------------------------------------------ inline


OUTCOMES = {
    "raise": ("retry", "KeyError: 'no such thing'"),
    "retry": ("retry", "busy"),
    "dead": ("dead", "refused"),
    "cancel": ("cancelled", "not needed"),
    "exit": ("retry", "SystemExit: 3"),
    "unwritable": (
        "dead",
        "its result, a object, can't be written as JSON: TypeError: Encoding objects of type object",
    ),
}


@pytest.mark.parametrize("how", OUTCOMES)
async def test_inline_is_what_a_worker_does(how: str, connected: notifyq.App, dsn: str) -> None:
    """The same outcome and the same words as in the row, from the same handler."""
    state, reason = OUTCOMES[how]
    ran = await run_inline(app, Act(how=how))
    assert (ran.state, ran.result) == (state, None)
    assert ran.reason is not None
    assert ran.reason.startswith(reason)
    await app.enqueue(Act(how=how))
    assert await drain(app) == Drained(**{state: 1})
    db = await connection.connect(dsn)
    assert await db.fetchval("SELECT error FROM notifyq.all_tasks") == ran.reason
    await db.close()
    last = await run_inline(app, Act(how=how), attempt=3)
    assert last.state == ("dead" if state == "retry" else state)


async def test_inline_delays() -> None:
    """A retry says how long it waits: as asked for, or by the type's backoff."""
    assert (await run_inline(app, Act(how="retry"))).delay == 30
    delays = [(await run_inline(app, Act(how="raise"))).delay for _ in range(20)]
    assert all(delay is not None and 0 <= delay <= 100 for delay in delays)
    assert len(set(delays)) > 1
    assert (await run_inline(app, Act(how="dead"))).delay is None


async def test_inline_results_are_typed() -> None:
    ran = await run_inline(app, Thread())
    assert ran.state == "done"
    assert isinstance(ran.result, Receipt)
    assert ran.result.at == NOW
    assert ran.result.number != threading.get_ident()
    assert await run_inline(app, Mail(to="x")) == Ran(state="done")


async def test_inline_context() -> None:
    contexts.clear()
    await run_inline(app, Act(), attempt=2, queue="mail", priority=5, id=77, created_at=NOW)
    await run_inline(app, Act(), max_attempts=9)
    asked, default = contexts
    expected = notifyq.Context(id=77, queue="mail", attempt=2, max_attempts=3, priority=5, created_at=NOW)
    assert asked == expected
    assert (default.id, default.queue, default.attempt, default.max_attempts) == (1, "default", 1, 9)
    assert abs(datetime.now(UTC) - default.created_at) < timedelta(minutes=1)


async def test_inline_timeout() -> None:
    ran = await run_inline(app, Slow())
    assert (ran.state, ran.reason) == ("retry", "timed out after 0.01 s")


async def test_inline_raises_when_asked() -> None:
    """What the handler raised, itself; but not what merely says how it ends."""
    with pytest.raises(KeyError, match="no such thing"):
        await run_inline(app, Act(how="raise"), raises=True)
    with pytest.raises(SystemExit):
        await run_inline(app, Act(how="exit"), raises=True)
    for how, (state, _) in OUTCOMES.items():
        if how not in ("raise", "exit"):
            assert (await run_inline(app, Act(how=how), raises=True)).state == state


async def test_inline_takes_what_enqueue_takes() -> None:
    with pytest.raises(ConfigError, match=r"task MAIL doesn't validate .*: Expected `str`, got `int` - at `\$\.to`"):
        await run_inline(app, Mail(to=5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no handler takes type 'Unhandled'"):
        await run_inline(app, Unhandled())
    with pytest.raises(ConfigError, match="expected an instance"):
        await run_inline(app, Mail)  # type: ignore[call-overload]

    class Impostor(notifyq.Task, tag="MAIL"):
        pass

    with pytest.raises(ConfigError, match=r"type 'MAIL' is Mail in this app"):
        await run_inline(app, Impostor())


async def test_inline_can_be_cancelled() -> None:
    with anyio.move_on_after(0.05) as scope:
        await run_inline(endless, Act())
    assert scope.cancelled_caught


endless = notifyq.App()


@endless.handler
async def never(task: Act) -> None:
    await anyio.sleep_forever()


# ------------------------------------------------------------------------------------------------ drain


async def test_drain_runs_what_handlers_enqueue(connected: notifyq.App) -> None:
    """In queues too that nobody has heard of; nothing is left, and nothing is counted twice."""
    await app.enqueue(Chain(left=3))
    assert await drain(app) == Drained(done=4)
    assert await enqueued(app, Chain) == []
    assert await drain(app) == Drained()


async def test_drain_leaves_what_is_not_for_it(connected: notifyq.App) -> None:
    """Of other queues, of unknown types, or later."""
    await app.enqueue(Act(), queue="other")
    await app.enqueue(Unhandled())
    await app.enqueue(Act(), delay=3600)
    await app.enqueue(Act())
    assert await drain(app, queues=["default"]) == Drained(done=1)
    assert [len(await enqueued(app, Act, queue=queue)) for queue in ("default", "other")] == [1, 1]
    assert await drain(app) == Drained(done=1)
    assert len(await enqueued(app, Unhandled)) == 1


async def test_drain_with_scheduled(connected: notifyq.App) -> None:
    """From one time to the next: retries to their end, and what is scheduled by what was scheduled."""
    await app.enqueue(Act(how="raise"))
    await app.enqueue(Act(how="once"), delay=86400 * 400)
    await app.enqueue(Chain(left=2, delay=3600.0), delay=60)
    assert await drain(app) == Drained(retry=1)
    contexts.clear()
    assert await drain(app, with_scheduled=True) == Drained(done=4, dead=1)
    assert [ctx.attempt for ctx in contexts] == [2, 3, 1, 2]


async def test_drain_connects_for_handlers(dsn: str) -> None:
    async with app.connect(dsn):
        await app.enqueue(Chain(left=1))
    assert await drain(app, dsn) == Drained(done=2)


async def test_drain_goes_by_no_cron(dsn: str) -> None:
    """There is a slot each second, and each one that was put ahead would be one more to run."""
    own, seen = notifyq.App(), Seen()

    @own.cron("* * * * * *")
    @own.handler
    async def act(task: Act) -> None:
        seen.add(task)

    async with own.connect(dsn):
        await own.enqueue(Act())
        assert await drain(own, with_scheduled=True) == Drained(done=1)
        async with working(own, dsn):
            await seen.reach(2)


async def test_drain_that_has_no_end(connected: notifyq.App) -> None:
    await app.enqueue(Chain(left=1_000_000, delay=3600.0))
    with pytest.raises(AssertionError, match=r"after [\d.]+ s there are still tasks to run; .*done=[1-9]"):
        await drain(app, with_scheduled=True, timeout=limit(0.5))


# ------------------------------------------------------------------------------------------------ the clock


async def test_advance_makes_due_what_would_be(connected: notifyq.App) -> None:
    for delay in (60, 120, 7200):
        await app.enqueue(Act(), delay=delay)
    assert await advance(app, 59) == 0
    assert await drain(app) == Drained()
    assert await advance(app, 2) == 1
    assert await advance(app, 0) == 0
    assert await drain(app) == Drained(done=1)
    assert await advance(app, 7200) == 2
    assert await drain(app) == Drained(done=2)


async def test_advance_keeps_the_time_between(connected: notifyq.App, dsn: str) -> None:
    """All of a row's times move alike, of what has ended too."""
    await app.enqueue(Act(how="dead"))
    await app.enqueue(Act(how="raise"))
    await drain(app)
    await app.enqueue(Act(), run_at=NOW, queue="later")
    db = await connection.connect(dsn)
    times = "SELECT id, created_at, run_at, processing_at, processed_at, state FROM notifyq.all_tasks ORDER BY id"
    before = await db.fetch(times)
    await advance(dsn, 1000)
    after = await db.fetch(times)
    await db.close()
    assert len(after) == 3
    for old, new in zip(before, after, strict=True):
        assert new["state"] == old["state"]
        for name in ("created_at", "run_at", "processing_at", "processed_at"):
            assert new[name] == (None if old[name] is None else old[name] - timedelta(seconds=1000)), name
    assert len(await enqueued(app, Act, queue="later", delay=(NOW - before[2]["created_at"]).total_seconds())) == 1


async def test_advance_wakes_a_worker(connected: notifyq.App, dsn: str) -> None:
    """By the bell: the fallback poll is off."""
    seen, own = Seen(), notifyq.App()

    @own.handler
    async def act(task: Act) -> None:
        seen.add(task)

    async with working(own, dsn):
        await app.enqueue(Act(), delay=3600)
        assert await advance(app, 3601) == 1
        await seen.reach(1)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "60"])
async def test_advance_goes_one_way(seconds: Any) -> None:
    with pytest.raises(ConfigError, match="expected seconds, 0 or more"):
        await advance(app, seconds)


# ------------------------------------------------------------------------------------------------ enqueued


async def fill() -> None:
    ann, bob = User(id=1, email="ann@b.c"), User(id=2, email="bob@b.c")
    await app.enqueue(
        Mail(to="ann", user=ann, copies=[ann, bob], headers={"a": "1", "b": "2"}), queue="mail", priority=3
    )
    await app.enqueue(Mail(to="bob", user=bob), delay=60)
    await app.enqueue(Mail(to="nobody", queue="field"), run_at=NOW)
    await app.enqueue(Act())


MATCHES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {}, ["ann", "bob", "nobody"]),
    ({}, {"to": "ann"}, ["ann"]),
    ({"to": "ann"}, {}, ["ann"]),
    ({}, {"to": "an"}, []),
    ({}, {"user": {"email": "bob@b.c"}}, ["bob"]),
    ({}, {"user": User(id=2, email="bob@b.c")}, ["bob"]),
    ({}, {"user": {"email": "bob@b.c", "id": 1}}, []),
    ({}, {"user": None}, ["nobody"]),
    ({}, {"copies": [{"id": 1}, {}]}, ["ann"]),
    ({}, {"copies": [{"id": 1}]}, []),
    ({}, {"headers": {"b": "2"}}, ["ann"]),
    ({}, {"headers": {"c": "2"}}, []),
    ({}, {"queue": "mail"}, ["ann"]),
    ({"queue": "field"}, {"queue": "default"}, ["nobody"]),
    ({}, {"priority": 3}, ["ann"]),
    ({}, {"priority": 0}, ["bob", "nobody"]),
    ({}, {"delay": 60}, ["bob"]),
    ({}, {"delay": 0}, ["ann"]),
    ({}, {"delay": 62}, []),
    ({}, {"run_at": NOW}, ["nobody"]),
    ({}, {"to": "bob", "queue": "mail"}, []),
]


async def test_what_matches(connected: notifyq.App) -> None:
    await fill()
    for fields, more, names in MATCHES:
        assert [mail.to for mail in await enqueued(app, Mail, fields, **more)] == names, (fields, more)
        if names:
            found = await assert_enqueued(app, Mail, fields, **more)
            assert [mail.to for mail in found] == names
            with pytest.raises(AssertionError, match=r"enqueued as Mail\("):
                await refute_enqueued(app, Mail, fields, **more)
        else:
            await refute_enqueued(app, Mail, fields, **more)
            with pytest.raises(AssertionError, match="no task is enqueued as"):
                await assert_enqueued(app, Mail, fields, **more)
        await assert_enqueued(app, Mail, fields, count=len(names), **more)
        with pytest.raises(AssertionError):
            await assert_enqueued(app, Mail, fields, count=len(names) + 1, **more)


async def message(awaitable: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        await awaitable
    return str(caught.value)


async def test_what_the_messages_say(connected: notifyq.App) -> None:
    """What is there instead, the nearest first, and how it differs."""
    assert await message(assert_enqueued(app, Mail)) == "no task is enqueued as Mail(); there is none of this type"
    await fill()
    text = await message(assert_enqueued(app, Mail, to="bob", user={"email": "ann@b.c"}, queue="mail"))
    first, *rest = text.splitlines()
    assert first == (
        "no task is enqueued as Mail(to='bob', user={'email': 'ann@b.c'}), queue 'mail'. There is, the nearest first:"
    )
    assert rest[0].startswith("  id 1: to is 'ann', not 'bob'; Mail(to='ann', ")
    assert rest[1].startswith("  id 2: queue is 'default', not 'mail'; user.email is 'bob@b.c', not 'ann@b.c'; Mail(")
    assert rest[2].startswith("  id 3: queue is 'default', not 'mail'; to is 'nobody', not 'bob'; user is None, not {")
    text = await message(assert_enqueued(app, Mail, copies=[{"id": 1}, {"id": 3}]))
    assert "  id 1: copies[1].id is 2, not 3; Mail(" in text
    assert "no task, instead of 2, is enqueued" in await message(assert_enqueued(app, Mail, to="x", count=2))
    text = await message(assert_enqueued(app, Mail, to="bob", count=2))
    assert text.startswith("1 task is enqueued, not 2, as Mail(to='bob'):\n  id 2: Mail(")
    assert (await message(refute_enqueued(app, Mail, queue="default"))).startswith("2 tasks are enqueued as Mail(), qu")
    text = await message(assert_enqueued(app, Chain))
    assert text == (
        "no task is enqueued as Chain(); there is none of this type; "
        "of others: Act 1 ready, MAIL 1 ready, MAIL 2 scheduled"
    )
    await drain(app)
    assert "; of this type there is 1 done; of others: MAIL" in await message(assert_enqueued(app, Act))
    await app.enqueue_many([Mail(to="many")] * 20)
    assert (await message(assert_enqueued(app, Mail, to="x"))).endswith("\n  and 17 more")


async def test_a_field_that_is_not_there(connected: notifyq.App) -> None:
    """Never matches, so refuting it would be a test that can't fail."""
    with pytest.raises(ConfigError, match=r"Mail has no field 'too'; did you mean 'to'\?"):
        await refute_enqueued(app, Mail, too="x")
    with pytest.raises(ConfigError, match="Act has no field 'zzz'; it has how"):
        await enqueued(app, Act, zzz=1)
    await fill()
    with pytest.raises(ConfigError, match=r"User has no field 'mail'; did you mean 'email'\?"):
        await refute_enqueued(app, Mail, user={"mail": "x"})
    with pytest.raises(ConfigError, match="expected a subclass"):
        await enqueued(app, Mail(to="x"))  # type: ignore[arg-type]


async def test_a_payload_that_does_not_fit(connected: notifyq.App, dsn: str) -> None:
    db = await connection.connect(dsn)
    await db.execute("INSERT INTO notifyq.task (type, payload) VALUES ('MAIL', '{\"to\": 5}')")
    for look in (enqueued, assert_enqueued, refute_enqueued):
        with pytest.raises(
            AssertionError, match=r"task 1 is enqueued, but its payload doesn't fit MAIL: Expected `str`"
        ):
            await look(db, Mail)
    await db.close()


async def test_in_a_transaction(connected: notifyq.App, dsn: str) -> None:
    """Of a user's connection, with whatever codec it has for jsonb; others don't see it yet."""
    conn = await asyncpg.connect(dsn)
    await conn.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    async with conn.transaction():
        await app.enqueue(Mail(to="ann"), conn=conn)
        await assert_enqueued(conn, Mail, to="ann", count=1)
        await refute_enqueued(app, Mail)
    await assert_enqueued(dsn, Mail, to="ann")
    await conn.close()


async def test_an_app_that_is_not_connected() -> None:
    with pytest.raises(ConfigError, match="not connected"):
        await enqueued(app, Mail)
    with pytest.raises(ConfigError, match="expected a connected app, a connection of asyncpg, or a DSN"):
        await enqueued(None, Mail)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the plugin


async def test_databases(notifyq_server_dsn: str) -> None:
    """Each is its own, has the schema, and goes, with its template, whoever is still connected."""
    async with Databases(notifyq_server_dsn) as databases:
        async with databases.new() as one, databases.new() as other:
            first = await connection.connect(one)
            await first.execute("INSERT INTO notifyq.task (type) VALUES ('X')")
            second = await connection.connect(other)
            assert await second.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 0
        admin = await connection.connect(notifyq_server_dsn)
        names = "SELECT datname FROM pg_database WHERE datname LIKE $1 || '%'"
        prefix = databases.template.removesuffix("_template")
        assert [row[0] for row in await admin.fetch(names, prefix)] == [databases.template]
    assert await admin.fetch(names, prefix) == []
    await admin.close()
    for conn in (first, second):
        conn.terminate()


async def test_a_role_that_may_not_create_databases(notifyq_server_dsn: str, server: Server) -> None:
    await admin(server, "CREATE ROLE guest LOGIN")
    with pytest.raises(DatabaseError, match="this role may not create databases"):
        await Databases(notifyq_server_dsn.replace("notifyq@", "guest@")).__aenter__()
    await admin(server, "DROP ROLE guest")


def test_a_plain_test(notifyq_dsn: str) -> None:
    """There is no event loop, and it makes one; that of docs/testing.md is of a project of its own."""

    async def use() -> Drained:
        async with app.connect(notifyq_dsn):
            await app.enqueue(Thread())
            return await drain(app)

    assert asyncio.run(use()) == Drained(done=1)


def test_only_the_plugin_imports_pytest() -> None:
    code = "import sys, notifyq.testing; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
