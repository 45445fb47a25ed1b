"""Problems of a database that raise no error: a worker finds them, logs each with its cure, and logs its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.database import schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.errors import DatabaseError, SchemaError
from notifyq.worker import maintenance

from ..helpers.databases import Sessions, admin, grants
from ..helpers.logs import Logged
from ..helpers.running import working
from ..helpers.steps import steps
from ..helpers.waiting import Seen, eventually


class Say(notifyq.Task):
    text: str = ""


def saying(seen: Seen) -> notifyq.App:
    app = notifyq.App()

    @app.handler
    async def say(task: Say) -> None:
        seen.add(task.text)

    return app


async def findings(conn: Any, others: bool = False) -> dict[str, tuple[str, str]]:
    return {row["about"]: (row["problem"], row["cure"]) for row in await conn.fetch(SQL["list_findings"], others)}


@pytest.fixture
async def hand(server: Server, dsn: str, db: Any) -> AsyncIterator[str]:
    """The DSN of a user that has a worker's privileges, and owns nothing."""
    await admin(server, "CREATE ROLE hand LOGIN")
    for grant in grants("worker"):
        await db.execute(grant.replace("TO worker", "TO hand"))
    yield dsn.replace("://notifyq@", "://hand@")
    await db.execute("DROP OWNED BY hand")
    await admin(server, "DROP ROLE hand")


async def test_a_healthy_database_has_none(db: Any, connect: Sessions, hand: str) -> None:
    for conn in (db, await connect(hand)):
        assert await findings(conn, True) == {}


# --- Row level security


async def secure(db: Any, *tables: str) -> None:
    for table in tables:
        await db.execute(f"ALTER TABLE notifyq.{table} ENABLE ROW LEVEL SECURITY")


async def test_hidden_rows_of_the_version_are_no_reason_to_drop_anything(db: Any, connect: Sessions, hand: str) -> None:
    await secure(db, "schema_version")
    conn = await connect(hand)
    for ask in (schema.check, schema.migrate):
        with pytest.raises(
            DatabaseError, match=r"row level security hides the rows of notifyq\.schema_version from user"
        ):
            await ask(conn)


async def test_a_version_that_was_deleted_is_no_reason_to_drop_anything(db: Any) -> None:
    await db.execute("DELETE FROM notifyq.schema_version")
    with pytest.raises(SchemaError, match=r"notifyq\.schema_version is empty.*INSERT INTO") as caught:
        await schema.check(db)
    await db.execute(str(caught.value).partition("notifyq's, ")[2])
    assert await schema.check(db) == schema.SCHEMA_VERSION


