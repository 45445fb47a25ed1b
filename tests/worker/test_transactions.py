"""`ctx.transaction()`: what a handler wrote and that its task is done, both or neither, whatever comes between."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import anyio
import asyncpg
import asyncpg.transaction
import pytest

import notifyq
from notifyq.errors import ConfigError, LeaseLost
from notifyq.worker import heartbeat

from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.processes import Process, Story
from ..helpers.rows import ended, errors, state
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

LEDGER = "CREATE TABLE ledger (task bigint, attempt integer)"
# COMMIT waits for the session that has this lock.
SLOW_COMMIT = """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON ledger DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait()"""

# A worker that asks what became of a transaction.
ASKS = "application_name = 'notifyq handler''s commit' AND datname = current_database()"


class Book(notifyq.Task):
    max_attempts = 3
    backoff = 0.0


class BookSoon(notifyq.Task):
    max_attempts = 1
    timeout = 0.5  # long enough to come to its commit


Inside = Callable[[notifyq.Context, Any], Awaitable[Any]]


async def nothing(ctx: notifyq.Context, conn: Any) -> None:
    pass


class Books:
    """An app whose handler books its task, and does what the test says inside of the block and after it."""

    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.inside: Inside = nothing
        self.after: Inside = nothing
        self.isolation: Any = None
        self.raised = Seen()  # out of the block
        self.over = Seen()  # of those that got to the block's end

        async def run(ctx: notifyq.Context) -> object:
            try:
                async with ctx.transaction(isolation=self.isolation) as conn:
                    await conn.execute("INSERT INTO ledger VALUES ($1, $2)", ctx.id, ctx.attempt)
                    await self.inside(ctx, conn)
            except BaseException as error:
                self.raised.add(error)
                raise
            self.over.add(ctx.attempt)
            return await self.after(ctx, None)

        @app.handler
        async def book(task: Book, ctx: notifyq.Context) -> object:
            return await run(ctx)

        @app.handler
        async def book_soon(task: BookSoon, ctx: notifyq.Context) -> object:
            return await run(ctx)


@pytest.fixture
async def books(dsn: str, db: Any) -> AsyncIterator[Books]:
    await db.execute(LEDGER)
    books = Books()
    async with books.app.connect(dsn):
        yield books
    with suppress(asyncpg.PostgresError, asyncpg.InterfaceError):  # without the table, the database serves other tests
        await db.execute("SET lock_timeout = '1s'; DROP TABLE ledger")


async def booked(books: Books, db: Any, dsn: str) -> int:
    """Run one Book in a worker until it is done. Returns its id."""
    async with working(books.app, dsn):
        ref = await books.app.enqueue(Book())
        await ended(db, ref.id, "done")
    return ref.id


async def ledger(db: Any, id: int) -> list[int]:
    """The attempts that are written."""
    return [row[0] for row in await db.fetch("SELECT attempt FROM ledger WHERE task = $1 ORDER BY attempt", id)]


@asynccontextmanager
async def slow_commit(db: Any, connect: Any) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Inside, the COMMIT of a ledger entry waits. `await waiting()` is the pid of a backend that waits so."""
    await db.execute(SLOW_COMMIT)
    holder = await connect()
    await holder.execute("SELECT pg_advisory_lock(7)")
    query = """SELECT pid FROM pg_stat_activity
               WHERE wait_event = 'advisory' AND query LIKE 'COMMIT%' AND datname = current_database()"""

    async def waiting() -> int:
        await eventually(lambda: db.fetchval(f"SELECT count(*) FROM ({query}) q"), 1)
        return int(await db.fetchval(query))

    yield waiting
    await holder.execute("SELECT pg_advisory_unlock_all()")


