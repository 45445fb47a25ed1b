"""Django: its connection, and the backend for its Tasks, in a project (tests/django/site) with real ones."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec
import pytest

import notifyq
from notifyq.config import default_threads
from notifyq.database import connection
from notifyq.embedded import Server
from notifyq.errors import ConfigError

from ..helpers.databases import database
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import eventually

T = TypeVar("T")

ROOT = Path(__file__).parents[2]


class Mail(notifyq.Task, tag="MAIL"):
    to: str


@pytest.fixture(scope="module")
async def shared(server: Server, template: str) -> AsyncIterator[str]:
    """The database of Django's settings, which are read once."""
    async with database(server, template) as dsn:
        yield dsn


@pytest.fixture
async def dsn(shared: str) -> str:
    conn = await connection.connect(shared, role="test")
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished, notifyq.worker RESTART IDENTITY")
    await conn.close()
    return shared


@pytest.fixture(scope="module")
def site(shared: str) -> Iterator[Any]:
    """The project's tasks. Its settings are of this database, and of this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTIFYQ_DSN", shared)
        patch.setenv("DJANGO_SETTINGS_MODULE", "tests.django.site.settings")
        importlib.import_module("notifyq.django.worker")
    return importlib.import_module("tests.django.site.tasks")


@pytest.fixture
def app(site: Any) -> notifyq.App:
    app: notifyq.App = importlib.import_module("notifyq.django.worker").app
    return app


async def apart(function: Callable[[], T]) -> T:
    """Run it in a thread, as Django's connection wants it, and close the thread's connections."""
    from django.db import connections

    def run() -> T:
        try:
            return function()
        finally:
            connections.close_all()

    return await anyio.to_thread.run_sync(run)


def rolled_back(function: Callable[[], T]) -> T:
    from django.db import transaction

    with transaction.atomic():
        value = function()
        transaction.set_rollback(True)
    return value


async def finished(db: Any, *ids: str) -> None:
    query = "SELECT count(*) FROM notifyq.finished WHERE id = ANY($1)"
    await eventually(lambda: db.fetchval(query, [int(id) for id in ids]), len(ids))


async def test_djangos_connection(site: Any, dsn: str, db: Any) -> None:
    """A task is committed and rolled back with its transaction; the same holds when values are sent beside the
    statement."""
    from django.db import connection, connections, transaction

    client = notifyq.SyncClient(notifyq.App())

    def use() -> list[int]:
        with transaction.atomic():
            ids = [client.enqueue(Mail(to="a%s"), conn=connection, delay=60, priority=3, queue="q%").id]
            ids += client.enqueue_many([Mail(to="b"), Mail(to="c")], conn=connections["default"])
        rolled_back(lambda: client.enqueue(Mail(to="never"), conn=connection))
        ids.append(client.enqueue(Mail(to="d"), conn=connections["beside"], delay=1.5, max_attempts=2).id)
        ids += client.enqueue_many([Mail(to="e")], conn=connections["beside"])
        with pytest.raises(ConfigError, match="task MAIL: PostgreSQL can't store this payload: "):
            client.enqueue(Mail(to="\x00"), conn=connection)
        with pytest.raises(ConfigError, match=r"conn is Django's for sqlite; expected"):
            client.enqueue(Mail(to="x"), conn=connections["lite"])
        return ids

    ids = await apart(use)
    rows = await db.fetch("SELECT * FROM notifyq.task ORDER BY id")
    assert [row["id"] for row in rows] == ids
    assert [json.loads(row["payload"])["to"] for row in rows] == ["a%s", "b", "c", "d", "e"]
    assert (rows[0]["queue"], rows[0]["priority"], rows[3]["max_attempts"]) == ("q%", 3, 2)


async def test_djangos_connection_where_one_is_awaited(site: Any) -> None:
    from django.db import connection

    with pytest.raises(ConfigError, match=r"conn is a django\..*, which would block the event loop; .*SyncClient"):
        await notifyq.App().enqueue(Mail(to="a"), conn=connection)


async def test_a_task_from_enqueue_to_result(site: Any, app: notifyq.App, dsn: str, db: Any) -> None:
    """Sent in a transaction, run in a worker, read from where it was sent."""
    gone = await apart(lambda: rolled_back(lambda: site.add.enqueue(0)))
    sent = await apart(lambda: site.told.using(priority=9).enqueue("a", 2, named={"c": (3,)}))
    plain = await apart(lambda: site.add.enqueue(20, b=22))
    twice = await site.doubled.aenqueue(21)
    assert (sent.status, sent.attempts, sent.is_finished, sent.args) == ("READY", 0, False, ["a", 2])
    row = await db.fetchrow("SELECT * FROM notifyq.task WHERE id = $1", int(sent.id))
    assert (row["type"], row["queue"], row["priority"]) == ("tests.django.site.tasks.told", "mail", 9)
    assert json.loads(row["payload"]) == {"args": ["a", 2], "kwargs": {"named": {"c": [3]}}}
    async with working(app, dsn, queues=["default", "mail"]):
        await finished(db, sent.id, plain.id, twice.id)
        # What a task's thread connects is closed after it; nothing else is done in a thread until then.
        alone = await apart(lambda: site.told.enqueue("", 0, {}))
        await finished(db, alone.id)
        backend = "SELECT (result ->> 'backend')::integer FROM notifyq.finished WHERE id = $1"
        query = f"SELECT count(*) FROM pg_stat_activity WHERE pid = ({backend})"
        await eventually(lambda: db.fetchval(query, int(alone.id)), 0)

    await apart(sent.refresh)
    assert (sent.status, sent.attempts, sent.is_finished) == ("SUCCESSFUL", 1, True)
    value = sent.return_value
    assert value.pop("backend")
    assert value == {
        "attempt": 1, "id": sent.id, "args": ["a", 2], "kwargs": {"named": {"c": [3]}}, "queue": "mail", "priority": 9,
        "pid": os.getpid(),
    }  # fmt: skip
    assert sent.enqueued_at <= sent.started_at <= sent.finished_at
    assert (await apart(lambda: site.add.get_result(plain.id))).return_value == 42
    assert (await site.doubled.aget_result(twice.id)).return_value == 42
    with pytest.raises(Exception, match=f"{gone.id} isn't in notifyq.all_tasks"):
        await apart(lambda: site.add.get_result(gone.id))
    with pytest.raises(Exception, match="Task does not match"):
        await apart(lambda: site.doubled.get_result(plain.id))
    await close_shared()


async def close_shared() -> None:
    """Close the connections of the thread that Django's own async methods share."""
    from asgiref.sync import sync_to_async
    from django.db import connections

    await sync_to_async(connections.close_all)()


