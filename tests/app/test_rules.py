"""What a Task class says of how its tasks are enqueued; and what it can't say, refused where it is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import msgspec
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
    """Without what wasn't said."""
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
    """The slots that a worker enqueues have them too."""
    app = notifyq.App()

    class Tick(Task):
        queue = "elsewhere"  # which nobody serves here
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


# What a class body may not say, and words of the message.

WRONG_ATTRIBUTES: dict[str, str] = {
    "max_retries = 3": "did you mean 'max_attempts'",
    "retries = 3": "did you mean 'max_attempts'",
    "max_attempt = 3": "did you mean 'max_attempts'",
    "time_limit = 3": "did you mean 'timeout'",
    "time_out = 3.0": "did you mean 'timeout'",
    "retry_backoff = True": "did you mean 'backoff'",
    "rate_limit = '10/m'": "did you mean 'rate'",
    "queue_name = 'mail'": "did you mean 'queue'",
    "quue = 'mail'": "did you mean 'queue'",
    "priorty = 5": "did you mean 'priority'",
    "delay = 3": r"app\.enqueue\(task, delay=\.\.\.\)",
    "countdown = 3": r"app\.enqueue\(task, delay=\.\.\.\)",
    "eta = 3": r"app\.enqueue\(task, run_at=\.\.\.\)",
    "expires = 60": "notifyq has no such setting",
    "ttl = 60": "notifyq has no such setting",
    "max_retry = 3": "did you mean 'max_attempts'",
    "timeout_seconds = 3": "did you mean 'timeout'",
    "autoretry_for = (ValueError,)": r"the handler catches it and returns notifyq\.Dead",
    "dont_retry_on = [ValueError]": r"the handler catches it and returns notifyq\.Dead",
    "discard_on = KeyError": r"the handler catches it and returns notifyq\.Dead",
}
WRONG_FIELDS: dict[str, str] = {
    "queue: str = 'mail'": "'queue' is a setting of the class, not a field",
    "priority: int = 5": "'priority' is a setting of the class, not a field",
    "timeout: float = 30.0": "'timeout' is a setting of the class, not a field",
    "max_retries: int = 3": "did you mean 'max_attempts'",
    "rate_limit: str = '5/s'": "did you mean 'rate'",
    "max_atempts: int = 3": "did you mean 'max_attempts'",
    "delay: float = 3.0": r"app\.enqueue\(task, delay=\.\.\.\)",
    "expires: int = 60": "notifyq has no such setting",
    "limit: int = 100": "name='limit'",
}


def define(body: str, bases: str = "notifyq.Task", **names: Any) -> Any:
    lines = "\n    ".join(body.split("\n"))
    space: dict[str, Any] = {"notifyq": notifyq, "ClassVar": ClassVar, "msgspec": msgspec, "Any": Any, **names}
    text = f"class Wrong({bases}):\n    {lines}"
    exec(compile(text, "wrong.py", "exec", dont_inherit=True), {"__name__": "somewhere"} | space, space)
    return space["Wrong"]


@pytest.mark.parametrize("line", WRONG_ATTRIBUTES)
async def test_attributes_that_mean_nothing_are_refused(dsn: str, line: str) -> None:
    name, _, value = line.partition(" = ")
    wrong = [define(body) for body in (line, f"x: int = 1\n{line}", f"{name}: ClassVar[Any] = {value}")]
    wrong.append(define("x: int = 1", "Mixin, notifyq.Task", Mixin=type("Mixin", (), {name: eval(value)})))
    wrong.append(define("x: int = 1", "Wrong", Wrong=wrong[0]))
    wrong.append(msgspec.defstruct("Wrong", [("x", int, 1)], bases=(wrong[0],)))
    app = notifyq.App()
    async with app.connect(dsn):
        for cls in wrong:
            with pytest.raises(notifyq.ConfigError, match=WRONG_ATTRIBUTES[line]) as caught:
                app.handler(handler_of(cls))
            assert str(caught.value).startswith("task Wrong: ")
            assert f"name it _{name}" in str(caught.value)
            for enqueue in (app.enqueue(cls()), app.enqueue_many([cls()]), app.enqueue_many([], then=cls())):
                with pytest.raises(notifyq.ConfigError, match=WRONG_ATTRIBUTES[line]):
                    await enqueue


