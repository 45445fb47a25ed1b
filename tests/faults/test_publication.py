"""A publication FOR ALL TABLES, as Debezium and upgrades by logical replication make, hinders nothing.

In a publication, PostgreSQL refuses to update or delete rows of a table that has no key to tell them by.
"""

from __future__ import annotations

from typing import Any

import pytest

import notifyq
from notifyq.database.connection import SQL
from notifyq.worker import maintenance, outages

from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.verbs import insert
from ..helpers.waiting import Seen, eventually

WITHOUT_KEY = """
    SELECT c.relname::text FROM pg_class c
    WHERE c.relnamespace = 'notifyq'::regnamespace AND c.relkind IN ('r', 'p') AND c.relname <> 'bell'
      AND c.relreplident <> 'f' AND NOT EXISTS (
          SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid
            AND (i.indisprimary AND c.relreplident = 'd' OR i.indisreplident))
    ORDER BY c.relname"""

PUBLISH = "CREATE PUBLICATION everything FOR ALL TABLES"


class Note(notifyq.Task):
    text: str


def noting(seen: Seen) -> notifyq.App:
    app = notifyq.App()

    @app.cron("* * * * * *", task=Note("cron"))
    @app.handler
    async def note(task: Note, ctx: notifyq.Context) -> str:
        seen.add(task.text)
        if task.text == "retried" and ctx.attempt == 1:
            raise notifyq.Retry(delay=0)
        await ctx.progress(0.5, "half")
        return task.text

    return app


async def test_every_table_but_the_bell_has_a_key(db: Any) -> None:
    """The bell never has a row: only its lock is used."""
    assert [row[0] for row in await db.fetch(WITHOUT_KEY)] == []
    await db.execute("CREATE TABLE notifyq.another (n integer)")
    assert [row[0] for row in await db.fetch(WITHOUT_KEY)] == ["another"], "a table without a key is found"


@pytest.mark.usefixtures("quick_heart")
async def test_tasks_of_every_kind_run(dsn: str, db: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are plain, retried, limited, rated, ordered, waiting, unique, of a limited queue, and a cron's; and history
    is pruned."""
    for chore in maintenance.PRUNING:
        monkeypatch.setattr(chore, "every", 0.5)
    await db.execute(PUBLISH)
    await db.execute("SELECT notifyq.limit_queue('default', 5, 1000, 1.0)")
    seen = Seen()
    app = noting(seen)
    async with app.connect(dsn), working(app, dsn, history=1.0):
        for text in ("plain", "retried"):
            await app.enqueue(Note(text))
        for number in range(3):
            await app.enqueue(Note(f"limited {number}"), limit_key="k", limit=1)
            await app.enqueue(Note(f"rated {number}"), limit_key="r", rate="2/s")
            await app.enqueue(Note(f"ordered {number}"), order_key="o")
            await app.enqueue(Note("unique"), unique="u", unique_for=3600)
        first = await app.enqueue(Note("first"), delay=0.5)
        await app.enqueue(Note("after"), after=[first])
        assert await first.result(timeout=limit()) == "first"
        later = await app.enqueue(Note("never"), delay=3600)
        assert await db.fetchval("SELECT notifyq.cancel($1)", later.id)
        assert await db.fetchval("SELECT notifyq.retry($1)", later.id) or True  # it may be pruned by now
        want = {
            *("plain", "retried", "unique", "first", "after", "cron"),
            *(f"{kind} {number}" for kind in ("limited", "rated", "ordered") for number in range(3)),
        }
        await eventually(lambda: _missing(seen, want), set())
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished WHERE id = $1", first.id), 0)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.rate_log WHERE key = 'limit:r'"), 0)
    assert seen.items.count("unique") == 1
    assert logged("refuses a chore") == []
    assert logged("lost the database") == []


async def _missing(seen: Seen, want: set[str]) -> set[str]:
    return want - set(seen.items)


@pytest.mark.usefixtures("quick_heart")
async def test_one_table_that_refuses_keeps_no_other_from_being_pruned(
    dsn: str, db: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is logged once, and its end once; the heartbeat keeps its connection."""
    for chore in maintenance.PRUNING:
        monkeypatch.setattr(chore, "every", 0.2)
    await db.execute(
        """CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$;
           CREATE TRIGGER no BEFORE DELETE ON notifyq.finished FOR EACH ROW EXECUTE FUNCTION no();
           INSERT INTO notifyq.rate_log VALUES ('limit:k', now() - interval '1 hour', 1, 1.0);
           INSERT INTO notifyq.unique_key VALUES ('u', 1, now() - interval '1 hour', now() - interval '1 hour')"""
    )
    await insert(db, 1)
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task")
    await db.execute("UPDATE notifyq.finished SET processed_at = now() - interval '2 days'")
    app = noting(Seen())
    session = (
        "SELECT count(*), min(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'notifyq heartbeat%' AND datname = current_database()"
    )
    async with working(app, dsn):
        before = await db.fetchrow(session)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.rate_log"), 0)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.unique_key"), 0)
        await eventually(lambda: _count(logged, "refuses a chore"), 1)
        assert logged("refuses a chore")[0]["chore"] == "prune notifyq.finished"
        assert "not today" in logged("refuses a chore")[0]["error"]
        await db.execute("DROP TRIGGER no ON notifyq.finished")
        await eventually(lambda: _count(logged, "accepts the chore again"), 1)
        assert await db.fetchval("SELECT count(*) FROM notifyq.finished WHERE type <> 'Note'") == 0
        assert await db.fetchrow(session) == before
    assert len(logged("refuses a chore")) == 1
    assert logged("out of reach") == []


