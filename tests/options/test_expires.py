"""expires: a task that hasn't started in time is cancelled when a worker takes it, and its error says so."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import asyncpg
import pytest

import notifyq
from notifyq.database.connection import prove_alive
from notifyq.testing import Drained, advance, drain
from notifyq.worker.batch import Batches
from notifyq.worker.capacity import Rate
from notifyq.worker.job import Deadline, claim
from notifyq.worker.left_out import LeftOut

from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.statements import register
from ..helpers.waiting import Seen, eventually

EXPIRED = re.compile(r"expired: not started by 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC")


class Note(notifyq.Task):
    n: int = 0
    ballast: str = ""


class First(notifyq.Task):
    pass


class Gathered(notifyq.Task):
    n: int


class Others(notifyq.Task):
    pass


class Short(notifyq.Task):
    expires = timedelta(minutes=1)


class Nightly(Short):
    pass


class Again(notifyq.Task):
    backoff = 1e9  # at most an hour


class Last(notifyq.Task):
    pass


@pytest.fixture
def ran() -> list[Any]:
    return []


@pytest.fixture
def app(ran: list[Any]) -> notifyq.App:
    app = notifyq.App()

    @app.handler
    async def note(task: Note) -> None:
        ran.append(task.n)

    @app.handler
    async def short(task: Short) -> None:
        ran.append("short")

    @app.handler
    async def again(task: Again, ctx: notifyq.Context) -> None:
        ran.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError("not yet")

    @app.handler
    async def last(task: Last) -> None:
        ran.append("last")

    return app


async def ends(db: Any, *ids: int) -> list[tuple[str, int, str | None]]:
    """State, attempts and error of each; an error that says when a task expired is "expired"."""
    rows = await db.fetch("SELECT id, state, attempts, error FROM notifyq.all_tasks")
    found = {
        row["id"]: (
            row["state"],
            row["attempts"],
            "expired" if row["error"] is not None and EXPIRED.fullmatch(row["error"]) else row["error"],
        )
        for row in rows
    }
    return [found[id] for id in ids]


async def states(db: Any, *ids: int) -> list[str]:
    return [state for state, _, _ in await ends(db, *ids)]


async def test_late_tasks_are_cancelled_and_say_why(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        late = await app.enqueue(Note(1), expires=60)
        by_class = await app.enqueue(Short())
        many = await app.enqueue_many([Note(2), Note(3)], expires=timedelta(minutes=1))
        by_sql = await db.fetchval("""SELECT notifyq.enqueue('Note', options => '{"expires": 60}')""")
        in_time = await app.enqueue(Note(4), expires=3600)
        plain = await app.enqueue(Note(5))
        await advance(app, 61)
        assert await drain(app) == Drained(done=2, cancelled=5)
        assert sorted(map(str, ran)) == ["4", "5"]
        assert await ends(db, late.id, by_class.id, *many, by_sql) == [("cancelled", 0, "expired")] * 5
        assert await ends(db, in_time.id, plain.id) == [("done", 1, None)] * 2
        with pytest.raises(notifyq.TaskCancelled, match="expired: not started by"):
            await app.ref(late.id).result(timeout=5)


def test_the_tasks_of_a_cron_have_that_of_their_class(app: notifyq.App) -> None:
    @app.cron("0 3 * * *")
    @app.handler
    async def nightly(task: Nightly) -> None: ...

    assert app.registry.crons["Nightly"].options == '{"expires":60.0}'


async def test_the_time_counts_from_when_the_task_is_due(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        delayed = await app.enqueue(Note(1), delay=3600, expires=60)
        overdue = await app.enqueue(Note(2), run_at=datetime.now(UTC) - timedelta(days=1), expires=60)
        forgotten = await app.enqueue(Note(3), delay=3600, expires=60)
        await drain(app)
        await advance(app, 3601)
        await app.ref(forgotten.id).cancel()
        forgotten = await app.enqueue(Note(3), delay=3600, expires=60)
        await drain(app)
        await advance(app, 3661)
        await drain(app)
    assert ran == [2, 1]
    assert await states(db, delayed.id, overdue.id, forgotten.id) == ["done", "done", "cancelled"]


async def test_a_task_that_has_started_goes_on(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    """A retry may come after the time is over, and so may an attempt that a shutdown cut short, which doesn't count."""
    async with app.connect(dsn):
        ref = await app.enqueue(Again(), expires=60)
        await drain(app)
        await db.execute("UPDATE notifyq.task SET attempts = 0")
        await advance(app, 3600)
        await drain(app, with_scheduled=True)
    assert ran == [1, 1, 2, 3]
    assert await ends(db, ref.id) == [("done", 3, "ValueError: not yet")]


