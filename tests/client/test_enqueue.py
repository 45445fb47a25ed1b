"""Enqueue from Python: validated before it is sent, in the caller's transaction or its own, singly and in bulk."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any

import anyio
import asyncpg
import msgspec
import pytest

import notifyq
from notifyq.errors import ConfigError, DatabaseError, SchemaError

from ..helpers.databases import Sessions
from ..helpers.machine import limit


class Mail(notifyq.Task, tag="MAIL"):
    to: str
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    extra: Any = None


class Other(notifyq.Task):
    pass


@pytest.fixture
def app() -> notifyq.App:
    return notifyq.App()


ROWS = "SELECT * FROM notifyq.all_tasks ORDER BY id"


async def test_no_connection_is_free(app: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits for one as long as `connect` says, and not for as long as it takes."""
    monkeypatch.setattr("notifyq.client.pool.SIZE", 1)
    async with app.connect(dsn, timeout=0.2):
        pool = app._pool  # pyright: ignore[reportPrivateUsage]
        assert pool is not None
        with anyio.fail_after(limit(60)):
            async with pool.acquire():
                with pytest.raises(DatabaseError, match=r"no connection to the database within 0\.2 s"):
                    await app.enqueue(Mail(to="a"))
    assert await db.fetch(ROWS) == []


