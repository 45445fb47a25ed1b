"""What a Task class says of how its tasks are enqueued. What it can't say is refused where the class is written."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import notifyq
from notifyq import Task
from notifyq.testing import drain, run_inline

from ..helpers.running import working


class Mail(Task):
    queue = "mail"
    priority = 5
    to: str = ""


class Booking(Task):
    order_key = ("account",)
    account: int
    cents: int = 0


class Export(Task):
    limit_key = ("tenant", "kind")
    limit = 2
    rate = "100/minute"
    tenant: str
    kind: int = 1


class Alone(Task):
    limit = 1


class Shared(Task):
    limit_key = "smtp"
    order_key = "all"
    rate = "5/s"


class Once(Task):
    queue = "mail"
    priority = 3
    unique = ("n",)
    order_key = ("n",)
    n: int = 0


class Urgent(Mail):
    priority = 9


class Plain(Task):
    n: int = 0


@pytest.fixture
def app() -> notifyq.App:
    app = notifyq.App()

    @app.handler
    async def mail(task: Mail, ctx: notifyq.Context) -> list[Any]:
        return [ctx.queue, ctx.priority]

    @app.handler
    async def export(task: Export) -> None: ...

    @app.handler
    async def alone(task: Alone) -> None: ...

    return app


async def rows(db: Any) -> list[tuple[str, str, int, Any]]:
    """Type, queue, priority and options, in the order of their ids."""
    found = await db.fetch("SELECT type, queue, priority, options::text FROM notifyq.task ORDER BY id")
    return [(r[0], r[1], r[2], json.loads(r[3]) if r[3] else None) for r in found]


MAIL = ("Mail", "mail", 5, None)
BOOKING = ("Booking", "default", 0, {"order_key": "Booking:7"})
LIMITS = {"limit_running": 2, "limit_rate": 100, "limit_seconds": 60.0}
EXPORT = ("Export", "default", 0, {"limit_key": 'Export:["acme",1]', **LIMITS})
ALONE = ("Alone", "default", 0, {"limit_key": "Alone", "limit_running": 1})
SHARED = ("Shared", "default", 0, {"order_key": "all", "limit_key": "smtp", "limit_rate": 5, "limit_seconds": 1.0})
EVERY: list[tuple[Task, Any]] = [
    (Mail(), MAIL),
    (Plain(), ("Plain", "default", 0, None)),
    (Booking(account=7), BOOKING),
    (Export(tenant="acme"), EXPORT),
    (Alone(), ALONE),
    (Urgent(), ("Urgent", "mail", 9, None)),
    (Shared(), SHARED),
]


def stored(rows: list[tuple[str, str, int, Any]]) -> list[tuple[str, str, int, Any]]:
    """The options in the row, without those that weren't given."""
    return [
        (type, queue, priority, {k: v for k, v in options.items() if v is not None} if options else None)
        for type, queue, priority, options in rows
    ]


