"""The server's clock was wrong for a while, and was set right: nothing waits for a time that only the wrong clock knew.

The tests share a server, so they can't set its clock. They give rows the times that a wrong clock would give instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import notifyq
from notifyq.cron import next_slot
from notifyq.database.connection import SQL
from notifyq.worker import maintenance, server_clock
from notifyq.worker.crons import Crons

from ..helpers.crons import CRON, known, made
from ..helpers.limits import Bench, idle
from ..helpers.logs import Logged
from ..helpers.running import working
from ..helpers.verbs import admit, claim, free, register
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow

YEAR = timedelta(days=365)


# --- Cron


@pytest.mark.parametrize("expression", ["* * * * *", "0 3 * * *", "0 0 1 1 *", "*/2 * * * * *"])
@pytest.mark.parametrize("ahead", [timedelta(minutes=30), timedelta(days=3), 40 * YEAR])
async def test_a_slot_from_a_wrong_clock_is_computed_anew(
    dsn: str, db: Any, logged: Logged, expression: str, ahead: timedelta
) -> None:
    """A worker that was there at the time does it, and so does one that starts later."""
    app = made(Seen(), expression)
    async with working(app, dsn):
        right = await known(db)
        for wrong in (right + ahead, right + 2 * ahead):
            await db.execute("UPDATE notifyq.cron SET next_at = $1", wrong)
            await eventually(lambda: db.fetchval("SELECT next_at < $1 FROM notifyq.cron", right + ahead))
    assert len(logged("far beyond its schedule")) == 2
    await db.execute("UPDATE notifyq.cron SET next_at = $1", right + ahead)
    async with working(made(Seen(), expression), dsn):
        await eventually(lambda: db.fetchval("SELECT next_at < $1 FROM notifyq.cron", right + ahead))
    row = await db.fetchrow(CRON)
    assert row["next_at"] <= next_slot(expression, "UTC", datetime.now(UTC) + timedelta(seconds=4))


async def test_slots_that_were_put_ahead_are_not_put_again(db: Any) -> None:
    """The slots of the next seconds were enqueued before the clock was wrong. The new slot comes after them."""
    app = made(Seen(), "* * * * * *")
    schedule = Crons(app.registry.crons)
    await schedule.register(db, await register(db))
    await schedule.enqueue_due(db)
    for _ in range(2):
        await db.execute("UPDATE notifyq.cron SET next_at = next_at + interval '5 hours'")
        await schedule.enqueue_due(db)
        await schedule.enqueue_due(db)
    slots = [row[0] for row in await db.fetch("SELECT run_at FROM notifyq.task ORDER BY run_at")]
    assert len(slots) >= 3
    assert slots == [slots[0] + timedelta(seconds=n) for n in range(len(slots))]


async def test_a_plausible_slot_is_looked_at_once(dsn: str, db: Any, logged: Logged) -> None:
    """While nothing changes, a look at the crons returns no row. After the clock went back, all are checked again."""
    app = made(Seen(), "0 3 * * *")
    async with working(app, dsn):
        right = await known(db)
    schedule = Crons(app.registry.crons)
    await schedule.enqueue_due(db)
    args = ["Nightly"], 3.0, ["Nightly"], [right]
    now = await db.fetchval("SELECT clock_timestamp()")
    assert await db.fetch(SQL["list_due_crons"], *args, now) == []
    assert len(await db.fetch(SQL["list_due_crons"], *args, now + timedelta(hours=1))) == 1
    assert len(await db.fetch(SQL["list_due_crons"], ["Nightly"], 3.0, ["Nightly"], [right - YEAR], now)) == 1
    assert logged("far beyond its schedule") == []


# --- Rates


async def rated(db: Any, count: int, key: str = "k", limit: int = 2, seconds: float = 3600) -> list[int]:
    options = {"limit_key": key, "limit_rate": limit, "limit_seconds": seconds}
    rows = await db.fetch(
        "INSERT INTO notifyq.task (type, options)"
        " SELECT 'Known', $1::text::jsonb FROM generate_series(1, $2::integer) RETURNING id",
        json.dumps(options), count,
    )  # fmt: skip
    return [row[0] for row in rows]


async def test_starts_in_the_future_count_as_of_now(db: Any) -> None:
    """Such starts neither block the key for a year nor are forgotten: the rate holds."""
    me = await register(db)
    await rated(db, 5)
    await admit(db, await claim(db, me, 2))
    await db.execute("UPDATE notifyq.rate_log SET at = at + interval '1 year'")
    await admit(db, await claim(db, me, 1))
    started = await db.fetch("SELECT n, at <= clock_timestamp() AS past FROM notifyq.rate_log")
    assert [tuple(row) for row in started] == [(2, True)]
    # Granted for the end of a window that began when the clock was found right.
    granted = """SELECT run_at - (SELECT at FROM notifyq.rate_log) FROM notifyq.task
                 WHERE waiting_on IS NOT NULL AND NOT withheld"""
    assert await db.fetchval(granted) == timedelta(hours=1)


async def test_starts_of_several_times_become_one(db: Any) -> None:
    for days in (1, 2, 3):
        await db.execute(
            "INSERT INTO notifyq.rate_log VALUES ('limit:k', now() + $1, 2, $2)", timedelta(days), float(days)
        )
    await db.execute("INSERT INTO notifyq.rate_log VALUES ('limit:k', now() - interval '1 hour', 7, 1)")
    await db.execute("INSERT INTO notifyq.rate_log VALUES ('limit:other', now() + interval '1 day', 9, 1)")
    await db.execute("SELECT notifyq.lock_keys('{limit:k}')")
    rows = await db.fetch("SELECT key, n, seconds FROM notifyq.rate_log ORDER BY key, n")
    assert [tuple(row) for row in rows] == [("limit:k", 6, 3.0), ("limit:k", 7, 1.0), ("limit:other", 9, 1.0)]


async def test_a_slot_that_was_granted_for_next_year(dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is granted another slot, though no other task comes to that key, and it keeps no other waiting."""
    for chore in maintenance.PRUNING:
        monkeypatch.setattr(chore, "every", 0.3)
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn):
        await app.enqueue_many([bench.Job(key="a") for _ in range(3)], limit_key="a", rate="1/5s")
        granted = "SELECT count(*) FROM notifyq.task WHERE waiting_on = 'limit:a' AND NOT withheld AND worker IS NULL"
        await eventually(lambda: db.fetchval(granted), 1)
        assert len(bench.ended.items) == 1
        await db.execute("UPDATE notifyq.rate_log SET at = at - interval '1 hour'")
        await db.execute(
            "UPDATE notifyq.task SET run_at = run_at + interval '1 year' WHERE waiting_on IS NOT NULL AND NOT withheld"
        )
        await bench.ended.reach(3)
        await idle(db)