@pytest.mark.parametrize("history", [86400.0, 0.0])
async def test_both_are_committed_and_what_comes_after_does_not_count(
    books: Books, db: Any, dsn: str, logged: Logged, history: float
) -> None:
    async def after(ctx: notifyq.Context, _: Any) -> str:
        if ctx.priority:
            raise ValueError("too late")
        return "a result"

    books.after = after
    returned, raised = await books.app.enqueue(Book()), await books.app.enqueue(Book(), priority=1)
    async with working(books.app, dsn, history=history, drain=True) as worker:
        await worker.done.wait()
    for ref in (returned, raised):
        assert await ledger(db, ref.id) == [1]
        if history:
            row = await ended(db, ref.id, "done")
            assert (row["attempts"], row["result"], row["errors"]) == (1, None, None)
            assert row["worker"]
            assert row["processed_at"] > row["processing_at"]
        else:
            assert await state(db, ref.id) is None
    said = logged("doesn't count")
    assert sorted(fields["after"] for fields in said) == ["ValueError: too late", "it returned something"]
    assert not logged("lease")
    assert not logged("task failed")


async def test_raising_inside_rolls_back_and_the_attempt_fails_as_usual(books: Books, db: Any, dsn: str) -> None:
    class Next(notifyq.Task):
        pass

    async def inside(ctx: notifyq.Context, conn: Any) -> None:
        await books.app.enqueue(Next(), conn=conn)
        if ctx.attempt == 1:
            raise ValueError("not this time")
        if ctx.attempt == 2:
            await conn.execute("SELECT 1 / 0")

    books.inside = inside
    id = await booked(books, db, dsn)
    assert await ledger(db, id) == [3]
    assert [e["error"] for e in await errors(db, id)] == [
        "ValueError: not this time",
        "DivisionByZeroError: division by zero",
    ]
    assert await db.fetchval("SELECT count(*) FROM notifyq.task WHERE type = 'Next'") == 1


async def test_a_trigger_that_keeps_the_row_and_says_nothing(books: Books, db: Any, dsn: str, connect: Any) -> None:
    """It returns NULL on DELETE. The lease isn't lost: the attempt fails, with the cause, and is tried again."""
    await db.execute(
        "CREATE FUNCTION public.audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;"
        "CREATE TRIGGER audit BEFORE DELETE ON notifyq.task FOR EACH ROW EXECUTE FUNCTION public.audit()"
    )

    person = await connect()  # `db` is the test's: a connection can do one thing at a time

    async def inside(ctx: notifyq.Context, conn: Any) -> None:
        if ctx.attempt == 2:
            await person.execute("DROP TRIGGER audit ON notifyq.task")

    books.inside = inside
    id = await booked(books, db, dsn)
    assert await ledger(db, id) == [2]
    [error] = await errors(db, id)
    assert "must return NEW, or OLD on DELETE" in error["error"]


async def test_an_error_that_is_swallowed_inside_fails_the_block(books: Books, db: Any, dsn: str) -> None:
    """PostgreSQL would turn the COMMIT into a ROLLBACK, and raise no error."""

    async def inside(ctx: notifyq.Context, conn: Any) -> None:
        if ctx.attempt == 1:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await conn.execute("SELECT 1 / 0")
        if ctx.attempt == 2:
            await conn.execute("ROLLBACK")

    books.inside = inside
    id = await booked(books, db, dsn)
    assert await ledger(db, id) == [3]
    failed, ended_inside = await errors(db, id)
    assert "InFailedSQLTransactionError" in failed["error"]
    assert "ended inside of its block" in ended_inside["error"]


async def test_one_block_a_handler(books: Books, db: Any, dsn: str) -> None:
    refused = Seen()

    async def second(ctx: notifyq.Context, _: Any) -> None:
        with pytest.raises(ConfigError, match=f"task {ctx.id} has a transaction already; a handler has one"):
            async with ctx.transaction() as conn:
                await conn.execute("INSERT INTO ledger VALUES ($1, 99)", ctx.id)
        refused.add(ctx.id)

    books.inside = books.after = second
    async with working(books.app, dsn):
        ref = await books.app.enqueue(Book())
        await refused.reach(2)
        await ended(db, ref.id, "done")
    assert await ledger(db, ref.id) == [1]


