"""The bell under a worker that sleeps: DDL, VACUUM, TRUNCATE, strangers, and settings of the database."""

from __future__ import annotations

import anyio
import pytest

import notifyq

from ..helpers.running import working
from ..helpers.steps import Session, Steps
from ..helpers.verbs import OVERDUE, cancel, insert, states
from ..helpers.waiting import Seen, asleep, eventually
from .test_interleavings_bell import SOON

# --- With a worker


class Known(notifyq.Task):
    pass


class Work:
    """An app whose handler notes what it runs."""

    def __init__(self) -> None:
        self.app, self.seen = notifyq.App(), Seen()
        self.release: anyio.Event | None = None

        @self.app.handler
        async def known(_: Known, ctx: notifyq.Context) -> None:
            self.seen.add(ctx.id)
            if self.release is not None:
                await self.release.wait()


@pytest.fixture
def work() -> Work:
    return Work()


async def sleeper(s: Steps) -> int:
    """The backend of the worker that sleeps at the bell."""
    await asleep(s.db)
    return int(
        await s.db.fetchval("SELECT pid FROM pg_locks WHERE relation = 'notifyq.bell'::regclass AND mode = 'ShareLock'")
    )


@pytest.mark.parametrize(
    "ddl",
    [
        "VACUUM notifyq.bell",
        "ALTER TABLE notifyq.bell ADD other integer",
        "DROP TABLE notifyq.bell",
    ],
)
async def test_ddl_on_the_bell_while_a_worker_sleeps(s: Steps, p: Session, work: Work, dsn: str, ddl: str) -> None:
    """The DDL waits for the sleeper, and no session waits for the DDL: enqueuers ring, and the worker runs their
    tasks."""
    async with working(work.app, dsn):
        waiting = await p.blocked_by(await sleeper(s), ddl)
        await insert(s.db)
        await work.seen.reach(1, SOON)
        assert not waiting.over
        await waiting.cancelled()
        await p("SELECT 1")  # waits until the server has heard of it: once no worker sleeps, the bell would be dropped


async def test_vacuum_has_the_bell_while_a_worker_wants_to_sleep(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """Enqueuers don't ring, and the worker can't sleep: it looks for tasks now and then."""
    await p("BEGIN")
    await p("LOCK TABLE notifyq.bell IN SHARE UPDATE EXCLUSIVE MODE")
    async with working(work.app, dsn):
        for n in range(3):
            await insert(s.db)
            await work.seen.reach(n + 1, SOON)


@pytest.mark.parametrize(
    "how", ["ALTER TABLE notifyq.task DISABLE TRIGGER ring", "SET session_replication_role = replica"]
)
async def test_a_trigger_that_does_not_fire(s: Steps, p: Session, work: Work, dsn: str, how: str) -> None:
    """No enqueuer rings, though a worker sleeps: the fallback poll finds the task."""
    await p(how)
    async with working(work.app, dsn, poll_interval=0.2):
        await asleep(s.db)
        await p(insert)
        await work.seen.reach(1, SOON)
    await p("ALTER TABLE notifyq.task ENABLE TRIGGER ring")


async def test_truncate_under_a_worker_that_sleeps_and_holds_tasks(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """The tasks that it held are gone: it settles none of them, and the next task is rung for and run."""
    work.release = anyio.Event()
    async with working(work.app, dsn):
        await p(insert, 3)
        await work.seen.reach(3, SOON)
        await asleep(s.db)
        await p("TRUNCATE notifyq.task")
        work.release.set()
        [id] = await p(insert)
        assert (await work.seen.reach(4, SOON))[3] == id
    assert await states(s.db) == {id: ("done", 1)}


async def test_a_stranger_who_listens_in_a_transaction(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """The stranger keeps the queue of notifications from being emptied, but keeps no worker from hearing the bell."""
    await p("LISTEN notifyq")
    await p("BEGIN")
    await p("SELECT 1")
    async with working(work.app, dsn):
        for n in range(3):
            await asleep(s.db)
            await insert(s.db)
            await work.seen.reach(n + 1, SOON)


async def test_a_person_puts_a_task_forward(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """UPDATE OF run_at in a transaction that stays open while the worker has looked and slept again: the task runs at
    its commit."""
    [id] = await insert(s.db, run_at="2999-01-01")
    async with working(work.app, dsn):
        await asleep(s.db)
        await p("BEGIN")
        await p("UPDATE notifyq.task SET run_at = now() WHERE id = $1", id)
        [other] = await insert(s.db)
        await work.seen.reach(1, SOON)
        await asleep(s.db)
        await p("COMMIT")
        assert await work.seen.reach(2, SOON) == [other, id]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_a_database_whose_default_is_strict(s: Steps, work: Work, dsn: str, level: str) -> None:
    """A worker sleeps in a database whose default isolation is another: it holds no snapshot, or vacuum would remove
    nothing."""
    name = await s.db.fetchval("SELECT current_database()")
    await s.db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    try:
        async with working(work.app, dsn):
            pid = await sleeper(s)
            held = "SELECT backend_xmin IS NULL AND backend_xid IS NULL FROM pg_stat_activity WHERE pid = $1"
            assert await s.db.fetchval(held, pid)
    finally:
        await s.db.execute(f"ALTER DATABASE {name} RESET ALL")


@pytest.mark.parametrize("state", ["ready", "overdue"])
async def test_a_row_lock_that_is_given_up(s: Steps, p: Session, work: Work, dsn: str, state: str) -> None:
    """Claim and promotion during a cancel that is rolled back: no ring tells of that, and the worker sleeps."""
    [id] = await insert(s.db, **(OVERDUE if state == "overdue" else {}))
    await p("BEGIN")
    await p(cancel, id)
    async with working(work.app, dsn):
        await asleep(s.db)
        quiet = """SELECT bool_and(clock_timestamp() - state_change > interval '0.3 s') FROM pg_stat_activity
                   WHERE application_name LIKE 'notifyq claims %' AND datname = current_database()"""
        await eventually(lambda: s.db.fetchval(quiet))
        await p("ROLLBACK")
        assert await work.seen.reach(1, SOON) == [id]