async def test_a_newcomer_frees_what_was_granted_for_next_year(db: Any) -> None:
    me = await register(db)
    await rated(db, 2, limit=1)
    await admit(db, await claim(db, me, 2))
    slot = """SELECT run_at < clock_timestamp() + interval '2 hours' FROM notifyq.task
              WHERE waiting_on IS NOT NULL AND NOT withheld"""
    assert await db.fetchval(slot) is True
    await db.execute("UPDATE notifyq.task SET run_at = run_at + interval '1 year' WHERE waiting_on IS NOT NULL")
    await rated(db, 1, limit=1)
    await admit(db, await claim(db, me, 1))
    assert await db.fetchval(slot) is True
    await free(db)


# --- Retries


async def test_a_retry_from_a_wrong_clock_keeps_its_delay(
    dsn: str, db: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chore in maintenance.PRUNING:
        monkeypatch.setattr(chore, "every", 0.3)
    seen = Seen()
    app = notifyq.App()

    class Flaky(notifyq.Task):
        backoff = 1.0

    @app.handler
    async def flaky(task: Flaky, ctx: notifyq.Context) -> None:
        if ctx.attempt == 1:
            raise ValueError("not yet")
        seen.add(ctx.id)

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Flaky())
        meant = await app.enqueue(Flaky(), run_at=datetime.now(UTC) + YEAR)
        await eventually(
            lambda: db.fetchval("SELECT attempts = 1 AND worker IS NULL FROM notifyq.task WHERE id = $1", ref.id)
        )
        await db.execute(
            "UPDATE notifyq.task"
            " SET run_at = run_at + interval '1 year', processed_at = processed_at + interval '1 year'"
            " WHERE id = $1 AND worker IS NULL", ref.id,
        )  # fmt: skip
        assert await seen.reach(1) == [ref.id]
    assert await db.fetchval("SELECT run_at > now() + interval '364 days' FROM notifyq.task WHERE id = $1", meant.id)
    assert len(logged("the server's clock was set back")) <= 1


async def test_what_is_right_is_no_matter_of_doubt(db: Any) -> None:
    me = await register(db)
    await db.execute(
        "INSERT INTO notifyq.task (type, run_at) SELECT 'Known', now() + interval '1 day' FROM generate_series(1, 3)"
    )
    await db.execute("INSERT INTO notifyq.task (type, run_at) VALUES ('Known', 'infinity'), ('Known', now())")
    await rated(db, 3, limit=1)
    jobs = await claim(db, me, 4)
    await admit(db, jobs[1:])
    await db.fetch(SQL["retry_later"], me, [jobs[0].id], [1], [3600.0], [b'{"error": "oh"}'])
    assert [*await db.fetchrow(SQL["list_misdated"], "default")] == [[], []]


# --- Unique keys


async def unique(db: Any, seconds: float | None = None) -> int:
    options = {"unique_key": "u", **({"unique_for": seconds} if seconds else {})}
    found: int = await db.fetchval("SELECT notifyq.enqueue('Known', options => $1::text::jsonb)", json.dumps(options))
    return found


