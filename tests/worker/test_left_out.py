"""Tasks that PostgreSQL doesn't let be taken: the others run, and these as soon as nothing is in their way."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.database.connection import SQL
from notifyq.worker import left_out, maintenance
from notifyq.worker.job import claim
from notifyq.worker.left_out import NOT_TAKEN_BACK, LeftOut

from ..helpers.databases import Sessions
from ..helpers.logs import Logged, ids_of
from ..helpers.running import working
from ..helpers.verbs import insert, register, silent, unseen
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow


class Good(notifyq.Task):
    pass


class Bad(notifyq.Task):
    pass


class Bench:
    def __init__(self) -> None:
        self.app = notifyq.App()
        self.ran = Seen()

        @self.app.handler
        async def good(task: Good) -> None:
            self.ran.add("good")

        @self.app.handler
        async def bad(task: Bad) -> None:
            self.ran.add("bad")


HOW = {
    "a check": (
        "ALTER TABLE notifyq.task ADD CONSTRAINT no CHECK (type <> 'Bad') NOT VALID",
        "ALTER TABLE notifyq.task DROP CONSTRAINT no",
    ),
    "a trigger": (
        """CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN RAISE EXCEPTION 'the auditors say no'; END $$;
           CREATE TRIGGER no BEFORE UPDATE ON notifyq.task FOR EACH ROW WHEN (NEW.type = 'Bad')
           EXECUTE FUNCTION public.no()""",
        "DROP TRIGGER no ON notifyq.task",
    ),
}
# It raises nothing: the UPDATE returns a row, and the row stays as it was.
UNDOES = {
    "a trigger that undoes the claim": (
        """CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW := OLD; RETURN NEW; END $$;
           CREATE TRIGGER no BEFORE UPDATE ON notifyq.task FOR EACH ROW WHEN (NEW.type = 'Bad')
           EXECUTE FUNCTION public.no()""",
        "DROP TRIGGER no ON notifyq.task",
    ),
}
ASIDE: dict[str, dict[str, Any]] = {
    "ready": {},
    "due": {"created_at": "2000-01-01", "run_at": "2001-01-01"},
    "unhandled": {"withheld": True},
    "suspect": {"withheld": True, "parked": "crashed", "waiting_on": "crashed:default", "crashes": 2},
}
UNTAKEN = {"ready": "ready", "due": "scheduled", "unhandled": "ready", "suspect": "scheduled"}


async def states(db: Any) -> dict[tuple[str, str], int]:
    rows = await db.fetch("SELECT type, state, count(*) FROM notifyq.all_tasks GROUP BY 1, 2")
    return {(row[0], row[1]): row[2] for row in rows}


@pytest.mark.parametrize("how", HOW | UNDOES)
@pytest.mark.parametrize("state", ASIDE)
@pytest.mark.parametrize("drain", [False, True])
async def test_the_others_run(
    db: Any, dsn: str, how: str, state: str, drain: bool, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "PAUSE_MOST", 0.5)
    monkeypatch.setattr(left_out, "PAUSE_LEAST", 0.5)
    refuse, relent = (HOW | UNDOES)[how]
    bad = [*await insert(db, 3, type="Bad", **ASIDE[state])]
    good = [*await insert(db, 40, type="Good", **ASIDE[state])]
    bad += await insert(db, 2, type="Bad", **ASIDE[state])
    await db.execute(refuse)
    bench = Bench()
    if drain:
        await bench.app.run_worker(dsn=dsn, drain=True)
        assert bench.ran.items == ["good"] * len(good)
    else:
        async with working(bench.app, dsn):
            await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", UNTAKEN[state]): len(bad)})
            assert bench.ran.items == ["good"] * len(good)
            await eventually(
                lambda: db.fetchval("SELECT status FROM notifyq.worker"), "PostgreSQL doesn't let 5 tasks be taken"
            )
            await db.execute(relent)
            await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", "done"): len(bad)})
            await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), "ok")
        assert len(logged("no task is refused any more")) == 1
    found = logged("doesn't let these tasks be taken")
    assert ids_of(found) == bad, "each once"
    assert all("no" in line["error"] for line in found)
    assert not logged("lost the database")


async def test_a_crowd_of_refused_tasks_hides_no_other(db: Any, dsn: str) -> None:
    """A worker with one slot looks at one task at a time."""
    await insert(db, 30, type="Bad")
    await insert(db, 3, type="Good")
    await db.execute(HOW["a check"][0])
    bench = Bench()
    async with working(bench.app, dsn, concurrency=1):
        await eventually(lambda: states(db), {("Good", "done"): 3, ("Bad", "ready"): 30})


async def test_what_is_gone_is_forgotten(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "PAUSE_LEAST", 0.0)
    me = await register(db)
    await insert(db, 2, type="Bad")
    await db.execute(HOW["a check"][0])
    out = LeftOut()
    assert await out.claim(db, me, {"default": 5}, 5) == []
    assert out
    await db.execute("DELETE FROM notifyq.task")
    monkeypatch.setattr(left_out, "GONE_SECONDS", 0.0)
    assert await out.claim(db, me, {"default": 5}, 5) == []
    assert not out


async def test_there_is_an_end_to_what_is_left_out(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "MOST", 3)
    me = await register(db)
    await insert(db, 10, type="Bad")
    await db.execute(HOW["a check"][0])
    out = LeftOut()
    for _ in range(2):
        assert await out.claim(db, me, {"default": 10}, 10) == []
        assert len(out.ids) == 3


def refusal(when: str) -> str:
    return f"""CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN RAISE EXCEPTION 'the auditors say no'; END $$;
               CREATE TRIGGER no BEFORE UPDATE ON notifyq.task FOR EACH ROW WHEN ({when})
               EXECUTE FUNCTION public.no()"""


RELENT = "DROP TRIGGER no ON notifyq.task"
PARKED = "SELECT count(*) FROM notifyq.task WHERE parked IS NOT NULL"


class Hold(notifyq.Task):
    pass


def holding(bench: Bench) -> anyio.Event:
    """Have tasks of type Hold run until this is set."""
    release = anyio.Event()

    @bench.app.handler
    async def hold(task: Hold) -> None:
        await release.wait()

    return release


async def limited(db: Any, type: str, key: str, count: int = 1) -> list[int]:
    options = json.dumps({"limit_key": key, "limit_running": 1}).encode()
    many = "INSERT INTO notifyq.task (type, options) SELECT $1, $2 FROM generate_series(1, $3::integer) RETURNING id"
    return [row[0] for row in await db.fetch(many, type, options, count)]


async def test_tasks_that_cannot_be_parked(db: Any, dsn: str, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are claimed, and must wait for a slot of their key. They are handed back; all others go on."""
    monkeypatch.setattr(left_out, "PAUSE_MOST", 0.5)
    bench = Bench()
    release = holding(bench)
    await db.execute(refusal("NEW.parked IS NOT NULL AND NEW.type = 'Bad'"))
    async with working(bench.app, dsn):
        await limited(db, "Hold", "k")
        await eventually(lambda: states(db), {("Hold", "running"): 1})
        async with db.transaction():  # so that one claim takes all of them
            bad = await limited(db, "Bad", "k", 2)
            await limited(db, "Good", "j")
            await insert(db, 20, type="Good")
            bad += await limited(db, "Bad", "k", 1)
        await eventually(lambda: states(db), {("Hold", "running"): 1, ("Good", "done"): 21, ("Bad", "ready"): 3})
        await eventually(
            lambda: db.fetchval("SELECT status FROM notifyq.worker"), "PostgreSQL doesn't let 3 tasks be taken"
        )
        await db.execute(RELENT)
        await eventually(lambda: db.fetchval(PARKED), 3)
        release.set()
        await eventually(lambda: states(db), {("Hold", "done"): 1, ("Good", "done"): 21, ("Bad", "done"): 3})
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), "ok")
    found = logged("doesn't let these tasks be parked")
    assert ids_of(found) == bad, "each once"
    assert all("the auditors say no" in line["error"] for line in found)
    assert not logged("lost the database")