async def test_tasks_that_fail(site: Any, app: notifyq.App, dsn: str, db: Any) -> None:
    """They are tried again until the attempts are used up; the end is told once, and each error is kept."""
    from notifyq.django.framework import task_finished, task_started

    told: list[tuple[str, str]] = []

    def starts(sender: object, task_result: Any, **_: object) -> None:
        told.append((task_result.task.name, "started"))

    def ends(sender: object, task_result: Any, **_: object) -> None:
        told.append((task_result.task.name, task_result.status))

    task_started.connect(starts)
    task_finished.connect(ends)
    try:
        refused = await apart(lambda: site.flaky.enqueue("now"))
        await db.execute("UPDATE notifyq.task SET max_attempts = 2")
        given_up = await apart(site.given_up.enqueue)
        once = await apart(site.once.enqueue)
        async with working(app, dsn):
            await finished(db, once.id, given_up.id)
            await db.execute("UPDATE notifyq.task SET run_at = now(), promoted = true WHERE worker IS NULL")
            await finished(db, refused.id)
    finally:
        task_started.disconnect(starts)
        task_finished.disconnect(ends)
    by_name = {name: [what for of, what in told if of == name] for name in ("flaky", "given_up", "once")}
    assert by_name == {
        "flaky": ["started", "started", "FAILED"], "given_up": ["started", "FAILED"], "once": ["started", "FAILED"]
    }  # fmt: skip

    def look() -> None:
        for result in (refused, given_up, once):
            result.refresh()
            with pytest.raises(ValueError, match="Task failed"):
                result.return_value  # noqa: B018 - a property that raises

    await apart(look)
    assert (refused.attempts, given_up.attempts, once.attempts) == (2, 1, 1)
    assert [error.exception_class for error in refused.errors] == [site.Refused] * 2
    assert "tests.django.site.tasks.Refused: not now" in refused.errors[1].traceback
    assert [error.exception_class for error in once.errors] == [ValueError]
    assert [(error.exception_class, error.traceback) for error in given_up.errors] == [(notifyq.NotifyqError, "no use")]


