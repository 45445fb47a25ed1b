"""Ids that are given a second time, since a person has set the sequence back. The log names the cure, no outcome is
lost, no task runs twice because of it, and a caller that waits gets the end of the new task."""

from __future__ import annotations

import json
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection

from ..helpers import verbs
from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

app = notifyq.App()
ran = Seen()


class Say(notifyq.Task):
    text: str
    how: str = "return"
    max_attempts = 1


class Once(notifyq.Task):
    unique = ("key",)
    key: str


@app.handler
async def say(task: Say, ctx: notifyq.Context) -> str:
    ran.add(task.text)
    if task.how == "raise":
        raise ValueError(task.text)
    if task.how == "transaction":
        async with ctx.transaction():
            pass
    if task.how == "wait":
        await anyio.sleep(3600)
    return task.text


@app.handler
async def once(task: Once) -> None:
    ran.add(task.key)


@pytest.fixture(autouse=True)
def fresh() -> None:
    ran.items.clear()


async def truncate(db: Any) -> None:
    await db.execute("TRUNCATE notifyq.task RESTART IDENTITY")


async def history(db: Any) -> list[tuple[Any, ...]]:
    rows = await db.fetch(
        "SELECT id, state, payload ->> 'text', result #>> '{}', error FROM notifyq.all_tasks ORDER BY id"
    )
    return [tuple(row) for row in rows]


@pytest.mark.usefixtures("quick_heart")
async def test_the_outcomes_of_new_tasks_take_the_place(db: Any, dsn: str, logged: Logged) -> None:
    """Each runs once, each caller that waits gets its own result, and the log and the status name the cure."""
    async with app.connect(dsn), working(app, dsn):
        for n in (1, 2, 3):
            assert await (await app.enqueue(Say(text=f"old {n}"))).result(timeout=limit()) == f"old {n}"
        await truncate(db)
        assert await (await app.enqueue(Say(text="new 1"))).result(timeout=limit()) == "new 1"
        status = "ids are given a second time; run: SELECT setval('notifyq.task_id_seq', 3)"
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), status)
        failing = await app.enqueue(Say(text="new 2", how="raise"))
        with pytest.raises(notifyq.TaskDead, match="ValueError: new 2"):
            await failing.result(timeout=limit())
        # In a transaction of its own it has no result: the old task's must not be taken for it.
        assert await (await app.enqueue(Say(text="new 3", how="transaction"))).result(timeout=limit()) is None
        assert await (await app.enqueue(Say(text="new 4"))).result(timeout=limit()) == "new 4"
    assert ran.items == [*(f"old {n}" for n in (1, 2, 3)), *(f"new {n}" for n in (1, 2, 3, 4))]
    assert await history(db) == [
        (1, "done", "new 1", "new 1", None),
        (2, "dead", "new 2", None, "ValueError: new 2"),
        (3, "done", "new 3", None, None),
        (4, "done", "new 4", "new 4", None),
    ]
    assert [id for line in logged("deleted from the history") for id in line["ids"]] == [1, 2]


async def test_a_batch_in_which_some_ids_are_old(db: Any, dsn: str) -> None:
    """No caller waits for these, so they are settled by the hundred."""
    async with app.connect(dsn):
        await app.enqueue_many([Say(text=f"old {n}") for n in range(50)])
        await app.run_worker(dsn=dsn, drain=True)
        await truncate(db)
        await app.enqueue_many([Say(text=f"new {n}") for n in range(80)])
        await app.run_worker(dsn=dsn, drain=True)
    assert [row[1:4] for row in await history(db)] == [("done", f"new {n}", f"new {n}") for n in range(80)]
    assert sorted(ran.items) == sorted([*(f"old {n}" for n in range(50)), *(f"new {n}" for n in range(80))])


@pytest.mark.usefixtures("quick_heart")
async def test_it_is_found_at_a_start_and_when_it_is_cured(db: Any, dsn: str, logged: Logged) -> None:
    """The statement in the message is a cure; nothing is logged where all is well."""
    async with app.connect(dsn):
        async with working(app, dsn):
            for n in range(3):
                await (await app.enqueue(Say(text=f"old {n}"))).result(timeout=limit())
        assert not logged("the sequence is behind")
        await truncate(db)
        cure = "SELECT setval('notifyq.task_id_seq', 3)"
        async with working(app, dsn):
            status = "SELECT status FROM notifyq.worker"
            await eventually(lambda: db.fetchval(status), f"ids are given a second time; run: {cure}")
            (line,) = logged("the sequence is behind")
            assert (line["last"], line["highest"], line["cure"]) == (1, 3, cure)
            await db.execute(line["cure"])
            assert (await app.enqueue(Say(text="new"))).id == 4
        async with working(app, dsn):
            await eventually(lambda: db.fetchval(status), "ok")
    assert len(logged("the sequence is behind")) == 1


