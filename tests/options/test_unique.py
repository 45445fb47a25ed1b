"""Unique tasks: which tasks with the same key prevent a new one, and what is done on conflict."""

from __future__ import annotations

from typing import Any

import pytest

import notifyq
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError
from notifyq.options import State
from notifyq.unique import DIGEST_LENGTH

from ..helpers import verbs
from ..helpers.running import working
from ..helpers.uniques import WAITING, Daily, Known, Whole, put
from ..helpers.waiting import Seen, eventually

STATES: tuple[State, ...] = ("scheduled", "ready", "running", "done", "dead", "cancelled")


@pytest.mark.parametrize("state", STATES)
async def test_as_long_as_it_has_not_ended(app: notifyq.App, db: Any, state: str) -> None:
    old = await put(db, state)
    ref = await app.enqueue(Known(), unique="k")
    assert ref.existed is (state in ("scheduled", "ready", "running"))
    assert (ref.id == old) is ref.existed


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("chosen", STATES)
async def test_states_that_are_chosen(app: notifyq.App, db: Any, state: str, chosen: Any) -> None:
    old = await put(db, state)
    ref = await app.enqueue(Known(), unique="k", unique_states=(chosen,), unique_for=3600)
    assert (ref.existed, ref.id == old) == (state == chosen,) * 2


@pytest.mark.parametrize("state", STATES)
async def test_once_an_hour(app: notifyq.App, db: Any, state: str) -> None:
    """An hour from its enqueue, whatever became of it, unless it failed. After that hour it prevents no other."""
    old = await put(db, state)
    for seconds, existed in ((0, state not in ("dead", "cancelled")), (3700, False)):
        await db.fetch(SQL["advance_clock"], float(seconds))
        ref = await app.enqueue(Known(), unique="k", unique_for=3600)
        assert ref.existed is existed
        assert (ref.id == old) is existed


async def test_once_an_hour_where_no_history_is_kept(app: notifyq.App, dsn: str, db: Any) -> None:
    ran = Seen()

    @app.handler
    async def known(task: Known) -> None:
        ran.add(task.n)

    async with working(app, dsn, history=0.0):
        first = await app.enqueue(Known(n=1), unique="k", unique_for=3600)
        await ran.reach(1)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.all_tasks"), 0)
    again = await app.enqueue(Known(n=2), unique="k", unique_for=3600)
    assert (again.id, again.existed) == (first.id, True)
    assert not (await app.enqueue(Known(n=3), unique="k")).existed


def app_dsn(app: notifyq.App) -> str:
    assert app._dsn is not None
    return app._dsn


async def test_a_key_is_one_for_all_types_and_queues(app: notifyq.App) -> None:
    ref = await app.enqueue(Known(), unique="k")
    assert (await app.enqueue(Daily(user="a", day=1), unique="k", queue="other")).id == ref.id
    assert not (await app.enqueue(Known(), unique="K")).existed
    assert not (await app.enqueue(Known())).existed


@pytest.mark.parametrize("key", ["'; DROP TABLE notifyq.task --", "\U0001f600" * 200, "a\nb", "%s $1 {x}", " "])
async def test_any_key(app: notifyq.App, db: Any, key: str) -> None:
    ref = await app.enqueue(Known(), unique=key)
    assert (await app.enqueue(Known(), unique=key)).id == ref.id
    assert await db.fetchval("SELECT options ->> 'unique_key' FROM notifyq.all_tasks") == key