async def test_another_block_after_one_that_was_rolled_back(dsn: str, db: Any) -> None:
    await db.execute(LEDGER)
    app = notifyq.App()

    @app.handler
    async def book(task: Book, ctx: notifyq.Context) -> None:
        for number in (1, 2):
            try:
                async with ctx.transaction() as conn:
                    await conn.execute("INSERT INTO ledger VALUES ($1, $2)", ctx.id, number)
                    if number == 1:
                        raise ValueError("no")
            except ValueError:
                pass

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Book())
        await ended(db, ref.id, "done")
    assert await ledger(db, ref.id) == [2]


async def test_more_of_them_than_connections(books: Books, db: Any, dsn: str) -> None:
    async with working(books.app, dsn, concurrency=50):
        ids = await books.app.enqueue_many([Book() for _ in range(100)])
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), len(ids))
        pool = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'notifyq handler'"
        assert await db.fetchval(f"{pool} AND datname = current_database()") == 10
    assert await db.fetchval("SELECT count(*) = 100 AND count(DISTINCT task) = 100 FROM ledger")


async def test_outside_of_a_worker() -> None:
    ctx = notifyq.Context(id=1, queue="q", attempt=1, max_attempts=1, priority=0, created_at=datetime.now(UTC))
    with pytest.raises(ConfigError, match="for handlers that a worker runs"):
        ctx.transaction()


async def test_from_a_handler_that_has_ended(books: Books, db: Any, dsn: str) -> None:
    contexts = Seen()

    async def after(ctx: notifyq.Context, _: Any) -> None:
        contexts.add((ctx, asyncio.get_running_loop().create_task(wait(ctx))))

    async def wait(ctx: notifyq.Context) -> None:
        await ended(db, ctx.id, "done")
        await gone.wait()
        ctx.transaction()

    books.after, gone = after, anyio.Event()
    async with working(books.app, dsn):
        await books.app.enqueue(Book())
        ((_, left),) = await contexts.reach(1)
        await books.over.reach(1)
    gone.set()
    with pytest.raises(ConfigError, match="doesn't run here"):
        await left


# The lease.


@pytest.mark.parametrize("by", ["cancel", "rescue", "rescue, and done"])
async def test_a_lease_lost_in_the_middle(books: Books, db: Any, dsn: str, by: str) -> None:
    """The task is cancelled, or another worker takes it, and runs it or has settled it when this worker's block
    ends."""
    inside, taken, go_on, others_go_on = Seen(), Seen(), anyio.Event(), anyio.Event()
    other = Books()

    async def wait(ctx: notifyq.Context, _: Any) -> None:
        inside.add(ctx.id)
        await go_on.wait()

    async def wait_there(ctx: notifyq.Context, _: Any) -> None:
        taken.add(ctx.id)
        await others_go_on.wait()

    async def lost() -> None:
        go_on.set()
        (error,) = await books.raised.reach(1)
        assert isinstance(error, LeaseLost)

    books.inside, other.inside = wait, wait_there
    async with working(books.app, dsn, concurrency=1):
        ref = await books.app.enqueue(Book())
        await inside.reach(1)
        if by == "cancel":
            assert await db.fetchval("SELECT notifyq.cancel($1)", ref.id)
            await lost()
        else:
            async with working(other.app, dsn):
                # What rescue.sql does with what a dead worker held. The first one has no slot for it.
                await db.execute("UPDATE notifyq.task SET worker = NULL, run_at = run_at WHERE id = $1", ref.id)
                await taken.reach(1)
                if by == "rescue":
                    await lost()
                others_go_on.set()
                await ended(db, ref.id, "done")
                await lost()
    assert await ledger(db, ref.id) == ([] if by == "cancel" else [2])
    assert await state(db, ref.id) == ("cancelled" if by == "cancel" else "done")


