"""What each role may and may not do, with the GRANTs that schema.sql documents."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.errors import DatabaseError

from ..helpers.command import Run
from ..helpers.databases import admin, grants
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen

INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ('T', '{}')"
SAMPLES = {
    INSERT: {"enqueuer", "worker"},
    f"{INSERT} RETURNING id": {"enqueuer", "worker"},
    f"{INSERT} RETURNING payload": {"worker"},
    "SELECT notifyq.enqueue('T', queue => 'q', priority => 1, max_attempts => 2, run_at => now())": {
        "enqueuer",
        "worker",
    },
    "SELECT notifyq.enqueue('T', options => '{\"order_key\": \"a\"}')": {"enqueuer", "worker"},
    "INSERT INTO notifyq.task (type, options) VALUES ('T', '{\"order_key\": \"a\"}') RETURNING id": {
        "enqueuer",
        "worker",
    },
    "INSERT INTO notifyq.task (type, options) VALUES ('T', '{\"unique_key\": \"a\"}')": {"worker"},
    "INSERT INTO notifyq.task (type, order_key) VALUES ('T', 'a')": {"worker"},
    "INSERT INTO notifyq.task (type, limit_key) VALUES ('T', 'a')": {"worker"},
    "INSERT INTO notifyq.task (type, after) VALUES ('T', '{1}')": {"worker"},
    "INSERT INTO notifyq.task (type, worker) VALUES ('T', 1)": {"worker"},
    "INSERT INTO notifyq.task (type, withheld) VALUES ('T', true)": {"worker"},
    "INSERT INTO notifyq.task (type, created_at) VALUES ('T', now())": {"worker"},
    "LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE": {"enqueuer", "worker"},
    "SELECT notifyq.fall_asleep(10)": {"worker"},
    "SELECT count(id) FROM notifyq.task": {"enqueuer", "awaiter", "worker"},
    "SELECT id FROM notifyq.task FOR NO KEY UPDATE": {"awaiter", "worker"},
    "UPDATE notifyq.task SET awaited = true": {"awaiter", "worker"},
    "UPDATE notifyq.task SET awaited = true RETURNING payload": {"worker"},
    "UPDATE notifyq.task SET progress = 1": {"worker"},
    "SELECT payload FROM notifyq.task": {"worker"},
    "SELECT type FROM notifyq.task": {"worker"},
    "SELECT result FROM notifyq.finished": {"worker"},
    "SELECT payload, errors FROM notifyq.all_tasks": {"reader", "awaiter", "worker"},
    "SELECT * FROM notifyq.worker": {"reader", "worker"},
    "SELECT * FROM notifyq.all_queues": {"reader", "worker"},
    "SELECT * FROM notifyq.queue": {"reader", "worker"},
    "SELECT * FROM notifyq.slot_released, notifyq.key_lock, notifyq.rate_log": {"worker"},
    "SELECT notifyq.pause('q')": {"worker"},
    "SELECT notifyq.resume('q')": {"worker"},
    "SELECT notifyq.limit_queue('q', 5)": {"worker"},
    "SELECT notifyq.release_waiters()": {"worker"},
    "SELECT notifyq.admit(1, '{1}', '{1}')": {"worker"},
    "INSERT INTO notifyq.task (type, admitted_at, waiting_on) VALUES ('T', now(), 'limit:a')": {"worker"},
    "SELECT * FROM notifyq.schema_version": {"reader", "worker"},
    "UPDATE notifyq.task SET priority = 1": {"worker"},
    "UPDATE notifyq.task SET run_at = now()": {"worker"},
    "UPDATE notifyq.finished SET state = 'done'": {"worker"},
    "DELETE FROM notifyq.task": {"worker"},
    "DELETE FROM notifyq.finished": {"worker"},
    "DELETE FROM notifyq.worker": {"worker"},
    "TRUNCATE notifyq.task": {"worker"},
    "SELECT notifyq.cancel(1)": {"worker"},
    "SELECT notifyq.retry(1)": {"worker"},
    "SELECT last_value FROM notifyq.task_id_seq": {"worker"},
    "SELECT nextval('notifyq.task_id_seq')": {"worker"},
    "SELECT setval('notifyq.task_id_seq', 1)": {"worker"},
    "DROP TABLE notifyq.task": set[str](),
    "ALTER TABLE notifyq.task DISABLE TRIGGER ring": set[str](),
    "CREATE TABLE notifyq.mine (id integer)": set[str](),
    "CREATE OR REPLACE FUNCTION notifyq.ring() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'": set[str](),
}  # fmt: skip


@pytest.mark.parametrize("role", ["enqueuer", "reader", "awaiter", "worker"])
async def test_what_each_role_may(as_role: Any, role: str) -> None:
    conn = await as_role(role)
    for statement, may in SAMPLES.items():
        transaction = conn.transaction()
        await transaction.start()
        try:
            await conn.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            assert role not in may, f"{role} may not: {statement}"
        else:
            assert role in may, f"{role} may: {statement}"
        await transaction.rollback()


ENQUEUES: dict[str, list[Any]] = {
    "enqueue": ["T", "{}"],
    "enqueue_many": [["T"] * 2, ["{}"] * 2],
    "enqueue_many_placed": [["T"] * 2, ["{}"] * 2],
    "enqueue_then": [["T"] * 3, ["{}"] * 3],
}
FOR_ALL = {
    *ENQUEUES,
    "read_transaction_status",
    "end_backends",
    "is_turn_stolen",
    "find_lock_holder",
    "list_findings",
    "enqueue_unique",
}


@pytest.mark.parametrize("options", [None, '{"order_key": "a"}'], ids=["plain", "ordered"])
@pytest.mark.parametrize("name", ENQUEUES)
async def test_an_enqueuer_may_run_its_own_statements(as_role: Any, name: str, options: str | None) -> None:
    """It has no more than the GRANTs of "may enqueue": a plain task, one with options, many, a group."""
    conn, worker = await as_role("enqueuer"), await as_role("worker")
    rest = ["cancel"] if name == "enqueue_then" else []
    async with conn.transaction():
        values: list[Any] = ["q", None, None, 0, None, options]
        if name in ("enqueue_many_placed", "enqueue_then"):  # a queue, a priority and options for each
            many = len(ENQUEUES[name][0])
            values = [["q"] * many, None, None, [0] * many, None, [options] * 2 + [None] * (many - 2)]
        rows = await conn.fetch(SQL[name], *ENQUEUES[name], *values, *rest)
    ids = [row["id"] for row in rows]
    if name == "enqueue_then":
        [last], ids = ids, [*rows[0]["after"], *ids]
        waits = await worker.fetchrow(
            "SELECT after, options ->> 'on_dead', order_key FROM notifyq.task WHERE id = $1", last
        )
        assert tuple(waits) == (ids[:-1], "cancel", None)
        ids.pop()
    assert len(ids) == (1 if name == "enqueue" else 2)
    keys = await worker.fetch("SELECT order_key FROM notifyq.task WHERE id = ANY ($1::bigint[])", ids)
    assert [row[0] for row in keys] == [options and "a"] * len(ids)


@pytest.mark.parametrize("name", sorted(set(SQL) - FOR_ALL))
async def test_an_enqueuer_may_run_no_statement_of_a_worker(as_role: Any, name: str) -> None:
    """Claim, settle, rescue and heartbeat are refused. (Six statements read only what PostgreSQL shows every role.)"""
    conn = await as_role("enqueuer")
    statement = await conn.prepare(SQL[name])
    values = {
        "int2": 1,
        "int4": 1,
        "int8": 1,
        "text": "x",
        "float8": 1.0,
        "bool": True,
        "timestamptz": datetime.now(UTC),
    }
    arguments = [values.get(parameter.name, []) for parameter in statement.get_parameters()]
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await statement.fetch(*arguments)


async def test_the_roles_together(roles: Any, as_role: Any) -> None:
    """An enqueuer's task wakes the worker role's sleeping worker, and the reader sees what became of it."""
    app, seen = notifyq.App(), Seen()

    class Told(notifyq.Task):
        name: str

    @app.handler
    async def told(task: Told) -> str:
        seen.add(task.name)
        return task.name

    reader = await as_role("reader")
    async with working(app, roles("worker")) as worker, app.connect(roles("enqueuer")):
        assert worker.info.bell_ms is not None
        for number in range(3):
            await app.enqueue(Told(name=str(number)))
            await seen.reach(number + 1)
        assert len(await app.enqueue_many([Told(name="a"), Told(name="b")], delay=0.01)) == 2
        await seen.reach(5)
        await worker.stopped()
    rows = await reader.fetch("SELECT state, result FROM notifyq.all_tasks WHERE type = 'Told' ORDER BY id")
    assert [tuple(row) for row in rows[:3]] == [("done", f'"{n}"'.encode()) for n in range(3)]
    assert await schema.check(reader) == schema.SCHEMA_VERSION


async def test_an_enqueuer_without_the_bell_still_enqueues(server: Server, as_role: Any) -> None:
    """It can't ask whether a worker sleeps, so it always rings."""
    await admin(server, "DROP ROLE IF EXISTS plain", "CREATE ROLE plain LOGIN")
    owner = await connection.connect(server.dsn("roles"), role="test")
    for grant in grants("enqueuer"):
        if "bell" not in grant:
            await owner.execute(grant.replace("TO enqueuer", "TO plain"))
    heard: list[str] = []
    await owner.add_listener("notifyq", lambda *args: heard.append(args[3]))
    plain = await connection.connect(server.dsn("roles").replace("://notifyq@", "://plain@"), role="test")
    await plain.execute(INSERT)
    await plain.close()
    with anyio.fail_after(limit()):
        while not heard:
            await anyio.sleep(0.001)
    await owner.execute("DROP OWNED BY plain")
    await owner.close()
    await admin(server, "DROP ROLE plain")


