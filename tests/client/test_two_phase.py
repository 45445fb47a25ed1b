"""Two-phase commit: all that docs/transactions.md says of it."""

from __future__ import annotations

import asyncpg
import pytest

import notifyq

from ..helpers.running import working
from ..helpers.steps import Session, Steps
from ..helpers.waiting import Seen, asleep, eventually

INSERT = "INSERT INTO notifyq.task (type) VALUES ('Note')"
LEFT = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"


class Note(notifyq.Task):
    pass


def noting(seen: Seen) -> notifyq.App:
    app = notifyq.App()

    @app.handler
    async def note(task: Note, ctx: notifyq.Context) -> None:
        seen.add(ctx.id)

    return app


@pytest.fixture
async def p(s: Steps) -> Session:
    return await s.session("producer")


async def test_it_depends_on_whether_a_worker_sleeps(dsn: str, s: Steps, p: Session) -> None:
    """A transaction that has enqueued while no worker sleeps can be prepared; while one does, it is refused, and rolled
    back."""
    await p("BEGIN")
    await p(INSERT)
    await p("PREPARE TRANSACTION 'awake'")
    await p("ROLLBACK PREPARED 'awake'")
    async with working(noting(Seen()), dsn):
        await asleep(s.db)
        await p("BEGIN")
        await p(INSERT)
        with pytest.raises(asyncpg.FeatureNotSupportedError, match=r"cannot PREPARE .* LISTEN, UNLISTEN, or NOTIFY"):
            await p("PREPARE TRANSACTION 'asleep'")
    assert await s.db.fetchval(LEFT) == 0
    assert await s.db.fetchval("SELECT count(*) FROM notifyq.task") == 0


@pytest.mark.parametrize(
    "enqueue",
    [
        INSERT,
        "SELECT notifyq.enqueue('Note')",
        "SELECT notifyq.enqueue('Note', options => '{\"unique_key\": \"u\"}')",
        "SELECT notifyq.retry(notifyq.enqueue('Note', run_at => now() + interval '1 hour'))",
    ],
)
async def test_with_the_setting_it_is_prepared_and_runs(dsn: str, s: Steps, p: Session, enqueue: str) -> None:
    """It notifies no worker. A NOTIFY after COMMIT PREPARED wakes a worker at once; the poll is off here."""
    seen = Seen()
    async with working(noting(seen), dsn):
        await asleep(s.db)
        await p("BEGIN")
        await p("SET LOCAL notifyq.two_phase = on")
        await p(enqueue)
        await p("PREPARE TRANSACTION 'both'")
        await asleep(s.db)
        assert seen.items == []
        await p("COMMIT PREPARED 'both'")
        await p("NOTIFY notifyq")
        await seen.reach(1)


async def test_without_that_notify_the_poll_finds_it(dsn: str, s: Steps, p: Session) -> None:
    seen = Seen()
    async with working(noting(seen), dsn, poll_interval=0.5):
        await asleep(s.db)
        await p("BEGIN")
        await p("SET LOCAL notifyq.two_phase = on")
        await p(INSERT)
        await p("SELECT notifyq.cancel(0)")
        await p("PREPARE TRANSACTION 'polled'")
        await p("COMMIT PREPARED 'polled'")
        await seen.reach(1)


async def test_the_setting_ends_with_the_transaction(dsn: str, s: Steps, p: Session) -> None:
    """The next transaction of that session rings."""
    seen = Seen()
    async with working(noting(seen), dsn):
        await asleep(s.db)
        await p("BEGIN")
        await p("SET LOCAL notifyq.two_phase = on")
        await p("COMMIT")
        await p(INSERT)
        await seen.reach(1)


async def test_one_that_is_left_keeps_workers_awake_and_loses_nothing(dsn: str, s: Steps, p: Session) -> None:
    """Workers poll, as they do beside any open transaction that has enqueued: a committed task runs at once."""
    await p("BEGIN")
    await p(INSERT)
    await p("PREPARE TRANSACTION 'left'")
    seen = Seen()
    async with working(noting(seen), dsn):
        for count in (1, 2, 3):
            await p(INSERT)
            await seen.reach(count)
        assert not await s.db.fetchval("SELECT notifyq.fall_asleep(1)")
        await p("COMMIT PREPARED 'left'")
        await seen.reach(4)
        await eventually(lambda: s.db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