async def test_what_is_not_admitted_is_not_claimed_again_at_once(db: Any) -> None:
    me = await register(db)
    [id] = await limited(db, "Bad", "k")
    await db.execute(refusal("NEW.admitted_at IS NOT NULL"))
    out = LeftOut()
    jobs = await claim(db, me, {"default": 5}, 5)
    assert await out.admit(db, me, jobs) == []
    assert out.ids == [id]
    await db.execute("UPDATE notifyq.task SET worker = NULL")  # as it is handed back
    assert await out.claim(db, me, {"default": 5}, 5) == []
    await db.execute(RELENT)
    [row] = await out.admit(db, me, await claim(db, me, {"default": 5}, 5))
    assert (row["id"], row["waits_for"]) == (id, None)
    assert not out


async def test_tasks_that_cannot_be_released(db: Any, dsn: str, logged: Logged) -> None:
    """They stay parked where they are; what waits at other keys, or for the end of a task, is released."""
    bench = Bench()
    release = holding(bench)
    async with working(bench.app, dsn):
        first = [*await limited(db, "Hold", "k"), *await limited(db, "Hold", "j")]
        await eventually(lambda: states(db), {("Hold", "running"): 2})
        await limited(db, "Bad", "k", 2)
        await limited(db, "Good", "j", 2)
        await db.execute(
            "INSERT INTO notifyq.task (type, options) VALUES ('Good', jsonb_build_object('after', $1::bigint[]))", first
        )
        await eventually(lambda: db.fetchval(PARKED), 5)
        await db.execute(refusal("OLD.withheld AND NOT NEW.withheld AND NEW.type = 'Bad'"))
        release.set()
        ends = {("Hold", "done"): 2, ("Good", "done"): 3, ("Bad", "scheduled"): 2}
        await eventually(lambda: states(db), ends)
        await eventually(
            lambda: db.fetchval("SELECT status FROM notifyq.worker"),
            "PostgreSQL doesn't let tasks be released at 1 keys",
        )
        await insert(db, 1, type="Good")
        await eventually(lambda: states(db), ends | {("Good", "done"): 4})
        await db.execute(RELENT)
        await insert(db, 1, type="Good")
        await eventually(lambda: states(db), {("Hold", "done"): 2, ("Good", "done"): 5, ("Bad", "done"): 2})
        await eventually(lambda: db.fetchval("SELECT status FROM notifyq.worker"), "ok")
    [line] = logged("doesn't let tasks be released")
    assert line["where"] == "queue=default limit_key=k"
    assert "the auditors say no" in line["error"]
    assert len(logged("waiting tasks are released again")) == 1
    assert not logged("lost the database")