@pytest.mark.usefixtures("quick_heart")
async def test_a_worker_that_does_not_see_its_tasks_says_so(
    dsn: str, db: Any, hand: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so in the log and in its status. Once it sees them, it runs them, and logs that too."""
    monkeypatch.setattr(maintenance.FIND_PROBLEMS, "every", 0.2)
    await secure(db, "task", "finished")
    seen = Seen()
    app = saying(seen)
    async with app.connect(dsn), working(app, hand, poll_interval=0.2):
        await app.enqueue(Say("hidden"))
        status = "SELECT status FROM notifyq.worker"
        await eventually(lambda: db.fetchval(status), "row level security")
        assert logged("hides rows of notifyq.finished, notifyq.task from user hand") != []
        [(problem, cure)] = (await findings(db, True)).values()
        assert "row level security is on for notifyq.finished, notifyq.task" in problem
        assert "DISABLE ROW LEVEL SECURITY" in cure
        assert seen.items == []
        await db.execute(
            "CREATE POLICY everything ON notifyq.task TO hand USING (true);"
            "ALTER TABLE notifyq.finished DISABLE ROW LEVEL SECURITY"
        )
        assert await seen.reach(1) == ["hidden"]
        await eventually(lambda: db.fetchval(status), "ok")
    assert len(logged("hides rows of")) == 1
    assert len(logged("mended: row level security")) == 1


@pytest.mark.parametrize(
    ("policies", "hidden"),
    [
        (["CREATE POLICY p ON notifyq.task USING (true)"], False),
        (["CREATE POLICY p ON notifyq.task USING (true) WITH CHECK (true)"], False),
        (["CREATE POLICY p ON notifyq.task TO pg_monitor USING (true)"], True),
        (["CREATE POLICY p ON notifyq.task FOR SELECT USING (true)"], True),
        (["CREATE POLICY p ON notifyq.task USING (queue = 'mine')"], True),
        (
            [
                "CREATE POLICY p ON notifyq.task USING (true)",
                "CREATE POLICY q ON notifyq.task AS RESTRICTIVE USING (id > 1)",
            ],
            True,
        ),
    ],
)
async def test_which_policies_show_everything(
    db: Any, connect: Sessions, hand: str, policies: list[str], hidden: bool
) -> None:
    await secure(db, "task")
    for policy in policies:
        await db.execute(policy)
    assert ("row level security" in await findings(await connect(hand))) is hidden


async def test_row_level_security_that_is_forced_on_the_owner(
    db: Any, dsn: str, server: Server, connect: Sessions
) -> None:
    await admin(server, "CREATE ROLE landlord LOGIN")
    try:
        await db.execute("ALTER TABLE notifyq.task OWNER TO landlord; GRANT ALL ON SCHEMA notifyq TO landlord")
        owner = await connect(dsn.replace("://notifyq@", "://landlord@"))
        await secure(db, "task")
        assert await findings(owner) == {}
        await db.execute("ALTER TABLE notifyq.task FORCE ROW LEVEL SECURITY")
        assert [*await findings(owner)] == ["row level security"]
    finally:
        await db.execute("REASSIGN OWNED BY landlord TO notifyq; DROP OWNED BY landlord")
        await admin(server, "DROP ROLE landlord")


async def test_tasks_of_a_hidden_worker_are_not_taken_back(dsn: str, db: Any, connect: Sessions, hand: str) -> None:
    """A worker that another one can't see isn't gone: its tasks are not taken back as unowned."""
    me = await db.fetchval(SQL["register_worker"], "host:1", ["default"], ["Say"], [10], 1, 30.0)
    await db.execute(
        "INSERT INTO notifyq.task (type, worker, attempts, processing_at) VALUES ('Say', $1, 1, now())", me
    )
    await secure(db, "worker")
    other = await connect(hand)
    assert not await other.fetchval(SQL["list_unowned"], [])
    assert (
        await other.fetchval(SQL["reclaim_unowned"], await db.fetchval("SELECT array_agg(id) FROM notifyq.task")) == 0
    )
    assert await db.fetchval("SELECT worker FROM notifyq.task") == me
    await db.execute("DELETE FROM notifyq.worker")
    assert await db.fetchval(SQL["list_unowned"], []), "to one who sees all, it is gone"


# --- Triggers that don't fire


@pytest.mark.parametrize("trigger", ["apply_options", "on_task_deleted", "ring"])
@pytest.mark.parametrize("what", ["DISABLE TRIGGER {}", "ENABLE REPLICA TRIGGER {}", "DROP"])
async def test_triggers(db: Any, trigger: str, what: str) -> None:
    """A trigger is disabled, for replicas only, or missing. The cure in the message works."""
    if what == "DROP":
        await db.execute(f"DROP TRIGGER {trigger} ON notifyq.task")
        [(problem, cure)] = (await findings(db)).values()
        assert f"trigger {trigger} of notifyq.task is missing" in problem
        assert "schema.sql" in cure
        return
    await db.execute("ALTER TABLE notifyq.task " + what.format(trigger))
    [(problem, cure)] = (await findings(db)).values()
    assert f"trigger {trigger} of notifyq.task is disabled" in problem
    await db.execute(cure)
    assert await findings(db) == {}
    await db.execute(f"ALTER TABLE notifyq.task ENABLE ALWAYS TRIGGER {trigger}")
    assert await findings(db) == {}


SWALLOWS = {
    "BEGIN RETURN NULL; END": ("INSERT", "UPDATE", "DELETE"),
    "BEGIN IF NEW.type = 'x' THEN return  null ; END IF; RETURN NEW; END": ("INSERT", "UPDATE"),
    "BEGIN RETURN NEW; END": ("DELETE", "INSERT OR UPDATE OR DELETE"),
    "BEGIN RETURN OLD; END": ("INSERT", "UPDATE", "INSERT OR UPDATE OR DELETE"),
}
LETS_THROUGH = {
    "BEGIN RETURN NEW; END": ("INSERT", "UPDATE", "INSERT OR UPDATE"),
    "BEGIN RETURN OLD; END": ("DELETE",),
    "BEGIN RETURN coalesce(NEW, OLD); END": ("DELETE", "INSERT OR UPDATE OR DELETE"),
    "BEGIN IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END": ("DELETE", "INSERT OR UPDATE OR DELETE"),
    "BEGIN /* RETURN NULL; */ RETURN NEW; -- and not RETURN NULL;\nEND": ("INSERT OR UPDATE",),
}


def audit(table: str, when: str, events: str, body: str) -> str:
    return f"""CREATE OR REPLACE FUNCTION public.audit() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$;
               CREATE TRIGGER "My audit" {when} {events} ON notifyq.{table} FOR EACH ROW
               EXECUTE FUNCTION public.audit()"""


@pytest.mark.parametrize("table", ["task", "finished", "worker"])
async def test_a_trigger_that_keeps_rows_from_being_written(db: Any, table: str) -> None:
    """The message names the trigger and what is wrong with it. A trigger that lets rows through, or fires after them,
    is no problem."""
    for body, among in SWALLOWS.items():
        for events in among:
            await db.execute(audit(table, "BEFORE", events, body))
            [(about, (problem, cure))] = (await findings(db)).items()
            assert about == f'trigger "My audit" on notifyq.{table}', (body, events)
            assert f'trigger "My audit" on notifyq.{table} runs before each row is written, and' in problem
            assert cure == "let public.audit() return NEW, or OLD on DELETE; or make it an AFTER trigger"
            await db.execute(f'ALTER TABLE notifyq.{table} DISABLE TRIGGER "My audit"')
            assert await findings(db) == {}
            await db.execute(f'DROP TRIGGER "My audit" ON notifyq.{table}')
            await db.execute(audit(table, "AFTER", events, body))
            assert await findings(db) == {}, (body, events)
            await db.execute(f'DROP TRIGGER "My audit" ON notifyq.{table}')
    for body, among in LETS_THROUGH.items():
        for events in among:
            await db.execute(audit(table, "BEFORE", events, body))
            assert await findings(db) == {}, (body, events)
            await db.execute(f'DROP TRIGGER "My audit" ON notifyq.{table}')


async def test_a_worker_says_which_triggers_do_not_fire(dsn: str, db: Any, logged: Logged) -> None:
    await db.execute("ALTER TABLE notifyq.task DISABLE TRIGGER ALL")
    async with working(saying(Seen()), dsn):
        await eventually(
            lambda: db.fetchval("SELECT status FROM notifyq.worker"),
            "trigger apply_options; trigger on_task_deleted; trigger ring",
        )
    for effect in ("limits, order, unique keys and dependencies", "are told late, or never", "no worker is woken"):
        assert len(logged(effect)) == 1


async def test_a_role_or_database_in_which_no_trigger_fires(
    dsn: str, db: Any, connect: Sessions, hand: str, server: Server
) -> None:
    """A setting of the session that asks, and of roles that may enqueue, is found; one of other roles is not."""
    name = await db.fetchval("SELECT current_database()")
    await admin(server, "CREATE ROLE copier; ALTER ROLE copier SET session_replication_role = replica")
    assert await findings(db) == {}
    await admin(server, "DROP ROLE copier")
    for set_it in (f"ALTER ROLE hand IN DATABASE {name}", "ALTER ROLE hand", f"ALTER DATABASE {name}"):
        await db.execute(f"{set_it} SET session_replication_role = replica")
        [(problem, cure)] = (await findings(db)).values()
        assert "session_replication_role is replica for" in problem
        own = await findings(await connect(hand))
        assert "in this session of user hand" in own["session_replication_role of this session"][0]
        await db.execute(cure)
        assert await findings(db) == {}


# --- Transactions that keep all workers awake


async def old(db: Any, seconds: int) -> dict[str, tuple[str, str]]:
    """The findings, as if transactions had begun `seconds` earlier."""
    text = SQL["list_findings"].replace("x.seconds >= 60", f"x.seconds + {seconds} >= 60")
    return {row["about"]: (row["problem"], row["cure"]) for row in await db.fetch(text, False)}


async def test_a_transaction_that_keeps_workers_awake(dsn: str, db: Any) -> None:
    """The transaction is prepared, or a session left it open, and it is old. Both cures are SQL."""
    async with steps(dsn) as s:
        a, b, c = [await s.session(name) for name in "abc"]
        for session in (a, b):
            await session("BEGIN")
            await session("INSERT INTO notifyq.task (type) VALUES ('Say')")
        await c("BEGIN")
        await c("SELECT * FROM notifyq.task")
        await a("PREPARE TRANSACTION 'left lying'")
        assert await findings(db) == {}
        found = await old(db, 61)
        assert sorted(found) == [
            "transaction prepared transaction 'left lying' of user notifyq",
            f"transaction the transaction of process {b.pid} (user notifyq, notifyq b)",
        ]
        for problem, cure in found.values():
            assert "no worker can sleep" in problem
            await db.execute(cure.rpartition(", or ")[2])
        await eventually(lambda: old(db, 61), {})


# --- Locks that aren't there


async def test_locks_that_were_truncated_are_made_again(dsn: str, db: Any) -> None:
    """The rows of key_lock were truncated. A limit holds nevertheless, and so does the order of waiting tasks."""
    await db.execute("TRUNCATE notifyq.key_lock")
    seen, running, most = Seen(), 0, 0
    app = notifyq.App()

    @app.handler
    async def say(task: Say) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.01)
        running -= 1
        seen.add(task.text)

    async with app.connect(dsn), working(app, dsn), working(app, dsn):
        refs = [await app.enqueue(Say(str(n)), limit_key="k", limit=1) for n in range(5)]
        await app.enqueue(Say("last"), after=refs)
        assert (await seen.reach(6))[-1] == "last"
    assert most == 1
    assert await db.fetchval("SELECT count(*) FROM notifyq.key_lock") == 257


async def test_a_missing_key_lock_is_made_by_the_session_that_locks_it(dsn: str) -> None:
    """Two sessions lock a missing row of key_lock at the same time: the second waits for the first, though neither
    found the row."""
    async with steps(dsn) as s:
        a, b = await s.session("a"), await s.session("b")
        await a("TRUNCATE notifyq.key_lock")
        await a("BEGIN")
        await a("SELECT notifyq.lock_keys('{limit:k}')")
        waiting = await b.blocked_by(a, "SELECT notifyq.lock_keys('{limit:k}')")
        await a("COMMIT")
        await waiting


def test_the_version_that_is_told_is_schema_sqls() -> None:
    assert f"{schema.VERSION_ROW};" in schema.schema_sql()