async def test_a_key_from_a_wrong_clock_is_free_after_its_time(db: Any) -> None:
    """Its task counts as enqueued when the clock was found right."""
    first = await unique(db, 3600)
    await db.execute("SELECT notifyq.cancel($1)", first)
    await db.execute("UPDATE notifyq.finished SET state = 'done'")
    await db.execute(
        "UPDATE notifyq.unique_key SET enqueued_at = now() + interval '1 year', until = now() + interval '366 days'"
    )
    assert await unique(db, 3600) == first
    enqueued, until = await db.fetchrow("SELECT enqueued_at - now(), until - enqueued_at FROM notifyq.unique_key")
    assert enqueued <= timedelta(seconds=20)
    assert until == timedelta(days=1), "of the longest that was asked"
    await db.execute("UPDATE notifyq.unique_key SET enqueued_at = now() - interval '2 hours'")
    assert await unique(db, 3600) > first


async def test_keys_from_a_wrong_clock_are_forgotten_in_the_end(db: Any) -> None:
    first = await unique(db, 3600)
    await db.execute("SELECT notifyq.cancel($1)", first)
    await db.execute(
        "UPDATE notifyq.unique_key SET enqueued_at = now() + interval '1 year', until = now() + interval '366 days'"
    )
    await db.execute(
        "INSERT INTO notifyq.unique_key VALUES ('never', 1, now(), 'infinity'), ('odd', 1, 'infinity', 'infinity')"
    )
    assert await db.fetchval(SQL["prune_unique_keys"], 100) == 0
    rows = await db.fetch("SELECT key FROM notifyq.unique_key WHERE until < now() + interval '25 hours'")
    assert [row[0] for row in rows] == ["u"]


# --- History


async def test_a_step_ahead_makes_nothing_old(
    dsn: str, db: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker prunes by the time that has passed since it started. It believes a clock that is set back."""
    for chore in maintenance.PRUNING:
        monkeypatch.setattr(chore, "every", 0.1)
    step = timedelta(0)
    used: list[float] = []  # how far beyond the right time
    believed = server_clock.ServerClock.at_most

    def stepped(self: server_clock.ServerClock, said: datetime) -> datetime:
        time = believed(self, said + step)
        used.append((time - said).total_seconds())
        return time

    monkeypatch.setattr(server_clock.ServerClock, "at_most", stepped)
    async with working(made(Seen()), dsn):
        await eventually(lambda: more_than(2, used))
        assert max(used) < 600
        step = timedelta(days=60)
        await eventually(lambda: said(logged, "went ahead by"), 1)
        used.clear()
        await eventually(lambda: more_than(2, used))
        assert 50 < min(used) <= max(used) < 600
        step = timedelta(days=-60)
        await eventually(lambda: said(logged, "was set back by"), 1)
        used.clear()
        await eventually(lambda: more_than(2, used))
        assert max(used) < -59 * 86400
    assert len(logged("went ahead by")) == len(logged("was set back by")) == 1


async def more_than(count: int, items: list[float]) -> bool:
    return len(items) > count


async def said(logged: Callable[[str], list[dict[str, Any]]], text: str) -> int:
    return len(logged(text))


async def test_prune_by_a_time_that_is_given(db: Any) -> None:
    """The earlier of the server's time and the worker's counts."""
    await db.execute("INSERT INTO notifyq.task (type) VALUES ('a')")
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task")
    await db.execute("UPDATE notifyq.finished SET processed_at = now() - interval '2 hours'")
    now = await db.fetchval("SELECT now()")
    assert await db.fetchval(SQL["prune_finished"], 3600.0, 3600.0, 10, now - timedelta(hours=2)) == 0
    assert await db.fetchval(SQL["prune_finished"], 7300.0, 7300.0, 10, now + timedelta(days=9)) == 0
    assert await db.fetchval(SQL["prune_finished"], 3600.0, 3600.0, 10, now + timedelta(days=9)) == 1


# --- Workers that were seen in the future


async def test_a_worker_seen_in_the_future_serves_nothing(db: Any) -> None:
    me = await register(db)
    await db.execute("UPDATE notifyq.worker SET crons = '{n}'")
    await db.execute("INSERT INTO notifyq.cron (name, expression, type) VALUES ('n', '* * * * *', 'T')")
    await db.execute("INSERT INTO notifyq.task (type) VALUES ('Known')")

    async def served() -> tuple[Any, ...]:
        stats = json.loads(await db.fetchval(SQL["read_stats"]))
        return (
            await db.fetchval("SELECT workers FROM notifyq.all_queues WHERE name = 'default'"),
            json.loads((await db.fetchrow(SQL["list_crons"]))["cron"])["served"],
            stats["unserved"] == [],
            stats["workers"][0]["status"],
        )

    assert await served() == (1, True, True, "ok")
    await db.execute("UPDATE notifyq.worker SET seen_at = now() + interval '1 hour' WHERE id = $1", me)
    assert await served() == (0, False, False, "silent")
    await db.fetch(SQL["remove_cron"], "n")
    assert await db.fetchval("SELECT count(*) FROM notifyq.cron") == 0