@pytest.mark.usefixtures("quick_heart")
async def test_ids_of_tasks_that_wait_are_seen_at_a_start_too(db: Any, dsn: str) -> None:
    await db.execute(
        "INSERT INTO notifyq.task (type, run_at) SELECT 'Say', now() + interval '1 day' FROM generate_series(1, 3)"
    )
    await db.execute("SELECT setval('notifyq.task_id_seq', 1)")
    async with working(app, dsn):
        status = "ids are given a second time; run: SELECT setval('notifyq.task_id_seq', 3)"
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), status)


async def test_a_rescue_a_cancel_and_a_retry(db: Any, dsn: str) -> None:
    """Each of the tasks has the id of an older task in the history."""
    for n in range(4):
        await db.execute(
            """INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, state, queue,
                                             type, payload)
               VALUES ($1, now(), now(), now(), 0, 1, 'dead', 'default', 'Say', '{"text": "old"}')""",
            n + 1,
        )
    await db.execute("""INSERT INTO notifyq.task (type, payload, max_attempts)
                        SELECT 'Say', '{"text": "new"}', 1 FROM generate_series(1, 4)""")
    worker: Any = await connection.connect_worker(dsn, "test")
    jobs = await verbs.claim(worker, await verbs.register(worker), 1)
    await verbs.silent(db, jobs[0].worker)
    assert (await verbs.rescue(worker, jobs[0].worker))[1:] == (0, 1)
    assert await db.fetchval("SELECT notifyq.cancel(2)")
    assert not await db.fetchval("SELECT notifyq.retry(3)"), "the one that lives is ready already"
    rows = await db.fetch("SELECT id, state, payload ->> 'text' AS text FROM notifyq.all_tasks ORDER BY id, state")
    assert [tuple(row) for row in rows] == [
        (1, "dead", "new"),
        (2, "cancelled", "new"),
        (3, "dead", "old"),
        (3, "ready", "new"),
        (4, "dead", "old"),
        (4, "ready", "new"),
    ]
    worker.terminate()


async def test_what_waits_for_another_goes_by_the_one_that_lives(db: Any, dsn: str) -> None:
    """An older task with its predecessor's id is dead: that cancels nothing."""
    async with app.connect(dsn):
        old = await app.enqueue(Say(text="old", how="raise"))
        await app.run_worker(dsn=dsn, drain=True)
        await truncate(db)
        first = await app.enqueue(Say(text="first"))
        assert first.id == old.id
        second = await app.enqueue(Say(text="second"), after=[first])
        await app.run_worker(dsn=dsn, drain=True)
        assert await second.result(timeout=limit()) == "second"
    assert ran.items == ["old", "first", "second"]


async def test_unique_keys_of_ids_that_are_given_again(db: Any, dsn: str) -> None:
    """The task that holds a key is looked up by its id. Neither two tasks with that id nor one with another key hinders
    an enqueue."""
    async with app.connect(dsn):
        await app.enqueue(Say(text="old"))
        await app.enqueue(Once(key="a"))
        await app.run_worker(dsn=dsn, drain=True)
        await app.enqueue(Once(key="b"))
        await truncate(db)
        await app.run_worker(dsn=dsn, drain=True)  # a worker that starts forgets the key of what is no more
        assert await db.fetchval("SELECT count(*) FROM notifyq.unique_key WHERE task = 3") == 0
        other = await app.enqueue(Say(text="other"))
        again = await app.enqueue(Once(key="a"))
        assert (other.id, again.id) == (1, 2)
        same = await app.enqueue(Once(key="a"))
        assert (same.id, same.existed) == (2, True), "two rows have its id, and the one that lives counts"


@pytest.mark.parametrize("on_conflict", ["keep", "replace", "move"])
async def test_an_id_that_a_task_of_another_key_has_by_now(db: Any, dsn: str, on_conflict: str) -> None:
    """No worker has noticed yet: the key's task is gone, and the task that has its id now isn't changed."""
    async with app.connect(dsn):
        insert = "INSERT INTO notifyq.task (type, payload, options) VALUES ('Say', $1, $2) RETURNING id"
        ids: list[int | None] = []
        for key in "abccba":
            if len(ids) == 3:
                await truncate(db)
            options = json.dumps({"unique_key": key, "on_conflict": on_conflict}).encode()
            ids.append(await db.fetchval(insert, json.dumps({"text": key}).encode(), options))
        assert ids == [1, 2, 3, 1, 2, 3]
        rows = await db.fetch("SELECT payload ->> 'text', state FROM notifyq.all_tasks ORDER BY id")
        assert [tuple(row) for row in rows] == [("c", "ready"), ("b", "ready"), ("a", "ready")]


async def test_an_id_of_a_task_that_has_not_ended(db: Any, dsn: str) -> None:
    """The INSERT fails with the reason."""
    async with app.connect(dsn):
        await app.enqueue(Say(text="old"))
        await db.execute("SELECT setval('notifyq.task_id_seq', 1, false)")
        with pytest.raises(notifyq.DatabaseError, match=r"sequence of ids is behind; run: SELECT setval\('") as found:
            await app.enqueue(Say(text="new"))
        await db.execute(str(found.value).partition("run: ")[2])
        assert (await app.enqueue(Say(text="new"))).id == 2
        assert isinstance(found.value.__cause__, asyncpg.UniqueViolationError)