@pytest.mark.parametrize("state", ["scheduled", "ready", "running", "done"])
@pytest.mark.parametrize("conflict", ["keep", "replace", "move"])
async def test_on_conflict(app: notifyq.App, db: Any, state: str, conflict: Any) -> None:
    """A task that waits is changed. Beside a task that runs there is a new one, unless the caller asks to keep the
    running one."""
    old = await put(db, state, payload='{"n": 1}')
    before = await verbs_row(db, old)
    new = Known(n=2)
    ref = await app.enqueue(new, unique="k", on_conflict=conflict, delay=7200, unique_states=STATES[:3])
    row = await verbs_row(db, old)
    waits = state in WAITING
    assert ref.existed is (state != "done")
    assert row["payload"] == (b'{"n": 2}' if waits and conflict == "replace" else before["payload"])
    moved = waits and conflict == "move"
    assert (row["run_at"] != before["run_at"]) is moved
    assert row["state"] == ("scheduled" if moved else state)
    if state == "running":
        assert (await app.enqueue(new, unique="k", on_conflict=conflict)).existed is (conflict == "keep")


async def verbs_row(db: Any, id: int) -> Any:
    return await db.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id)


async def test_one_that_is_moved_to_now_is_ready_at_once(app: notifyq.App, db: Any) -> None:
    """A claim finds it, without any timer."""
    old = await put(db, "scheduled")
    assert (await app.enqueue(Known(), unique="k", on_conflict="move")).id == old
    assert [job.id for job in await verbs.claim(db, await verbs.register(db))] == [old]


async def test_one_that_is_moved_wakes_a_worker_in_time(app: notifyq.App, dsn: str, db: Any) -> None:
    """It is moved from tomorrow to now, and from now to a moment later. Only the bell tells the worker."""
    seen = Seen()

    @app.handler
    async def known(task: Known) -> None:
        seen.add(task.n)

    async with working(app, dsn):
        for n, delay in ((1, 0.0), (2, 0.05)):
            ref = await app.enqueue(Known(n=n), unique=f"k{n}", delay=86400)
            moved = await app.enqueue(Known(), unique=f"k{n}", on_conflict="move", delay=delay)
            assert (moved.id, moved.existed) == (ref.id, True)
            await seen.reach(n)
    assert seen.items == [1, 2]


async def test_a_replaced_one_runs_as_what_it_is_now(app: notifyq.App, dsn: str) -> None:
    seen = Seen()

    @app.handler
    async def daily(task: Daily) -> None:
        seen.add(task.note)

    await app.enqueue(Known(), unique="k")
    assert (await app.enqueue(Daily(user="a", day=1, note="new"), unique="k", on_conflict="replace")).existed
    async with working(app, dsn):
        assert await seen.reach(1) == ["new"]


async def test_by_the_whole_payload(app: notifyq.App, db: Any) -> None:
    ref = await app.enqueue(Whole(user="a", more={"x": 1, "y": 2}))
    assert (await app.enqueue(Whole(user="a", more={"y": 2, "x": 1}))).id == ref.id
    assert not (await app.enqueue(Whole(user="a", more={"x": 1}))).existed
    assert not (await app.enqueue(Whole(user="a", more={"x": 1, "y": 2}), unique=False)).existed
    key = await db.fetchval("SELECT options ->> 'unique_key' FROM notifyq.task WHERE id = $1", ref.id)
    assert key.startswith("WHOLE:")
    assert len(key) == len("WHOLE:") + DIGEST_LENGTH


async def test_by_chosen_fields(app: notifyq.App, db: Any) -> None:
    ref = await app.enqueue(Daily(user="a", day=1, note="x"))
    assert (await app.enqueue(Daily(user="a", day=1, note="y"))).existed
    assert not (await app.enqueue(Daily(user="a", day=2))).existed
    assert not (await app.enqueue(Daily(user="b", day=1))).existed
    assert (await app.enqueue(Daily(user="a", day=9), unique=("user",))).existed is False
    assert (await app.enqueue(Daily(user="a", day=8), unique=("user",))).existed is True
    [job] = [job for job in await verbs.claim(db, await register_all(db)) if job.id == ref.id]
    await verbs.finish(db, [job])
    assert (await app.enqueue(Daily(user="a", day=1))).id == ref.id, "unique_for is the class's"


