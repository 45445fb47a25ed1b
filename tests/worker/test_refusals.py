"""Outcomes that PostgreSQL refuses. The others of their batch are written at once. A refused outcome is written in a
smaller form, or later, after a pause. And `errors` is bounded."""

from __future__ import annotations

import json
import re
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection
from notifyq.worker import heartbeat, maintenance, unwritten
from notifyq.worker import worker as worker_stages
from notifyq.worker.outcome import Finished, Outcome
from notifyq.worker.outcome_writer import OutcomeWriter

from ..helpers.databases import Sessions
from ..helpers.logs import Logged, ids_of
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow


class Good(notifyq.Task):
    pass


class Bad(notifyq.Task):
    how: str = "return"
    max_attempts = 3
    backoff = 0.01


class Bench:
    def __init__(self) -> None:
        self.app = notifyq.App()
        self.ran = Seen()
        self.wait = anyio.Event()

        @self.app.handler
        async def good(task: Good) -> None:
            self.ran.add("good")

        @self.app.handler
        async def bad(task: Bad) -> object:
            self.ran.add("bad")
            if task.how == "wait":
                await self.wait.wait()
            if task.how == "raise":
                raise ValueError("no")
            if task.how == "cancel":
                return notifyq.Cancel("enough")
            return {"a": 1}


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def insert(db: Any, type: str, count: int = 1, **payload: Any) -> list[int]:
    many = "INSERT INTO notifyq.task (type, payload) SELECT $1, $2 FROM generate_series(1, $3::integer) RETURNING id"
    return [row[0] for row in await db.fetch(many, type, json.dumps(payload).encode(), count)]


async def states(db: Any) -> dict[tuple[str, str], int]:
    rows = await db.fetch("SELECT type, state, count(*) FROM notifyq.all_tasks GROUP BY 1, 2")
    return {(row[0], row[1]): row[2] for row in rows}


def trigger(on: str, when: str, code: str = "P0001", events: str = "INSERT OR UPDATE OR DELETE") -> str:
    return f"""
        CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'the auditors say no' USING ERRCODE = '{code}'; END $$;
        CREATE TRIGGER no BEFORE {events} ON notifyq.{on} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION public.no()"""


HOW = {
    "a check": ("ALTER TABLE notifyq.finished ADD CONSTRAINT no CHECK (type <> 'Bad')", "DROP CONSTRAINT no"),
    "a column": (
        (
            "ALTER TABLE notifyq.finished ADD COLUMN who text;"
            "CREATE FUNCTION public.who() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.type = 'Good' THEN NEW.who := 'me'; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER who BEFORE INSERT ON notifyq.finished FOR EACH ROW EXECUTE FUNCTION public.who();"
            "ALTER TABLE notifyq.finished ALTER who SET NOT NULL"
        ),
        "ALTER who DROP NOT NULL",
    ),
    "a trigger": (trigger("finished", "NEW.type = 'Bad'", events="INSERT"), "DISABLE TRIGGER no"),
    "a trigger with a state of its own": (
        trigger("finished", "NEW.type = 'Bad'", "AB123", "INSERT"),
        "DISABLE TRIGGER no",
    ),
    "a trigger that misses its table": (
        """CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF NEW.type = 'Bad' THEN INSERT INTO public.audit VALUES (NEW.id); END IF; RETURN NEW; END $$;
           CREATE TRIGGER no BEFORE INSERT ON notifyq.finished FOR EACH ROW EXECUTE FUNCTION public.no()""",
        "DISABLE TRIGGER no",
    ),
}