@pytest.mark.parametrize("line", WRONG_FIELDS)
def test_so_are_fields_that_look_like_settings(line: str) -> None:
    """Before another field too, where msgspec has something else to say."""
    for body in (line, f"{line}\nx: int", f"x: int\n{line}", f"x: int = 1\n{line}"):
        with pytest.raises(notifyq.ConfigError, match=WRONG_FIELDS[line]):
            notifyq.App().handler(handler_of(define(body)))
    for cls in (
        define(f"{line}\nx: int", "notifyq.Task, kw_only=True"),
        define("x: int = 1", "Common, notifyq.Task", Common=struct(line)),
        define("y: int = 1", "Base", Base=define(f"x: int\n{line}")),
    ):
        with pytest.raises(notifyq.ConfigError, match=WRONG_FIELDS[line]):
            notifyq.App().handler(handler_of(cls))


def struct(line: str) -> Any:
    space: dict[str, Any] = {"msgspec": msgspec}
    exec(compile(f"class Common(msgspec.Struct):\n    {line}", "common.py", "exec", dont_inherit=True), space, space)
    return space["Common"]


@pytest.mark.parametrize(
    "body",
    [
        "x: int = 1\ny: str = ''",
        "expires: Any = None",
        "limit_: int = msgspec.field(default=100, name='limit')",
        "limits: list = []",
        "rates: dict = {}",
        "rated: float = 1.0",
        "_max_retries = 3",
        "URL = 'https://example.com'\ntemplate = 'a.html'",
        "def delay(self): ...",
        "retries: int",
        "queue: str = ''\npriority: int = 0\nexpires: bool = False",
        "ttl: int",
        "max_attempts = 3\nbackoff = 0.5\ntimeout = 3\nqueue = 'a'\nx: int",
        "max_attempts: ClassVar[int] = 3\nqueue: ClassVar[str] = 'q'",
    ],
)
def test_what_a_class_may_have(body: str) -> None:
    notifyq.App().handler(handler_of(define(body)))


def handler_of(cls: Any) -> Callable[..., Any]:
    def handler(task: Any) -> None: ...

    handler.__annotations__["task"] = cls
    return handler


def test_msgspec_s_own_errors_stay() -> None:
    with pytest.raises(TypeError, match="Required field 'y' cannot follow optional fields"):
        define("x: int = 1\ny: int")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("queue = 5", "task Wrong: queue is 5"),
        ("queue = ''", "task Wrong: queue ''"),
        ("priority = 'high'", "task Wrong: priority is 'high'"),
        ("priority = 40000", "task Wrong: priority is 40000"),
        ("priority = True", "task Wrong: priority is True"),
        ("priority = False", "task Wrong: priority is False"),
        ("limit = True", "task Wrong: limit is True"),
        ("queue = 'default mail'", "task Wrong: queue 'default mail': a name has no spaces, commas or colons"),
        ("queue = 'mail:5'", "task Wrong: queue 'mail:5': a name has no"),
        ("order_key = 5", "task Wrong: order_key is 5"),
        ("order_key = 'x'\nx: int", "which is a field"),
        ("order_key = ('y',)\nx: int", "order_key has 'y' in it, which is no field; its fields: x"),
        ("limit_key = ()", "limit_key is ()"),
        ("limit = 0", "task Wrong: limit is 0"),
        ("limit = '3'", "task Wrong: limit is '3'"),
        ("rate = 5", "task Wrong: rate is 5"),
        ("rate = 'often'", "task Wrong: rate is 'often'"),
        ("@property\ndef queue(self): return 'x'", "task Wrong: queue is <property"),
    ],
)
async def test_rules_that_cannot_be(dsn: str, body: str, words: str) -> None:
    """Where a handler is registered; without one, where a task is enqueued."""
    import re

    cls = define(body)
    with pytest.raises(notifyq.ConfigError, match=re.escape(words)):
        notifyq.App().handler(handler_of(cls))
    app = notifyq.App()
    async with app.connect(dsn):
        task = cls(**dict.fromkeys(cls.__struct_fields__, 1))
        for enqueue in (app.enqueue(task), app.enqueue_many([task]), app.enqueue_many([], then=task)):
            with pytest.raises(notifyq.ConfigError, match=re.escape(words)):
                await enqueue


async def test_a_key_without_a_limit_says_so(dsn: str) -> None:
    class Keyed(Task):
        limit_key = ("n",)
        n: int = 0

    app = notifyq.App()
    async with app.connect(dsn):
        with pytest.raises(notifyq.ConfigError, match="limit_key is 'Keyed:0', and no limit"):
            await app.enqueue(Keyed())
        await app.enqueue(Keyed(), limit=3)
        for wrong in ({"limit": 3}, {"limit_key": "k"}):
            with pytest.raises(notifyq.ConfigError, match="limit_key"):
                await app.enqueue(Plain(), **wrong)
            with pytest.raises(notifyq.ConfigError, match="limit_key"):
                await app.enqueue_many([Plain()], **wrong)


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