async def register_all(db: Any) -> int:
    id: int = await db.fetchval(SQL["register_worker"], "host:1", ["default"], ["Known", "Daily"], [10, 10], 100, 30.0)
    return id


async def test_types_with_long_names_have_keys_of_their_own(app: notifyq.App) -> None:
    class One(notifyq.Task, tag="x" * 199 + "1"):
        unique = True

    class Two(notifyq.Task, tag="x" * 199 + "2"):
        unique = True

    assert not (await app.enqueue(One())).existed
    assert not (await app.enqueue(Two())).existed
    assert (await app.enqueue(Two())).existed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"unique": "user"},
            r"unique is 'user'; expected True, or a tuple of its fields' names; \('user',\) has a comma",
        ),
        ({"unique": ("user", "usr")}, "unique has 'usr' in it, which is no field; its fields: user"),
        ({"unique": ()}, r"unique is \(\); expected True"),
        ({"unique": ["user"]}, r"unique is \['user'\]; expected True"),
        ({"unique": True, "unique_for": 0}, "unique_for is 0; expected seconds above 0"),
        ({"unique": True, "unique_for": float("nan")}, "unique_for is nan; expected seconds above 0"),
        ({"unique": True, "unique_states": ("redy",)}, "unique_states is .*; expected a tuple of scheduled, ready"),
        ({"unique": True, "unique_states": "ready"}, "unique_states is 'ready'; expected a tuple of scheduled, ready"),
        ({"unique": True, "unique_states": ("done",)}, "unique_states has 'done' in it, and nothing says for how long"),
        ({"unique": True, "on_conflict": "drop"}, "on_conflict is 'drop'; expected 'keep', 'replace' or 'move'"),
    ],
)
async def test_what_a_class_may_not_say(app: notifyq.App, settings: dict[str, Any], message: str) -> None:
    """The error comes where the handler is registered; and at enqueue, if there is no handler."""
    Wrong: Any = type("Wrong", (notifyq.Task,), {"__annotations__": {"user": str}, **settings})

    async def wrong(task: Wrong) -> None: ...

    with pytest.raises(ConfigError, match=f"task Wrong: {message}"):
        app.handler(wrong)
    with pytest.raises(ConfigError, match=f"task Wrong: {message}"):
        await app.enqueue(Wrong(user="a"))


@pytest.mark.parametrize("name", ["unique", "unique_for", "unique_states", "on_conflict"])
def test_a_setting_is_no_field(name: str) -> None:
    Wrong: Any = type("Wrong", (notifyq.Task,), {"__annotations__": {name: int}})

    async def wrong(task: Wrong) -> None: ...

    with pytest.raises(ConfigError, match=f"'{name}' is a setting of the class, not a field of the payload"):
        notifyq.App().handler(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique": ""}, "unique '': expected 1 to 200 characters"),
        ({"unique": "x" * 201}, "expected 1 to 200 characters"),
        ({"unique": "a\x00b"}, "expected 1 to 200 characters, none of them NUL"),
        ({"unique": 7}, "unique is 7; expected a key, True, or a tuple"),
        ({"unique": ("m",)}, "unique has 'm' in it, which is no field; its fields: n"),
        ({"unique_for": 60}, "unique_for, unique_states and on_conflict go with a key, and Known has no rule for one"),
        ({"unique": "k", "unique_for": -1}, "unique_for is -1; expected seconds above 0"),
        ({"unique": "k", "unique_for": True}, "unique_for is True; expected seconds above 0"),
        (
            {"unique": "k", "unique_states": ("dead",)},
            "has 'dead' in it, and nothing says for how long; add unique_for",
        ),
        ({"unique": "k", "unique_states": ()}, r"unique_states is \(\); expected a tuple"),
        ({"unique": "k", "on_conflict": "replace it"}, "on_conflict is 'replace it'"),
    ],
)
async def test_what_enqueue_refuses(app: notifyq.App, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await app.enqueue(Known(), **options)