async def test_enqueue_goes_by_the_class(app: notifyq.App, dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        for task, _ in EVERY:
            await app.enqueue(task)
    assert stored(await rows(db)) == [row for _, row in EVERY]


@pytest.mark.parametrize("many", [1, 700])
async def test_enqueue_many_goes_by_each_class(app: notifyq.App, dsn: str, db: Any, many: int) -> None:
    """In one statement, or a transaction of several; the ids are in the order of the tasks."""
    tasks = [task for task, _ in EVERY] * many
    async with app.connect(dsn):
        ids = await app.enqueue_many(tasks)
    assert ids == sorted(ids)
    assert stored(await rows(db)) == [row for _, row in EVERY] * many


async def test_enqueue_many_of_unique_tasks_too(app: notifyq.App, dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        ids = await app.enqueue_many([Once(n=1), Mail(), Once(n=1), Plain()])
        assert ids[0] == ids[2]
        found = {row[0]: row[1:3] for row in await rows(db)}
        assert found == {"Once": ("mail", 3), "Mail": ("mail", 5), "Plain": ("default", 0)}
        by_id = dict(await db.fetch("SELECT id, type FROM notifyq.task"))
        assert [by_id[id] for id in ids] == ["Once", "Mail", "Once", "Plain"]
        once = await db.fetchval("SELECT options ->> 'order_key' FROM notifyq.task WHERE type = 'Once'")
        assert once == "Once:1"
        assert (await app.enqueue(Once(n=1))).existed


async def test_a_group_goes_by_each_class(app: notifyq.App, dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        ids, last = await app.enqueue_many([Mail(), Booking(account=7), Plain()], then=Alone())
    found = stored(await rows(db))
    assert found[:3] == [MAIL, BOOKING, ("Plain", "default", 0, None)]
    assert found[3] == (*ALONE[:3], {**ALONE[3], "after": ids})
    assert last.id > max(ids)


async def test_a_group_s_keys_and_limits_are_not_those_of_what_follows(app: notifyq.App, dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        ids, _ = await app.enqueue_many([Plain()], then=Plain(), queue="mail", order_key="o", limit_key="k", limit=1)
    first, then = stored(await rows(db))
    assert first == ("Plain", "mail", 0, {"order_key": "o", "limit_key": "k", "limit_running": 1})
    assert then == ("Plain", "mail", 0, {"after": ids})


async def test_what_enqueue_is_told_wins(app: notifyq.App, dsn: str, db: Any) -> None:
    told: dict[str, Any] = {"queue": "default", "priority": 0}
    async with app.connect(dsn):
        await app.enqueue(Mail(), **told)
        await app.enqueue_many([Mail(), Plain()], **told)
        await app.enqueue_many([Mail()], then=Mail(), **told)
        assert {row[1:3] for row in await rows(db)} == {("default", 0)}
        await db.execute("DELETE FROM notifyq.task")
        await app.enqueue(Booking(account=7), order_key="other")
        await app.enqueue(Export(tenant="acme"), limit=5)
        await app.enqueue(Export(tenant="acme"), rate="7/s")
        await app.enqueue(Export(tenant="acme"), limit_key="other")
        await app.enqueue(Export(tenant="acme"), limit_key="other", limit=1)
    options = [row[3] for row in stored(await rows(db))]
    assert options == [
        {"order_key": "other"},
        {**EXPORT[3], "limit_running": 5},
        {**EXPORT[3], "limit_rate": 7, "limit_seconds": 1.0},
        {**EXPORT[3], "limit_key": "other"},
        {"limit_key": "other", "limit_running": 1},
    ]


async def test_a_client_without_async(app: notifyq.App, dsn: str, db: Any) -> None:
    with notifyq.SyncClient(app).connect(dsn) as client:
        for task, _ in EVERY:
            client.enqueue(task)
        client.enqueue_many([task for task, _ in EVERY])
    assert stored(await rows(db)) == [row for _, row in EVERY] * 2


async def test_the_command_line_with_an_app(dsn: str, db: Any, tmp_path: Path) -> None:
    (tmp_path / "mails.py").write_text(
        "import notifyq\napp = notifyq.App()\n"
        "class Mail(notifyq.Task):\n    queue = 'mail'\n    priority = 5\n    limit_key = ('to',)\n    limit = 3\n"
        "    to: str\n"
        "@app.handler\nasync def mail(task: Mail) -> None: ...\n"
    )
    for more in ([], ["-q", "default", "--priority", "0", "--limit-key", "x", "--limit", "1"]):
        command = [
            sys.executable,
            "-m",
            "notifyq",
            "enqueue",
            "Mail",
            '{"to": "a"}',
            "--app",
            "mails:app",
            "--dsn",
            dsn,
        ]
        subprocess.run([*command, *more], cwd=tmp_path, check=True, capture_output=True)
    assert stored(await rows(db)) == [
        ("Mail", "mail", 5, {"limit_key": 'Mail:"a"', "limit_running": 3}),
        ("Mail", "default", 0, {"limit_key": "x", "limit_running": 1}),
    ]


async def test_crons(dsn: str, db: Any) -> None:
    app = notifyq.App()

    class Nightly(Task):
        queue = "mail"
        priority = 5
        order_key = "night"
        limit = 1

    @app.cron("0 3 1 1 *", name="by class")
    @app.cron("0 3 1 1 *", name="told", queue="default", priority=0)
    @app.handler
    async def nightly(task: Nightly) -> None: ...

    async with working(app, dsn):
        pass
    for name in ("by class", "told"):
        await db.execute("SELECT notifyq.cron_run($1)", name)
    options = {"order_key": "night", "limit_key": "Nightly", "limit_running": 1}
    assert stored(await rows(db)) == [("Nightly", "mail", 5, options), ("Nightly", "default", 0, options)]


async def test_crons_by_the_clock(dsn: str, db: Any) -> None:
    """The slots that a worker enqueues have these settings too."""
    app = notifyq.App()

    class Tick(Task):
        queue = "elsewhere"  # which no worker serves here
        limit = 1

    @app.cron("* * * * * *")
    @app.handler
    async def tick(task: Tick) -> None: ...

    async def first() -> Any:
        return await db.fetchrow("SELECT queue, options ->> 'limit_key' FROM notifyq.task LIMIT 1")

    from ..helpers.waiting import eventually

    async with working(app, dsn):
        await eventually(first, ("elsewhere", "Tick"))


async def test_tests_see_them(app: notifyq.App, dsn: str) -> None:
    assert (await run_inline(app, Mail())).result == ["mail", 5]
    assert (await run_inline(app, Mail(), queue="q", priority=1)).result == ["q", 1]
    async with app.connect(dsn):
        await app.enqueue(Mail())
        await app.enqueue_many([Export(tenant="a"), Alone()])
        assert (await drain(app)).done == 3


def test_a_key_of_long_values_fits_and_differs() -> None:
    from notifyq.rules import key_of

    keys = {key_of(Export(tenant="x" * n), ("tenant",)) for n in range(1000)}
    assert len(keys) == 1000
    assert max(map(len, keys)) <= 200
    assert key_of(Export(tenant="a", kind=1), ("tenant", "kind")) != key_of(Export(tenant="a,1"), ("tenant", "kind"))
    with pytest.raises(notifyq.ConfigError, match="no key can be made of its fields tenant"):
        key_of(Export(tenant=object()), ("tenant",))  # type: ignore[arg-type]


class Required(Task):
    """Fields of these names without a value can't be taken for settings."""

    queue: str
    limit: int


async def test_required_fields_of_these_names_are_fields(dsn: str, db: Any) -> None:
    app = notifyq.App()

    @app.handler
    async def required(task: Required) -> list[Any]:
        return [task.queue, task.limit]

    assert (await run_inline(app, Required(queue="a", limit=3))).result == ["a", 3]
    async with app.connect(dsn):
        await app.enqueue(Required(queue="a", limit=3))
    assert await rows(db) == [("Required", "default", 0, None)]


async def test_a_timedelta_wherever_seconds_are(dsn: str, db: Any) -> None:
    class Timed(Task):
        timeout = timedelta(seconds=0.05)
        backoff = timedelta(seconds=8)
        unique = True
        unique_for = timedelta(hours=1)

    app = notifyq.App()

    @app.handler
    async def timed(task: Timed) -> None:
        import anyio

        await anyio.sleep_forever()

    @app.handler
    async def plain(task: Plain) -> None:
        raise notifyq.Retry(timedelta(minutes=2))

    ran = await run_inline(app, Timed())
    assert ran.reason == "timed out after 0.05 s"
    assert ran.delay is not None
    assert 0 <= ran.delay <= 8
    assert (await run_inline(app, Plain())).delay == 120
    async with app.connect(dsn):
        await app.enqueue(Timed(), delay=timedelta(minutes=5))
        await app.enqueue(Plain(), delay=timedelta(minutes=5), unique="k", unique_for=timedelta(minutes=3))
        await app.enqueue_many([Plain()], delay=timedelta(minutes=5))
    with notifyq.SyncClient(app).connect(dsn) as client:
        client.enqueue(Plain(), delay=timedelta(minutes=5))
    waits = await db.fetch(
        "SELECT round(extract(epoch FROM run_at - created_at))::int, options ->> 'unique_for' "
        "FROM notifyq.task ORDER BY id"
    )
    assert [tuple(row) for row in waits] == [(300, "3600.0"), (300, "180.0"), (300, None), (300, None)]
    for wrong in ({"delay": timedelta(-1)}, {"unique": "k", "unique_for": timedelta(0)}):
        async with app.connect(dsn):
            with pytest.raises(notifyq.ConfigError, match="a timedelta"):
                await app.enqueue(Plain(), **wrong)
    with pytest.raises(ValueError, match="or a timedelta"):
        notifyq.Retry(timedelta(-1))