async def test_the_heartbeat_leaves_a_handler_alone_that_has_settled_itself(
    books: Books, db: Any, dsn: str, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """Its lease is gone, since it's done."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "ASK_SECONDS", 0.02)
    ended_well = Seen()

    async def after(ctx: notifyq.Context, _: Any) -> None:
        seen = await db.fetchval("SELECT seen_at FROM notifyq.worker")
        await eventually(
            lambda: db.fetchval("SELECT seen_at > $1::timestamptz + interval '0.2 s' FROM notifyq.worker", seen)
        )
        ended_well.add(ctx.id)

    books.after = after
    async with working(books.app, dsn):
        await books.app.enqueue(Book())
        await ended_well.reach(1)
    assert not logged("lease")


async def test_serialization_failures(books: Books, db: Any, dsn: str) -> None:
    """Two handlers read what the other writes: one commits, the other runs again."""
    both = anyio.Event()
    read: list[int] = []

    async def inside(ctx: notifyq.Context, conn: Any) -> None:
        await conn.fetchval("SELECT count(*) FROM ledger")
        read.append(ctx.id)
        if len(read) == 2:
            both.set()
        await both.wait()

    books.inside, books.isolation = inside, "serializable"
    async with working(books.app, dsn):
        ids = await books.app.enqueue_many([Book(), Book()])
        for id in ids:
            await ended(db, id, "done")
    assert sorted([*await ledger(db, ids[0]), *await ledger(db, ids[1])]) == [1, 2]
    assert len(read) == 3
    ((error,),) = [found for id in ids if (found := await errors(db, id))]
    assert error["error"].startswith("SerializationError")


# Cut short.


async def test_a_timeout_inside(books: Books, db: Any, dsn: str) -> None:
    async def inside(ctx: notifyq.Context, conn: Any) -> None:
        await conn.execute("SELECT pg_sleep(60)")

    books.inside = inside
    async with working(books.app, dsn):
        ref = await books.app.enqueue(BookSoon())
        row = await ended(db, ref.id, "dead")
        assert row["error"] == "timed out after 0.5 s"
        await eventually(
            lambda: db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query ~ '^SELECT pg_sleep'"), 0
        )
    assert await ledger(db, ref.id) == []


@pytest.mark.parametrize("how", ["timeout", "asyncio.timeout", "force", "cancel"])
async def test_cut_short_while_it_commits(
    books: Books, db: Any, dsn: str, connect: Any, logged: Logged, how: str
) -> None:
    """The commit is waited for, and counts."""
    books.after = lambda ctx, conn: anyio.sleep(60)
    tasks = Seen()

    async def inside(ctx: notifyq.Context, conn: Any) -> None:
        tasks.add(asyncio.current_task())

    books.inside = inside
    async with working(books.app, dsn) as worker, anyio.create_task_group() as group:
        cancelled = Seen()
        async with slow_commit(db, connect) as waiting:
            ref = await books.app.enqueue(BookSoon() if how == "timeout" else Book())
            await waiting()
            if how == "timeout":
                await anyio.sleep(BookSoon.timeout)
            elif how == "asyncio.timeout":
                tasks.items[0].cancel()  # as that does: no scope of anyio's keeps it away
                await eventually(lambda: db.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {ASKS}"), 1)
            elif how == "force":
                worker.force.set()
                with anyio.fail_after(limit()):
                    while not logged("stopping now"):
                        await anyio.sleep(0.01)
            else:
                other = await connect()

                async def cancel() -> None:
                    cancelled.add(await other.fetchval("SELECT notifyq.cancel($1)", ref.id))

                group.start_soon(cancel)
                query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'transactionid'"
                await eventually(lambda: db.fetchval(query), 1)
        await ended(db, ref.id, "done")
        if how == "cancel":
            assert await cancelled.reach(1) == [False]
        worker.force.set()
    assert await ledger(db, ref.id) == [1]
    assert (await ended(db, ref.id, "done"))["errors"] is None
    assert not logged("lease")


# The connection.


async def test_the_connection_is_lost_while_it_commits(books: Books, db: Any, dsn: str, connect: Any) -> None:
    """The server ended it, and rolls back: the task runs again."""
    async with working(books.app, dsn):
        async with slow_commit(db, connect) as waiting:
            ref = await books.app.enqueue(Book())
            await db.execute("SELECT pg_terminate_backend($1)", await waiting())
            (error,) = await books.raised.reach(1)
            assert isinstance(error, (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)), error
        await ended(db, ref.id, "done")
    assert await ledger(db, ref.id) == [2]


@pytest.mark.parametrize("then", ["the block ends", "a statement"])
async def test_the_connection_is_lost_between_statements(
    books: Books, db: Any, dsn: str, connect: Any, then: str
) -> None:
    """The task's error says so. asyncpg's own would say that the handler has released the connection."""

    other = await connect()

    async def lose(ctx: notifyq.Context, conn: Any) -> None:
        if ctx.attempt > 1:
            return
        await other.execute("SELECT pg_terminate_backend($1, 5000)", conn.get_server_pid())
        with anyio.fail_after(limit()):
            while conn._con is not None:  # the pool takes it back
                await asyncio.sleep(0.001)
        if then == "a statement":
            await conn.execute("SELECT 1")

    books.inside = lose
    async with working(books.app, dsn):
        ref = await books.app.enqueue(Book())
        await ended(db, ref.id, "done")
    (error,) = await errors(db, ref.id)
    said = (
        f"DatabaseError: task {ref.id}: the connection of its transaction was lost, so the transaction is rolled back"
    )
    assert error["error"] == said
    assert await ledger(db, ref.id) == [2]


@pytest.mark.parametrize("when", ["while", "after"])
async def test_the_answer_to_commit_is_lost(
    books: Books, db: Any, dsn: str, connect: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The connection is cut while it commits, or before the answer: the commit has happened, once."""
    commit = asyncpg.transaction.Transaction.commit
    cut = anyio.Event()

    async def cut_off(self: Any) -> None:
        if when == "after":
            await commit(self)
            self._connection.terminate()
            raise ConnectionResetError("cut")
        async with anyio.create_task_group() as group:
            group.start_soon(commit, self)
            await cut.wait()
            self._connection.terminate()

    monkeypatch.setattr(asyncpg.transaction.Transaction, "commit", cut_off)
    async with working(books.app, dsn):
        async with slow_commit(db, connect) as waiting:
            if when == "after":
                await db.execute("DROP TRIGGER wait ON ledger")
            ref = await books.app.enqueue(Book())
            if when == "while":
                await waiting()
                cut.set()
                await eventually(lambda: db.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {ASKS}"), 1)
                assert not books.over.items, "it is in progress, so its end is unknown"
        await books.over.reach(1)
        await ended(db, ref.id, "done")
    assert not books.raised.items
    assert await ledger(db, ref.id) == [1]


# Kills.


@pytest.mark.slow
async def test_killed_at_random_each_has_happened_once(db: Any, dsn: str, spawn: Callable[..., Process]) -> None:
    """Two of three workers are killed, one after the other, with tasks at every step."""
    await db.execute(LEDGER)
    stories = [Story(spawn("concurrency=20")) for _ in range(3)]
    for story in stories:
        await story.reach(1, "started")
    await db.execute("INSERT INTO notifyq.task (type) SELECT 'Book' FROM generate_series(1, 2000)")
    for story in stories[:2]:
        await story.reach(100, "booked")
        await anyio.sleep(random.uniform(0, 0.1))
        story.process.signal(signal.SIGKILL)
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'"), 2000, 60)
    counts = await db.fetchrow("SELECT count(*), count(DISTINCT task), count(*) FILTER (WHERE attempt > 1) FROM ledger")
    assert tuple(counts)[:2] == (2000, 2000)
    assert counts[2] > 0, "some ran again"
    wrong = "SELECT count(*) FROM ledger l JOIN notifyq.finished f ON f.id = l.task WHERE f.attempts <> l.attempt"
    assert await db.fetchval(wrong) == 0, "what is written is of the run that settled it"