async def _count(logged: Logged, text: str) -> int:
    return len(logged(text))


@pytest.mark.usefixtures("quick_heart")
async def test_one_cron_that_is_refused_keeps_no_other_back(dsn: str, db: Any, logged: Logged) -> None:
    """It keeps neither the heartbeat back, nor anything else of the worker."""
    await db.execute(
        """CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'none of these'; END $$;
           CREATE TRIGGER no BEFORE INSERT ON notifyq.task FOR EACH ROW WHEN (NEW.payload ->> 'text' = 'a')
           EXECUTE FUNCTION no()"""
    )
    seen = Seen()
    app = notifyq.App()

    @app.cron("* * * * * *", name="a", task=Note("a"))
    @app.cron("* * * * * *", name="b", task=Note("b"))
    @app.handler
    async def note(task: Note) -> None:
        seen.add(task.text)

    async with working(app, dsn):
        await seen.reach(3)
    assert set(seen.items) == {"b"}
    assert [fields["chore"] for fields in logged("refuses a chore")] == ["enqueue what crons are due for"]
    assert logged("out of reach") == []


def test_prune_is_a_statement_for_each_table() -> None:
    for name in ("prune_finished", "prune_rate_log", "prune_unique_keys"):
        assert len({word for word in SQL[name].split() if word.startswith("notifyq.")} - {"notifyq.task"}) == 1, name


@pytest.mark.usefixtures("quick_heart")
async def test_rows_that_nothing_identifies(dsn: str, db: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """REPLICA IDENTITY NOTHING: PostgreSQL refuses every claim. The worker logs that once, with the cure; when it is
    mended, all goes on."""
    tries = Seen()
    back_off = outages.Outages.back_off

    async def counted(self: Any, stage: str, error: BaseException) -> None:
        tries.add(stage)
        await back_off(self, stage, error)

    monkeypatch.setattr(outages.Outages, "back_off", counted)
    seen = Seen()
    app = noting(seen)
    async with app.connect(dsn), working(app, dsn):
        await db.execute(f"ALTER TABLE notifyq.task REPLICA IDENTITY NOTHING; {PUBLISH}")
        await app.enqueue(Note("late"))
        await tries.reach(4)
        status = "PostgreSQL refuses what this worker needs: see its log"
        await eventually(lambda: db.fetchval("SELECT status LIKE $1 FROM notifyq.worker", f"%{status}%"))
        await db.execute("DROP PUBLICATION everything")
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished WHERE result = '\"late\"'"), 1)
    refused = logged("PostgreSQL refuses what this worker needs")
    assert refused
    assert len(refused) == len({line["stage"] for line in refused})
    assert "REPLICA IDENTITY" in refused[0]["error"]
    assert not logged("lost the database")
    assert not logged("the database is back")