@pytest.mark.parametrize("how", HOW)
async def test_the_others_are_written_at_once(
    bench: Bench, db: Any, dsn: str, how: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refused outcomes are written as they were decided, once nothing is in their way. Their tasks ran once, their
    leases are held meanwhile, one log line names all of them, and there is a pause before each try."""
    refuse, relent = HOW[how]
    monkeypatch.setattr(unwritten, "PAUSE_LEAST", 0.5)
    tries: list[int] = []
    write = OutcomeWriter.write

    async def counted(self: Any, conn: Any, batch: list[Outcome], seconds: float) -> Any:
        tries.append(len(batch))
        return await write(self, conn, batch, seconds)

    monkeypatch.setattr(OutcomeWriter, "write", counted)
    await db.execute(refuse)
    await insert(db, "Good", 40)
    bad = await insert(db, "Bad", 2)
    await insert(db, "Good", 40)
    async with working(bench.app, dsn):
        await eventually(lambda: states(db), {("Good", "done"): 80, ("Bad", "running"): 2})
        before = len(tries)
        await insert(db, "Good", 5)
        await eventually(lambda: states(db), {("Good", "done"): 85, ("Bad", "running"): 2})
        assert len(tries) - before < 40, "each is tried in a few forms, and then after a pause"
        await eventually(
            lambda: db.fetchval("SELECT status FROM notifyq.worker"), "PostgreSQL refuses the outcomes of 2 tasks"
        )
        # A claimer that reconnects takes back tasks that the worker doesn't know of. It knows these.
        cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE application_name LIKE 'notifyq claims %' AND datname = current_database()"""
        assert len(await db.fetch(cut)) == 1
        await insert(db, "Good", 5)
        await eventually(lambda: states(db), {("Good", "done"): 90, ("Bad", "running"): 2})
        await db.execute(f"ALTER TABLE notifyq.finished {relent}")
        await eventually(lambda: states(db), {("Good", "done"): 90, ("Bad", "done"): 2})
        assert await db.fetchval("SELECT count(*) FROM notifyq.finished WHERE result = '{\"a\": 1}'") == 2
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), "ok")
    assert bench.ran.items.count("bad") == 2
    found = logged("can't be written in any form")
    assert [line["tasks"] for line in found] in ([2], [1, 1]), "once for each, or for both"
    assert ids_of(found) == bad
    assert all(line["error"] for line in found)
    assert sum(line["tasks"] for line in logged("are written now")) == 2


RETURNS = """
    CREATE FUNCTION public.audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN {}; END $$;
    CREATE TRIGGER audit BEFORE INSERT OR UPDATE OR DELETE ON notifyq.task FOR EACH ROW EXECUTE FUNCTION public.audit()
"""
MENDED = """
    CREATE OR REPLACE FUNCTION public.audit() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RETURN CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END; END $$
"""


async def test_a_trigger_that_keeps_a_row_and_says_nothing(
    bench: Bench, db: Any, dsn: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trigger returns NEW, which is NULL on DELETE. Each task runs once, and its outcome waits until the trigger is
    mended. An outcome of another kind, which the trigger lets through, is written at once."""
    monkeypatch.setattr(unwritten, "PAUSE_MOST", 0.5)
    monkeypatch.setattr(unwritten, "PAUSE_LEAST", 0.5)
    monkeypatch.setattr(maintenance.FIND_PROBLEMS, "every", 0.2)
    await db.execute(RETURNS.format("NEW"))
    bad = await insert(db, "Bad", 2)
    [failing] = await insert(db, "Bad", how="raise")
    status = "SELECT status FROM notifyq.worker"
    async with working(bench.app, dsn):
        said = "PostgreSQL refuses the outcomes of 3 tasks; trigger audit on notifyq.task"
        await eventually(lambda: db.fetchval(status), said)
        errors = "SELECT jsonb_array_length(errors) FROM notifyq.task WHERE id = $1"
        assert await db.fetchval(errors, failing) == 2, "the retries were written"
        await db.execute(MENDED)
        await eventually(lambda: states(db), {("Bad", "done"): 2, ("Bad", "dead"): 1})
        assert await db.fetchval("SELECT count(*) FROM notifyq.finished WHERE result = '{\"a\": 1}'") == 2
        await eventually(lambda: db.fetchval(status), "ok")
    assert bench.ran.items.count("bad") == 2 + 3
    found = logged("can't be written in any form")
    assert ids_of(found) == [*bad, failing], "each is said once"
    assert all("must return NEW, or OLD on DELETE" in line["error"] for line in found)
    assert logged("whose lease was lost") == []


async def test_a_locked_row_keeps_no_other(
    bench: Bench, db: Any, dsn: str, connect: Sessions, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's transaction has locked the row of a task that ends, and stays open. Only that outcome waits."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 3600.0)
    monkeypatch.setattr(unwritten, "PAUSE_LEAST", 0.1)
    other = await connect()
    [bad] = await insert(db, "Bad", how="wait")
    async with working(bench.app, dsn):
        await bench.ran.reach(1)
        async with other.transaction():
            await other.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", bad)
            bench.wait.set()
            await insert(db, "Good", 40)
            await eventually(lambda: states(db), {("Good", "done"): 40, ("Bad", "running"): 1})
            await eventually(
                lambda: db.fetchval("SELECT status FROM notifyq.worker"),
                "another session has locked 1 tasks that have ended",
            )
            await insert(db, "Good", 5)
            await eventually(lambda: states(db), {("Good", "done"): 45, ("Bad", "running"): 1})
        await eventually(lambda: states(db), {("Good", "done"): 45, ("Bad", "done"): 1})
    assert bench.ran.items.count("bad") == 1
    assert [line["ids"] for line in logged("has locked the rows of these tasks")] == [[bad]]
    assert [line["ids"] for line in logged("are written now")] == [[bad]]


async def test_a_stop_waits_for_a_locked_row(
    bench: Bench, db: Any, dsn: str, connect: Sessions, logged: Logged
) -> None:
    """It waits as long as for any outcome that isn't written yet."""
    other = await connect()
    [bad] = await insert(db, "Bad", how="wait")
    async with working(bench.app, dsn) as worker:
        await bench.ran.reach(1)
        async with other.transaction():
            await other.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", bad)
            bench.wait.set()
            with anyio.fail_after(limit()):
                while not logged("has locked the rows of these tasks"):
                    await anyio.sleep(0.02)
            worker.stop.set()
            await eventually(
                lambda: db.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'notifyq claims%'"
                ),
                0,
            )
        await worker.stopped()
    assert await states(db) == {("Bad", "done"): 1}
    assert bench.ran.items == ["bad"]