async def test_a_stranger_may_not_even_look(roles: Any, as_role: Any, server: Server) -> None:
    await admin(server, "DROP ROLE IF EXISTS stranger", "CREATE ROLE stranger LOGIN")
    conn: Any = await connection.connect(server.dsn("roles").replace("://notifyq@", "://stranger@"), role="test")
    for statement in ("SELECT * FROM notifyq.all_tasks", "SELECT notifyq.enqueue('T')", INSERT):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await conn.execute(statement)
    with pytest.raises(DatabaseError, match=r"user stranger may not use the schema notifyq; .*GRANTs"):
        await schema.check(conn)
    await conn.close()
    await admin(server, "DROP ROLE stranger")


async def test_a_command_says_which_right_it_lacks(roles: Any, run: Run) -> None:
    """Both roles may use the schema. These commands look at its version, which their GRANTs don't include."""
    for role, command in (
        ("enqueuer", "tasks"),
        ("enqueuer", "stats"),
        ("enqueuer", "cancel 1"),
        ("awaiter", "show 1"),
    ):
        found = await run(command, dsn=roles(role))
        want = f"user {role} may not read the table notifyq.schema_version, as roles that may read, operators and"
        assert want in found.err, command
        assert "GRANTs, see: notifyq migrate --sql" in found.err
    assert (await run("enqueue T", dsn=roles("enqueuer"))).code == 0


async def test_the_holder_of_a_lock_is_named_to_a_role_that_may_not_see_what_it_does(as_role: Any) -> None:
    holder, looks = await as_role("worker"), await as_role("reader")
    async with holder.transaction():
        await holder.execute("LOCK TABLE notifyq.task IN ACCESS SHARE MODE")
        pid = holder.get_server_pid()
        found = await looks.fetchval(SQL["find_lock_holder"], ["task"])
        assert found == f"notifyq test (process {pid}, user worker)"
        found = await holder.fetchval(SQL["find_lock_holder"], ["bell"])
        assert found is None