async def test_nothing_of_a_row_is_imported(site: Any, app: notifyq.App, dsn: str, db: Any) -> None:
    """Neither the task nor the exception that a row names is imported: any role that may insert can write them."""
    assert "antigravity" not in sys.modules
    strange, known = await db.fetch(
        "INSERT INTO notifyq.task (type, payload) VALUES ('antigravity.fly', '{\"args\": []}'), ($1, $2) RETURNING id",
        "tests.django.site.tasks.once", b'{"args": [], "kwargs": {}}',
    )  # fmt: skip
    trace = b'[{"attempt": 1, "error": "Geohash: x", "traceback": "Traceback:\\nantigravity.Geohash: x"}]'
    await db.execute("UPDATE notifyq.task SET errors = $1, max_attempts = 1", trace)
    async with working(app, dsn):
        await finished(db, str(known[0]))
    assert await db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", strange[0]) == "ready"
    with pytest.raises(Exception, match=f"{strange[0]} is of type antigravity.fly, which is no task here"):
        await apart(lambda: site.once.get_result(str(strange[0])))
    error = (await apart(lambda: site.once.get_result(str(known[0])))).errors[0]
    assert error.exception_class_path == "antigravity.Geohash"
    with pytest.raises(ValueError, match=r"'antigravity\.Geohash' is no exception that this process has imported"):
        error.exception_class  # noqa: B018 - a property that raises
    assert "antigravity" not in sys.modules


async def test_the_settings_of_a_backend(site: Any, app: notifyq.App, dsn: str) -> None:
    """They hold for all tasks that are declared for it, as those of a task class; other backends have their own."""
    once, add = (app.registry.get(f"tests.django.site.tasks.{name}") for name in ("once", "_add"))
    assert once
    assert add
    assert (once.max_attempts, once.backoff, once.timeout) == (1, 0.5, 60)
    assert (add.max_attempts, add.backoff, add.timeout) == (10, 2.0, None)


HOLD = "SELECT pg_advisory_lock_shared(5711), pg_advisory_unlock_shared(5711)"
CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'from Django' AND wait_event_type = 'Lock'"""


async def test_as_many_connections_as_threads(site: Any, app: notifyq.App, dsn: str, db: Any) -> None:
    """The number of tasks doesn't matter: by default they are few enough for a small server, and none is left when all
    is done."""
    most = default_threads()
    await db.execute("SELECT pg_advisory_lock(5711)")
    sent = await apart(lambda: [site.waits.enqueue(HOLD) for _ in range(3 * most)])
    async with working(app, dsn, queues=["default"]):
        await eventually(lambda: db.fetchval(CONNECTIONS), most)
        running = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"
        await eventually(lambda: db.fetchval(running), most)
        await db.execute("SELECT pg_advisory_unlock(5711)")
        await finished(db, *(result.id for result in sent))
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'from Django'"
        await eventually(lambda: db.fetchval(query), 0)


async def test_a_worker_of_the_command_line(site: Any, dsn: str, db: Any) -> None:
    """It needs nothing but the settings to find the project's tasks."""
    sent = await apart(lambda: site.add.enqueue(1, 2))
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.django.site.settings", "NOTIFYQ_DSN": dsn}
    command = [sys.executable, "-m", "notifyq", "worker", "notifyq.django.worker:app", "--drain"]
    with anyio.fail_after(limit()):
        found = await anyio.run_process(command, env=environment, cwd=ROOT, check=False, stderr=subprocess.STDOUT)
    assert found.returncode == 0, found.stdout.decode()
    assert (await apart(lambda: site.add.get_result(sent.id))).return_value == 3