async def test_a_stop_waits_no_longer_for_a_locked_row(
    bench: Bench, db: Any, dsn: str, connect: Sessions, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row stays locked: the log counts its task once."""
    monkeypatch.setattr(worker_stages, "WRITE_SECONDS", 0.2)
    other = await connect()
    [bad] = await insert(db, "Bad", how="wait")
    async with other.transaction(), working(bench.app, dsn) as worker:
        await bench.ran.reach(1)
        await other.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", bad)
        bench.wait.set()
        with anyio.fail_after(limit()):
            while not logged("has locked the rows of these tasks"):
                await anyio.sleep(0.02)
        await worker.stopped()
    assert [line["tasks"] for line in logged("stopped with outcomes that could not be written")] == [1]


async def test_a_heartbeat_that_is_refused(
    bench: Bench, db: Any, dsn: str, quick_heart: None, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged once, however often it is tried, and once when it is over. The worker works on meanwhile."""
    tries = Seen()
    connect_worker = connection.connect_worker

    async def counted(*args: Any, **options: Any) -> Any:
        tries.add(1)
        return await connect_worker(*args, **options)

    async with working(bench.app, dsn):
        monkeypatch.setattr(heartbeat, "connect_worker", counted)
        await db.execute("ALTER TABLE notifyq.worker ADD CONSTRAINT no CHECK (id IS NULL) NOT VALID")
        with anyio.fail_after(limit()):
            while len(tries.items) < 6:
                await anyio.sleep(0.02)
        await insert(db, "Good", 3)
        await eventually(lambda: states(db), {("Good", "done"): 3})
        assert len(logged("heartbeat: PostgreSQL refuses it")) == 1
        assert not logged("heartbeat: the database is back")
        await db.execute("ALTER TABLE notifyq.worker DROP CONSTRAINT no")
        with anyio.fail_after(limit()):
            while not logged("heartbeat: the database is back"):
                await anyio.sleep(0.02)
    assert len(logged("heartbeat:")) == 2
    assert not logged("lost the database")


async def test_a_change_between_two_forms(
    bench: Bench, db: Any, dsn: str, connect: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses the outcome as it was decided once more. Then an ALTER TABLE, which waited for that statement,
    removes what was in its way. PostgreSQL would take the smaller form now, but the decided form is written."""
    refuse, relent = HOW["a check"]
    monkeypatch.setattr(unwritten, "PAUSE_LEAST", 0.1)
    write, other, refused = OutcomeWriter.write, await connect(), 0

    async def relenting(self: Any, conn: Any, batch: list[Outcome], seconds: float) -> Any:
        nonlocal refused
        try:
            return await write(self, conn, batch, seconds)
        except asyncpg.CheckViolationError:
            if isinstance(batch[0], Finished) and batch[0].state == "done":
                refused += 1
                if refused == 2:
                    await other.execute(f"ALTER TABLE notifyq.finished {relent}")
            raise

    monkeypatch.setattr(OutcomeWriter, "write", relenting)
    await db.execute(refuse)
    await insert(db, "Bad", 1)
    async with working(bench.app, dsn):
        await eventually(lambda: states(db), {("Bad", "done"): 1})
    assert refused == 2


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("return", "PostgreSQL can't store its outcome: .*the auditors say no"),
        ("raise", r"ValueError: no \(PostgreSQL can't store its outcome: .*the auditors say no\)"),
    ],
)
async def test_in_a_smaller_form(bench: Bench, db: Any, dsn: str, how: str, ends: str, logged: Logged) -> None:
    """A result is refused, and so are tracebacks: the task is dead at once, with the reason."""
    await db.execute(
        trigger(
            "finished",
            "NEW.type = 'Bad' AND (NEW.result IS NOT NULL OR NEW.errors::text ~ 'Traceback')",
            events="INSERT",
        )
    )
    await insert(db, "Good", 3)
    (id,) = await insert(db, "Bad", how=how)
    await db.execute("UPDATE notifyq.task SET max_attempts = 1 WHERE id = $1", id)
    async with working(bench.app, dsn):
        await eventually(lambda: states(db), {("Good", "done"): 3, ("Bad", "dead"): 1})
    error = await db.fetchval("SELECT error FROM notifyq.all_tasks WHERE id = $1", id)
    assert re.search(ends, error), error
    (line,) = logged("less of them is written")
    assert line["ids"] == [id]
    assert bench.ran.items.count("bad") == 1


async def test_a_retry_that_is_refused(bench: Bench, db: Any, dsn: str) -> None:
    """The errors can't grow any more: those of earlier attempts are left out, and the task is tried again."""
    await db.execute(
        trigger("task", "jsonb_array_length(NEW.errors) > 1 AND NOT NEW.errors -> 0 ? 'left_out'", "54000", "UPDATE")
    )
    await insert(db, "Good", 3)
    (id,) = await insert(db, "Bad", how="raise")
    async with working(bench.app, dsn):
        await eventually(lambda: states(db), {("Good", "done"): 3, ("Bad", "dead"): 1})
    row = await db.fetchrow("SELECT attempts, errors FROM notifyq.all_tasks WHERE id = $1", id)
    assert row["attempts"] == 3
    first, second, third = json.loads(row["errors"])
    assert first["left_out"] == 1
    assert (second["attempt"], third["attempt"]) == (2, 3)


async def test_a_hand_back_that_is_refused_does_not_hold_up_a_stop(
    bench: Bench, db: Any, dsn: str, logged: Logged
) -> None:
    """It is tried again for as long as a stop waits for outcomes, and logged."""
    (id,) = await insert(db, "Bad", how="wait")
    async with working(bench.app, dsn, shutdown_timeout=0.1) as worker:
        await bench.ran.reach(1)
        await db.execute(trigger("task", "OLD.type = 'Bad'", events="UPDATE"))
        worker.stop.set()
        with anyio.fail_after(limit()):
            await worker.done.wait()
    assert await db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", id) == "running"
    assert logged("stopped with outcomes that could not be written")[0]["tasks"] == 1


async def test_a_stop_tries_postponed_outcomes_once_more(
    bench: Bench, db: Any, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unwritten, "PAUSE_LEAST", 3600.0)
    await db.execute("ALTER TABLE notifyq.finished ADD CONSTRAINT no CHECK (type <> 'Bad')")
    await insert(db, "Bad")
    async with working(bench.app, dsn):
        status = "PostgreSQL refuses the outcomes of 1 tasks"
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), status)
        await db.execute("ALTER TABLE notifyq.finished DROP CONSTRAINT no")
    assert await states(db) == {("Bad", "done"): 1}