async def test_a_row_with_the_defaults(app: notifyq.App, dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        ref = await app.enqueue(Mail(to="a@b.c"))
    (row,) = await db.fetch(ROWS)
    assert ref == notifyq.Ref(id=row["id"])
    assert json.loads(row["payload"]) == {"to": "a@b.c", "size": 0, "extra": None}
    assert (row["type"], row["queue"], row["priority"], row["max_attempts"]) == ("MAIL", "default", 0, None)
    assert (row["state"], row["attempts"]) == ("ready", 0)


async def test_every_option(app: notifyq.App, dsn: str, db: Any) -> None:
    at = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=2)
    async with app.connect(dsn):
        await app.enqueue(Mail(to="a"), queue="mail", delay=3600, priority=-32768, max_attempts=32767)
        await app.enqueue(Mail(to="a"), run_at=at, priority=32767, max_attempts=1)
        await app.enqueue(Mail(to="a"), delay=0)
        await app.enqueue(Mail(to="a"), run_at=datetime(2000, 1, 1, tzinfo=UTC))
    late, dated, now, past = await db.fetch(ROWS)
    assert (late["queue"], late["priority"], late["max_attempts"], late["state"]) == (
        "mail",
        -32768,
        32767,
        "scheduled",
    )
    assert abs((late["run_at"] - late["created_at"]).total_seconds() - 3600) < 60
    assert (dated["run_at"], dated["priority"], dated["max_attempts"]) == (at, 32767, 1)
    assert (now["state"], past["state"]) == ("ready", "ready")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": ""}, "queue '': expected 1 to 200 characters, none of them NUL"),
        ({"queue": "x" * 201}, "expected 1 to 200 characters"),
        ({"queue": "a\x00"}, "none of them NUL"),
        ({"queue": None}, "queue is None; expected its name, a str"),
        ({"order_key": 7}, 'order_key is 7; expected a key, a str such as "account:7"'),
        ({"queue": "default mail"}, "queue 'default mail': a name has no spaces, commas or colons; for several queues"),
        ({"queue": "mail:5"}, "queue 'mail:5': a name has no spaces, commas or colons"),
        ({"queue": "mail,sms"}, "queue 'mail,sms': a name has no"),
        ({"queue": "mail\n"}, "queue 'mail\\n': a name has no"),
        ({"delay": True}, "delay is True; expected seconds, 0 or more"),
        ({"delay": -1}, "delay is -1; expected seconds, 0 or more"),
        ({"delay": float("nan")}, "delay is nan"),
        ({"delay": float("inf")}, "delay is inf"),
        ({"delay": "60"}, "delay is '60'"),
        ({"delay": timedelta(-1)}, "delay is -86400.0; expected seconds, 0 or more, or a timedelta"),
        ({"delay": 5, "run_at": datetime.now(UTC)}, "delay= and run_at= are both given"),
        ({"run_at": datetime.now(UTC).replace(tzinfo=None)}, "; expected a datetime with a timezone, as datetime.now("),
        ({"run_at": "2030-01-01"}, "run_at is '2030-01-01'"),
        ({"priority": 32768}, "priority is 32768; expected -32768 to 32767"),
        ({"priority": 1.5}, "priority is 1.5"),
        ({"priority": None}, "priority is None"),
        ({"priority": True}, "priority is True; expected -32768 to 32767"),
        ({"priority": False}, "priority is False; expected -32768 to 32767"),
        ({"max_attempts": True}, "max_attempts is True; expected 1 to 32767"),
        ({"max_attempts": 0}, "max_attempts is 0; expected 1 to 32767"),
        ({"max_attempts": 32768}, "max_attempts is 32768"),
        ({"max_attempts": "3"}, "max_attempts is '3'"),
    ],
)  # fmt: skip
async def test_options_that_cannot_be(app: notifyq.App, db: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        await app.enqueue(Mail(to="a"), conn=db, **options)
    with pytest.raises(ConfigError, match=re.escape(message)):
        await app.enqueue_many([Mail(to="a")], conn=db, **options)
    assert await db.fetch(ROWS) == []


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Mail(to=5), "task MAIL doesn't validate against its own type: Expected `str`, got `int` - at `$.to`"),  # type: ignore[arg-type]
        (Mail(to="a", size=-1), "task MAIL doesn't validate against its own type: Expected `int` >= 0 - at `$.size`"),
        (Mail(to="a", extra=object()), "task MAIL can't be written as JSON: "),
        (Mail(to="a\x00b"), "task MAIL: PostgreSQL can't store this payload: "),
        (Mail(to="\ud800"), "task MAIL can't be written as JSON: "),
        (Mail(to="x" * 2**24), "task MAIL: its payload is 16,777,"),
        ({"to": "a"}, "enqueue got {'to': 'a'}; expected an instance of a subclass of notifyq.Task"),
        (Mail, "enqueue got <class 'tests.client.test_enqueue.Mail'>; expected an instance"),
        (None, "enqueue got None; expected an instance"),
    ],
)  # fmt: skip
async def test_tasks_that_cannot_be(app: notifyq.App, db: Any, task: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        await app.enqueue(task, conn=db)
    with pytest.raises(ConfigError, match=re.escape(message)):
        await app.enqueue_many([Other(), Mail(to="fine"), task] if "PostgreSQL" not in message else [task], conn=db)
    assert await db.fetch(ROWS) == []


async def test_a_class_that_is_not_the_handlers(app: notifyq.App, db: Any) -> None:
    @app.handler
    async def mail(task: Mail) -> None: ...

    class Letter(notifyq.Task, tag="MAIL"):
        to: str

    with pytest.raises(ConfigError, match=r"type 'MAIL' is Mail in this app, and not .*Letter"):
        await app.enqueue(Letter(to="a"), conn=db)
    await app.enqueue(Mail(to="a"), conn=db)


async def test_in_the_callers_transaction(app: notifyq.App, dsn: str, db: Any, connect: Sessions) -> None:
    """If it is rolled back, the task never existed. If it is committed, the task is there with what else the
    transaction did."""
    conn = await connect()
    for commit in (False, True):
        transaction = conn.transaction()
        await transaction.start()
        ref = await app.enqueue(Mail(to="a"), conn=conn)
        more = await app.enqueue_many([Mail(to="b"), Other()], conn=conn)
        assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 0
        await (transaction.commit() if commit else transaction.rollback())
    assert [row["id"] for row in await db.fetch(ROWS)] == [ref.id, *more]  # type: ignore[possibly-undefined]


async def test_the_callers_own_codecs_do_not_matter(app: notifyq.App, dsn: str, db: Any) -> None:
    """The caller's codecs may turn jsonb into anything, and text too."""
    conn = await asyncpg.connect(dsn)
    for type in ("jsonb", "json"):
        await conn.set_type_codec(type, schema="pg_catalog", encoder=lambda v: json.dumps([v]), decoder=json.loads)
    await app.enqueue(Mail(to='"\\\u00e4\U0001f600'), conn=conn)
    await app.enqueue_many([Mail(to="b")], conn=conn)
    await conn.close()
    assert [json.loads(row["payload"])["to"] for row in await db.fetch(ROWS)] == ['"\\\u00e4\U0001f600', "b"]


async def test_a_pool_and_its_connections(app: notifyq.App, dsn: str, db: Any) -> None:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        async with pool.acquire() as conn:
            await app.enqueue(Mail(to="a"), conn=conn)
        await app.enqueue(Mail(to="b"), conn=pool)
    assert len(await db.fetch(ROWS)) == 2


async def test_a_search_path_of_the_callers(app: notifyq.App, db: Any) -> None:
    await db.execute("SET search_path = nowhere")
    await app.enqueue(Mail(to="a"), conn=db, delay=1)
    await app.enqueue_many([Mail(to="a")], conn=db, delay=1)
    await db.execute("RESET search_path")
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 2


async def test_many_in_order_of_any_type(app: notifyq.App, dsn: str, db: Any) -> None:
    tasks = [Mail(to=str(n)) if n % 3 else Other() for n in range(1000)]
    async with app.connect(dsn):
        ids = await app.enqueue_many((task for task in tasks), queue="bulk", priority=2, max_attempts=3)
        assert await app.enqueue_many([]) == []
    rows = await db.fetch(ROWS)
    assert [row["id"] for row in rows] == ids
    assert [row["type"] for row in rows] == ["MAIL" if n % 3 else "Other" for n in range(1000)]
    assert [json.loads(row["payload"]).get("to") for row in rows] == [str(n) if n % 3 else None for n in range(1000)]
    assert {(row["queue"], row["priority"], row["max_attempts"]) for row in rows} == {("bulk", 2, 3)}


async def test_a_hundred_thousand_in_one_call(app: notifyq.App, dsn: str, db: Any) -> None:
    """The ids come in the order of the tasks."""
    async with app.connect(dsn):
        ids = await app.enqueue_many((Mail(to="a@b.c", size=n) for n in range(100_000)), queue="bulk", priority=3)
        assert await app.enqueue_many([]) == []
    assert len(set(ids)) == 100_000
    for n in (0, 1, 54_321, 99_999):
        row = await db.fetchrow("SELECT payload ->> 'size', queue, priority FROM notifyq.task WHERE id = $1", ids[n])
        assert tuple(row) == (str(n), "bulk", 3)
    assert await db.fetchval("SELECT count(DISTINCT payload) FROM notifyq.task") == 100_000


async def test_many_are_all_or_none(app: notifyq.App, dsn: str, db: Any) -> None:
    """An error half-way, in Python or in PostgreSQL, leaves no task behind."""

    def broken() -> Any:
        yield Mail(to="a")
        raise RuntimeError("no more")

    async with app.connect(dsn):
        with pytest.raises(RuntimeError, match="no more"):
            await app.enqueue_many(broken())
        with pytest.raises(ConfigError, match="task MAIL: PostgreSQL can't store"):
            await app.enqueue_many([Mail(to="a"), Mail(to="\x00")])
        with pytest.raises(ConfigError, match=r"task \(one of several\): PostgreSQL can't store"):
            await app.enqueue_many([Other(), Mail(to="\x00")])
        await app.enqueue(Other())
    assert [row["type"] for row in await db.fetch(ROWS)] == ["Other"]


async def test_without_a_connection(app: notifyq.App, dsn: str) -> None:
    message = r"not connected: enqueue inside `async with app\.connect\(\):`, or pass conn="
    with pytest.raises(ConfigError, match=message):
        await app.enqueue(Mail(to="a"))
    async with app.connect(dsn):
        with pytest.raises(ConfigError, match="this app is connected already; one"):
            async with app.connect(dsn):
                pass
        await app.enqueue(Mail(to="a"))
    with pytest.raises(ConfigError, match=message):
        await app.enqueue_many([Mail(to="a")])
    async with app.connect(dsn):
        await app.enqueue(Mail(to="a"))


async def test_without_a_schema(app: notifyq.App, empty_dsn: str) -> None:
    async with app.connect(empty_dsn):
        for _ in range(2):
            with pytest.raises(SchemaError, match="this database has no schema notifyq; install it: notifyq migrate"):
                await app.enqueue(Mail(to="a"))


async def test_without_a_server(app: notifyq.App, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatabaseError, match="is the server running there"):
        async with app.connect("postgresql://u:pw@127.0.0.1:1/db"):
            pass
    for name in ("NOTIFYQ_DSN", "PGHOST", "PGPORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://u:pw@127.0.0.1:1/db")
    with pytest.raises(DatabaseError, match="DATABASE_URL: postgresql://u:"):
        async with app.connect():
            pass


async def test_the_environment_decides(app: notifyq.App, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFYQ_DSN", dsn.replace("postgresql://", "postgres+asyncpg://"))
    async with app.connect():
        await app.enqueue(Mail(to="a"))
    assert len(await db.fetch(ROWS)) == 1