async def test_with_limits_order_and_predecessors(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    """A task that waited for another is asked when its turn comes; the slot that it had goes to the next one."""
    long, short = 9999, 60
    async with app.connect(dsn):
        limited = [
            (await app.enqueue(Note(n), limit_key="k", limit=1, expires=expires)).id
            for n, expires in enumerate((long, short, short, long))
        ]
        ordered = [
            (await app.enqueue(Note(n), order_key="o", expires=expires)).id
            for n, expires in enumerate((short, long, short, long), 10)
        ]
        first = await app.enqueue(Note(20), expires=short)
        then = await app.enqueue(Last(), after=[first])
        anyway = await app.enqueue(Last(), after=[first], on_dead="run")
        late = await app.enqueue(Last(), after=[limited[0]], expires=short)
        await advance(app, 61)
        await drain(app)
    assert await states(db, *limited) == ["done", "cancelled", "cancelled", "done"]
    assert await states(db, *ordered) == ["cancelled", "done", "cancelled", "done"]
    assert await states(db, first.id, then.id, anyway.id, late.id) == ["cancelled", "cancelled", "done", "cancelled"]
    assert sorted(map(str, ran)) == ["0", "11", "13", "3", "last"]


async def test_the_clock_goes_on_while_a_task_is_parked(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    """Its release sets run_at, but doesn't give it more time."""
    async with app.connect(dsn):
        running = await app.enqueue(Note(1), order_key="o")
        worker = await register(db)
        assert await prove_alive(db, worker)  # or else a drain waits for its rescue
        assert await claim(db, worker, {"default": 1}, 1)
        assert await db.fetch("SELECT * FROM notifyq.admit($1, $2, '{1}')", worker, [running.id])
        parked = await app.enqueue(Note(2), order_key="o", expires=60)
        await drain(app)
        assert await db.fetchval("SELECT parked FROM notifyq.task WHERE id = $1", parked.id) == "order"
        await advance(app, 61)
        assert await db.fetchval("SELECT notifyq.cancel($1)", running.id)
        assert await db.fetchval("SELECT notifyq.release_waiters()") == 1
        await drain(app)
    assert ran == []
    assert await ends(db, parked.id) == [("cancelled", 0, "expired")]


@pytest.mark.parametrize("on_conflict", ["replace", "move"])
async def test_a_newer_unique_task_gives_the_waiting_one_its_time(
    app: notifyq.App, ran: list[Any], dsn: str, db: Any, on_conflict: Literal["replace", "move"]
) -> None:
    """A debounced task is as old as the newest request. The time counts from when the waiting task is due."""
    async with app.connect(dsn):

        async def ask(n: int) -> notifyq.Ref:
            return await app.enqueue(Note(n), unique="key", on_conflict=on_conflict, delay=40, expires=20)

        waiting = await ask(1)
        await advance(app, 30)
        assert (await ask(2)).id == waiting.id
        await advance(app, 25)
        if on_conflict == "move":
            assert (await ask(3)).id == waiting.id
            await advance(app, 50)
        await drain(app)
        assert ran == [2 if on_conflict == "replace" else 1]
        waiting = await app.enqueue(Note(4), unique="other", on_conflict=on_conflict)
        await app.enqueue(Note(5), unique="other", on_conflict=on_conflict, expires=20)
        await advance(app, 21)
        await drain(app)
        assert await ends(db, waiting.id) == [("cancelled", 0, "expired")]


async def test_a_task_that_has_expired_is_not_in_the_way(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    """It counts as cancelled, as it is as soon as a worker takes it. One that expires later is in the way."""
    async with app.connect(dsn):
        waiting = await app.enqueue(Note(1), unique="k", expires=60)
        assert (await app.enqueue(Note(2), unique="k", expires=3600)).id == waiting.id
        await advance(app, 61)
        for on_conflict in ("keep", "replace", "move"):
            given: Any = {"unique": "k", "on_conflict": on_conflict}
            counts = await app.enqueue(Note(3), **given, unique_for=3600, unique_states=["cancelled"])
            assert (counts.id, counts.existed) == (waiting.id, True)
        assert await db.fetchval("SELECT payload ->> 'n' FROM notifyq.task") == "1"
        newer = await app.enqueue(Note(4), unique="k", on_conflict="replace")
        assert not newer.existed
        assert (await app.enqueue(Note(5), unique="k")).id == newer.id
        assert await drain(app) == Drained(done=1, cancelled=1)
    assert ran == [4]
    assert await states(db, waiting.id, newer.id) == ["cancelled", "done"]


@pytest.mark.parametrize("on_conflict", ["replace", "move"])
async def test_a_newer_unique_task_lets_no_started_one_expire(
    app: notifyq.App, ran: list[Any], dsn: str, db: Any, on_conflict: Literal["replace", "move"]
) -> None:
    async with app.connect(dsn):
        ref = await app.enqueue(Again(), unique="k")
        await drain(app)
        newer = await app.enqueue(Again(), unique="k", on_conflict=on_conflict, expires=1)
        assert newer.id == ref.id
        await advance(app, 3600)
        await drain(app, with_scheduled=True)
    assert ran == [1, 2, 3]
    assert await states(db, ref.id) == ["done"]


@pytest.mark.parametrize("on_conflict", ["replace", "move"])
async def test_a_newer_unique_task_replaces_the_option(
    app: notifyq.App, ran: list[Any], dsn: str, db: Any, on_conflict: Literal["replace", "move"]
) -> None:
    """A retry by hand applies it, and people read it."""
    async with app.connect(dsn):
        waiting = await app.enqueue(Note(1), unique="k", order_key="o", expires=60)
        for expires in (20, None, 30):
            await app.enqueue(Note(2), unique="k", on_conflict=on_conflict, expires=expires)
            options = json.loads(await db.fetchval("SELECT options FROM notifyq.all_tasks"))
            assert options.pop("expires", None) == expires
            assert options == {"unique_key": "k", "on_conflict": "keep", "order_key": "o"}
        await app.ref(waiting.id).cancel()
        assert await db.fetchval("SELECT notifyq.retry($1)", waiting.id)
        await advance(app, 31)
        await drain(app)
    assert ran == []
    assert await ends(db, waiting.id) == [("cancelled", 0, "expired")]


async def test_a_retry_of_a_scheduled_task_counts_from_then(
    app: notifyq.App, ran: list[Any], dsn: str, db: Any
) -> None:
    async with app.connect(dsn):
        late, in_time = [await app.enqueue(Note(n), delay=3600, expires=60) for n in (1, 2)]
        again = await app.enqueue(Again(), expires=60)
        await drain(app)
        for ref in (late, again):
            assert await db.fetchval("SELECT notifyq.retry($1)", ref.id)
        await advance(app, 61)
        assert await db.fetchval("SELECT notifyq.retry($1)", in_time.id)
        await drain(app)
    assert ran == [1, 2, 2]
    assert await states(db, late.id, in_time.id) == ["cancelled", "done"]


async def test_a_retry_gives_it_the_time_again(app: notifyq.App, ran: list[Any], dsn: str, db: Any) -> None:
    async with app.connect(dsn):
        ref = await app.enqueue(Note(1), expires=60)
        for late, run in ((61, []), (61, []), (59, [1])):
            await advance(app, late)
            await drain(app)
            assert ran == run
            assert await db.fetchval("SELECT notifyq.retry($1)", ref.id) == (not run)
    assert (await ends(db, ref.id))[0][:2] == ("done", 1)


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which workers here take deadlines to be nearer."""
    seconds = [0.0]
    passed = property(lambda deadline: time.monotonic() + seconds[0] >= deadline.until)
    monkeypatch.setattr(Deadline, "has_passed", passed)
    return seconds


async def test_tasks_that_wait_inside_a_worker_expire(
    app: notifyq.App, ran: list[Any], dsn: str, db: Any, skip: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker claims tasks ahead of its slots. Those that it can't begin in time are cancelled."""
    monkeypatch.setattr(Rate, "ahead", lambda *_: 100)

    @app.handler
    async def first(task: First) -> None:
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE expires_at IS NULL"), 6)
        skip[0] += 61

    async with app.connect(dsn):
        begun = await app.enqueue(First(), expires=60)
        late = [await app.enqueue(Note(1), expires=60), await app.enqueue(Note(2, "x" * 40_000), expires=60)]
        others = [await app.enqueue(Note(3)), await app.enqueue(Note(4), expires=3600)]
        await app.enqueue(Note(5), expires=1e9)
        assert await drain(app, concurrency=1) == Drained(done=4, cancelled=2)
        with pytest.raises(notifyq.TaskCancelled, match="expired: not started by"):
            await app.ref(late[0].id).result(timeout=5)
    assert ran == [3, 4, 5]
    assert await ends(db, begun.id, *[ref.id for ref in others]) == [("done", 1, None)] * 3
    assert await ends(db, *[ref.id for ref in late]) == [("cancelled", 1, "expired")] * 2


async def test_the_deadline_is_that_of_the_database(app: notifyq.App, dsn: str, db: Any) -> None:
    worker = await register(db)
    async with app.connect(dsn):
        for expires in (60, 3600):
            await app.enqueue(Note(), expires=expires)
        await app.enqueue(Note(), limit_key="k", limit=1)
        await app.enqueue(Note(), limit_key="k", limit=1, expires=60)
    times = [row[0] for row in await db.fetch("SELECT expires_at FROM notifyq.task ORDER BY id")]
    jobs = await claim(db, worker, {"default": 9}, 9)
    before = time.monotonic()
    await LeftOut().admit(db, worker, jobs)
    for job, at, seconds in zip(jobs[:2], times, (60, 3600), strict=False):
        assert job.deadline is not None
        assert job.deadline.expires_at == at
        assert seconds - limit(5) < job.deadline.until - before <= seconds + limit(5)
        assert not job.deadline.has_passed
    assert jobs[2].deadline is None
    parked = await db.fetchrow("SELECT parked, expires_at FROM notifyq.task WHERE id = $1", jobs[3].id)
    assert tuple(parked) == ("limit", times[3])
    for left, passed in ((-0.1, True), (limit(60), False)):
        assert Deadline(times[0], time.monotonic() + left).has_passed is passed


async def test_tasks_that_linger_in_a_batch_expire(
    app: notifyq.App, ran: list[Any], dsn: str, db: Any, skip: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler gets the others. If there are none, it isn't called."""
    joined, join = Seen(), Batches.join

    async def noted(self: Batches, *args: Any) -> Any:
        joined.add(args)
        return await join(self, *args)

    @app.handler(batch=3, linger=120)
    async def gathered(tasks: list[Gathered]) -> list[int]:
        ran.append([task.n for task in tasks])
        return [task.n for task in tasks]

    @app.handler(batch=3, linger=120)
    async def others(tasks: list[Others]) -> None:
        ran.append(len(tasks))

    monkeypatch.setattr(Batches, "join", noted)
    async with app.connect(dsn), working(app, dsn, concurrency=3):
        late = await app.enqueue_many([Gathered(1), Gathered(2)], expires=60)
        await joined.reach(2)
        skip[0] = 61
        assert await (await app.enqueue(Gathered(3))).result(timeout=limit()) == 3
        skip[0] = 0
        late += await app.enqueue_many([Gathered(4)], expires=60)
        await joined.reach(4)
        skip[0] = 61
        await app.enqueue_many([Others(), Others()])
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    assert ran == [[3], 2]
    assert await ends(db, *late) == [("cancelled", 1, "expired")] * 3


@pytest.mark.parametrize("style", ["SQL, DMY", "German"])
async def test_the_reason_is_the_same_in_every_session(app: notifyq.App, dsn: str, db: Any, style: str) -> None:
    async with app.connect(dsn):
        late = await app.enqueue(Note(), expires=60)
        await advance(app, 61)
    worker = await register(db)
    [job] = await claim(db, worker, {"default": 1}, 1)
    await db.execute(f"SET datestyle = '{style}'; SET timezone = 'Asia/Tokyo'")
    await db.fetch("SELECT * FROM notifyq.admit($1, $2, '{1}')", worker, [job.id])
    assert await ends(db, late.id) == [("cancelled", 0, "expired")]


@pytest.mark.parametrize("on_conflict", ["replace", "move"])
async def test_the_last_times_that_there_are(db: Any, on_conflict: str) -> None:
    insert = "INSERT INTO notifyq.task (type, run_at, options) VALUES ('Note', $1::text::timestamptz, $2::text::jsonb)"
    most: dict[str, Any] = {"expires": 1_000_000_000}
    with pytest.raises(asyncpg.CheckViolationError, match="expires needs a run_at before year 294244"):
        await db.execute(insert, "294276-12-31", json.dumps(most))
    for at in ("294243-12-31", "infinity"):
        await db.execute(insert, at, json.dumps(most))
    await db.execute(insert, "294276-12-31", json.dumps({"unique_key": "k"}))
    await db.execute(insert, "2030-01-01", json.dumps(most | {"unique_key": "k", "on_conflict": on_conflict}))
    assert await db.fetchval("SELECT count(*) FROM notifyq.task WHERE expires_at > '2060-01-01'") == 3


async def test_what_is_refused(app: notifyq.App, dsn: str) -> None:
    async with app.connect(dsn):
        for wrong in (0, -1, 1e10, True, "60"):
            options: dict[str, Any] = {"expires": wrong}
            with pytest.raises(notifyq.ConfigError, match=r"expires is .*; expected seconds above 0, or a timedelta"):
                await app.enqueue(Note(), **options)


@pytest.mark.parametrize("at", ["infinity", "-infinity", "294276-01-01"])
async def test_odd_times_stop_no_claim(app: notifyq.App, ran: list[Any], dsn: str, db: Any, at: str) -> None:
    async with app.connect(dsn):
        await app.enqueue(Note(1), expires=60)
        await db.execute("UPDATE notifyq.task SET expires_at = $1::text::timestamptz", at)
        await app.enqueue(Note(2))
        await drain(app)
    assert sorted(ran) == ([2] if at == "-infinity" else [1, 2])


async def test_plain_tasks_are_not_asked(app: notifyq.App, dsn: str, db: Any) -> None:
    """A claim tells which tasks need a second statement before they run."""
    async with app.connect(dsn):
        for options in ({}, {"unique": "key"}, {"expires": 60}):
            given: Any = options
            await app.enqueue(Note(), **given)
    worker = await register(db)
    jobs = await claim(db, worker, {"default": 10}, 10)
    assert [job.needs_admission for job in jobs] == [False, False, True]


async def test_a_worker_is_told_which_tasks_are_gone(app: notifyq.App, dsn: str, db: Any) -> None:
    """Then it doesn't try to hand them back."""
    async with app.connect(dsn):
        late = await app.enqueue(Note(), expires=60)
        in_time = await app.enqueue(Note(), expires=3600)
        await advance(app, 61)
    worker = await register(db)
    assert len(await claim(db, worker, {"default": 2}, 2)) == 2
    rows = await db.fetch("SELECT * FROM notifyq.admit($1, $2, '{1,1}')", worker, [late.id, in_time.id])
    assert {row["id"]: row["waits_for"] for row in rows} == {late.id: "cancelled", in_time.id: None}