async def test_what_cannot_be_declared_or_sent(site: Any, dsn: str) -> None:
    from django.core.exceptions import ImproperlyConfigured

    from notifyq.django import TaskBackend
    from notifyq.django.declared import Declared, declare
    from notifyq.django.framework import InvalidTask

    with pytest.raises(InvalidTask, match="Queue 'nowhere' is not valid for backend"):
        site.add.using(queue_name="nowhere")
    with pytest.raises(TypeError):
        site.add.enqueue(object())
    with pytest.raises(
        ImproperlyConfigured,
        match=r"TASKS\['x'\] has the OPTIONS queue; notifyq knows database, max_attempts, backoff, timeout",
    ):
        TaskBackend("x", {"OPTIONS": {"queue": "a"}})
    with pytest.raises(ImproperlyConfigured, match=r"TASKS\['x'\]: task .*OPTIONS: timeout is -1; expected seconds"):
        TaskBackend("x", {"OPTIONS": {"timeout": -1}})
    (wrong,) = TaskBackend("x", {"OPTIONS": {"database": "lite"}}).check()
    assert wrong.msg == "TASKS['x'] is notifyq's, and its database 'lite' is sqlite."
    declared: Declared = declare(site.add.using(priority=5))
    assert declared.task is site.add
    assert msgspec.json.decode(b"{}", type=declared.call) == declared.call()


async def test_it_works_on_the_database_that_its_options_name(site: Any, dsn: str) -> None:
    """The task is in that database's open transaction: a result is found there, and a rollback takes it along."""
    from django.db import transaction

    from notifyq.django.framework import TaskResultDoesNotExist

    def use() -> None:
        with transaction.atomic(using="beside"):
            result = site.add.using(backend="once").enqueue(1)
            result.refresh()
            transaction.set_rollback(True, using="beside")
        with pytest.raises(TaskResultDoesNotExist):
            result.refresh()

    await apart(use)


def test_a_project_without_tasks(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = importlib.import_module("notifyq.django.handlers")
    monkeypatch.setattr(handlers, "BY_TYPE", {})
    with pytest.raises(ConfigError, match="no Django task is declared for notifyq; expected an @task"):
        handlers.add_tasks(notifyq.App())


# --- docs/connections.md


def blocks() -> list[str]:
    text = (ROOT / "docs" / "connections.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


async def test_the_examples_of_the_page(site: Any, dsn: str, db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is run as it stands: those that await on the event loop, the others in a thread, and so are their tasks."""
    await db.execute("CREATE TABLE person (email text)")
    space: dict[str, Any] = {"__name__": "example", "dsn": dsn}
    for number, block in enumerate(blocks()):
        code = compile(block, f"block {number}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        run = types.FunctionType(code, space)
        await (run() if inspect.iscoroutinefunction(run) else apart(run))
    assert space["TASKS"]["default"]["BACKEND"] == space["greet"].get_backend().__class__.__module__.rpartition(".")[
        0
    ] + (".TaskBackend")
    people = [f"{letter}@b.c" for letter in "abcdefgh"]
    rows = await db.fetch("SELECT coalesce(payload ->> 'to', payload -> 'args' ->> 0) FROM notifyq.task ORDER BY id")
    assert [row[0] for row in rows] == people
    assert [row[0] for row in await db.fetch("SELECT email FROM person ORDER BY 1")] == [
        person for person in people if person[0] in "abcdg"
    ]
    importlib.import_module("notifyq.django").add_tasks(space["app"])
    async with working(space["app"], dsn, queues=["default", "mail"]):
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'"), 8)
    assert sorted(re.findall(r"^to (\S+)$", capsys.readouterr().out, re.MULTILINE)) == people[:7]