async def abandoned(db: Any, me: int) -> tuple[list[int], list[int]]:
    """Tasks that worker `me` has claimed: those of type Bad, the first and two in the middle, and the others."""
    async with db.transaction():  # so that no other worker claims them
        bad, good = await insert(db, 1, type="Bad"), await insert(db, 20, type="Good")
        bad += await insert(db, 2, type="Bad")
        good += await insert(db, 20, type="Good")
        assert len(await claim(db, me, {"default": 50}, 50)) == 43
    return bad, good


async def secret(db: Any) -> None:
    await db.execute("UPDATE notifyq.task SET payload = '{\"secret\": 1}'")


@pytest.mark.parametrize("how", HOW)
async def test_the_others_are_rescued(
    db: Any, dsn: str, how: str, logged: Logged, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(left_out, "PAUSE_MOST", 0.5)
    monkeypatch.setattr(left_out, "PAUSE_LEAST", 0.5)
    refuse, relent = HOW[how]
    dead = await register(db, "dead:1")
    bad, good = await abandoned(db, dead)
    await secret(db)
    await silent(db, dead)
    await db.execute(refuse)
    bench = Bench()
    async with working(bench.app, dsn):
        await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", "running"): 3})
        assert await db.fetchval("SELECT status FROM notifyq.worker WHERE id = $1", dead) == "vanished"
        found = logged("doesn't let these tasks be taken back")
        assert ids_of(found) == bad, "each once"
        await db.execute(relent)
        await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", "done"): 3})
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.worker WHERE id = $1", dead), 0)
    errors = (
        "SELECT count(*) FROM notifyq.finished WHERE errors ->> 0 LIKE '%vanished while it ran this task and others%'"
    )
    assert await db.fetchval(errors) == 43, "none was alone"
    assert len(logged("doesn't let these tasks be taken back")) == len(found)
    assert not logged("refuses a chore")
    assert all("no" in line["error"] and "secret" not in line["error"] for line in found)


def rescuing(conn: Any, dead: int) -> Callable[[list[int] | None], Awaitable[int]]:
    async def take(ids: list[int] | None) -> int:
        row = await conn.fetchrow(SQL["rescue"], dead, 100, *await unseen(conn, dead), ids)
        return int(row["ready"] + row["dead"])

    return take


async def test_a_task_that_was_alone_and_is_refused_was_alone(db: Any) -> None:
    """Other workers look after it meanwhile, and that doesn't count."""
    dead = await register(db, "dead:1")
    await insert(db, 1, type="Bad")
    assert await claim(db, dead, {"default": 5}, 5)
    await silent(db, dead)
    await db.execute(HOW["a check"][0])
    out = LeftOut()
    for _ in range(3):
        assert await out.take_back(db, dead, rescuing(db, dead), NOT_TAKEN_BACK) == 0
    await db.execute(HOW["a check"][1])
    assert await LeftOut().take_back(db, dead, rescuing(db, dead), NOT_TAKEN_BACK) == 1
    assert await db.fetchval("SELECT crashes_alone FROM notifyq.task") == 1


async def test_the_other_unowned_tasks_are_taken_back(
    db: Any, dsn: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance.RECLAIM_UNOWNED, "every", 0.2)
    monkeypatch.setattr(left_out, "PAUSE_MOST", 0.5)
    gone = await register(db, "gone:1")
    bad, good = await abandoned(db, gone)
    await db.execute("DELETE FROM notifyq.worker")
    await db.execute(HOW["a check"][0])
    bench = Bench()
    async with working(bench.app, dsn):
        await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", "running"): 3})
        await db.execute(HOW["a check"][1])
        await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", "done"): 3})
    found = logged("doesn't let these tasks be taken back")
    assert ids_of(found) == bad, "each once"
    assert not logged("refuses a chore")


async def test_a_worker_that_stops_hands_the_others_back(db: Any, dsn: str, logged: Logged) -> None:
    """At its end it holds tasks without knowing of them, as the answer to a claim was lost."""
    bench = Bench()
    async with working(bench.app, dsn, queues=["other"]):
        me = await db.fetchval("SELECT id FROM notifyq.worker")
        bad, good = await abandoned(db, me)
        await db.execute(HOW["a check"][0])
    assert await states(db) == {("Good", "ready"): len(good), ("Bad", "running"): 3}
    assert await db.fetchval("SELECT id FROM notifyq.worker") == me, "so that others rescue them"
    found = logged("doesn't let this worker hand these tasks back")
    assert ids_of(found) == bad
    assert [line["tasks"] for line in logged("handed back tasks")] == [len(good)]
    assert not logged("stopping")


async def test_the_others_of_an_unanswered_claim_are_taken_back(db: Any, dsn: str, logged: Logged) -> None:
    """A refused task keeps the worker from claiming no longer than it takes to log that."""
    bench = Bench()
    async with working(bench.app, dsn):
        me = await db.fetchval("SELECT id FROM notifyq.worker")
        bad, good = await abandoned(db, me)
        await db.execute(HOW["a check"][0])
        await db.fetchval(SQL["end_backends"], me, ["claims", "bell"], 2000)  # its connection is lost
        await eventually(lambda: states(db), {("Good", "done"): len(good), ("Bad", "running"): 3})
        found = logged("whose claim went unanswered: they stay")
        assert ids_of(found) == bad
        await db.execute(HOW["a check"][1])
    assert await states(db) == {("Good", "done"): len(good), ("Bad", "ready"): 3}


async def test_what_another_rescues_is_not_taken_for_accepted(
    db: Any, connect: Sessions, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another rescuer has the worker's row, nothing is tried, so nothing is learned."""
    monkeypatch.setattr(left_out, "PAUSE_LEAST", 0.0)
    monkeypatch.setattr(left_out, "PAUSE_MOST", 0.0)
    dead = await register(db, "dead:1")
    await abandoned(db, dead)
    await silent(db, dead)
    await db.execute(HOW["a check"][0])
    out = LeftOut()
    mine, other = await connect(), await connect()
    take = rescuing(mine, dead)
    assert await out.take_back(mine, dead, take, NOT_TAKEN_BACK) == 40
    async with other.transaction():
        await other.execute("SELECT FROM notifyq.worker WHERE id = $1 FOR UPDATE", dead)
        assert await out.take_back(mine, dead, take, NOT_TAKEN_BACK) == 0
    assert await out.take_back(mine, dead, take, NOT_TAKEN_BACK) == 0
    [line] = logged("doesn't let these tasks be taken back")
    assert line["tasks"] == 3
    await db.execute(HOW["a check"][1])
    assert await out.take_back(mine, dead, take, NOT_TAKEN_BACK) == 3
    assert not out
    assert len(logged("no task is refused any more")) == 1