async def test_too_many_postponed_outcomes_stop_the_claims(
    bench: Bench, db: Any, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postponed outcomes are held in memory, so there is a limit."""
    monkeypatch.setattr(unwritten, "MOST_POSTPONED", 2)
    await db.execute("ALTER TABLE notifyq.finished ADD CONSTRAINT no CHECK (type <> 'Bad')")
    await insert(db, "Bad", 3)
    async with working(bench.app, dsn):
        status = "PostgreSQL refuses the outcomes of 3 tasks"
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), status)
        await insert(db, "Good")
        await eventually(lambda: db.fetchval("SELECT seen_at > (SELECT max(created_at) FROM notifyq.task) "
                                             "FROM notifyq.worker"), True)  # fmt: skip
        assert await states(db) == {("Bad", "running"): 3, ("Good", "ready"): 1}
        await db.execute("ALTER TABLE notifyq.finished DROP CONSTRAINT no")
        await eventually(lambda: states(db), {("Bad", "done"): 3, ("Good", "done"): 1})


async def test_a_drain_ends_though_an_outcome_is_refused(bench: Bench, db: Any, dsn: str) -> None:
    await db.execute("ALTER TABLE notifyq.finished ADD CONSTRAINT no CHECK (type <> 'Bad')")
    await insert(db, "Bad")
    await insert(db, "Good", 3)
    with anyio.fail_after(limit()):
        await bench.app.run_worker(dsn=dsn, drain=True)
    assert (await states(db))["Good", "done"] == 3
    assert bench.ran.items.count("bad") == 1
