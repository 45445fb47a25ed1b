"""Times without an end, and bytes of no encoding: one odd row stops no worker, and no person who looks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.testing import advance, enqueued
from notifyq.worker import job as claims

from ..helpers.command import Run
from ..helpers.databases import admin, database
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.waiting import Seen

HERE = Path(schema.__file__).parent

TIMES = ("created_at", "run_at", "processing_at", "processed_at")
ODD = ("infinity", "-infinity", "4713-01-01 BC", "294276-12-31")


class Say(notifyq.Task):
    text: str = ""
    max_attempts = 2
    backoff = 0.01


def saying(seen: Seen) -> notifyq.App:
    app = notifyq.App()

    @app.handler
    async def say(task: Say, ctx: notifyq.Context) -> str:
        if task.text == "note":
            await ctx.progress(0.5, "step \U0001f600")
            await anyio.sleep(1.5)
        seen.add(task.text)
        return task.text

    return app


# --- Times


async def fill(db: Any, odd: str) -> list[int]:
    """Live and finished tasks, a worker, a cron, and a key, with this value in each of their times. Returns the
    tasks."""
    ids: list[int] = []
    for column in TIMES:
        for _ in range(2):
            ids.append(await db.fetchval("INSERT INTO notifyq.task (type, queue) VALUES ('Say', 'odd') RETURNING id"))
            await db.execute(f"UPDATE notifyq.task SET {column} = '{odd}' WHERE id = $1", ids[-1])
        await db.execute("SELECT notifyq.cancel($1)", ids[-1])
        await db.execute(f"UPDATE notifyq.finished SET {column} = '{odd}' WHERE id = $1", ids[-1])
    for column in ("started_at", "seen_at"):
        me = await db.fetchval(SQL["register_worker"], "host:1", ["odd"], ["Say"], [10], 1, 30.0)
        await db.execute(f"UPDATE notifyq.worker SET {column} = '{odd}' WHERE id = $1", me)
    await db.execute(
        f"""INSERT INTO notifyq.cron (name, expression, type, last_at) VALUES ('c', '0 3 * * *', 'Say', '{odd}');
            INSERT INTO notifyq.rate_log VALUES ('limit:k', '{odd}', 1, 1.0);
            INSERT INTO notifyq.unique_key VALUES ('u', {ids[0]}, '{odd}', '{odd}')"""
    )
    return ids


@pytest.mark.parametrize("odd", ODD)
async def test_people_go_on_looking(run: Run, dsn: str, db: Any, odd: str) -> None:
    ids = await fill(db, odd)
    states = [f"--state {state}" for state in ("scheduled", "ready", "cancelled")]
    for command in (
        "tasks",
        "tasks --json",
        "stats",
        "stats --json",
        "queues",
        "cron",
        *(f"tasks {s}" for s in states),
    ):
        said = await run(command, dsn=dsn)
        assert (said.code, said.err) == (0, ""), command
    listed = {json.loads(line)["id"] for line in (await run("tasks --json", dsn=dsn)).lines}
    assert listed == set(ids)
    for id in ids:
        assert (await run(f"show {id}", dsn=dsn)).code == 0
        await db.fetchrow(SQL["read_django_result"], id)
    assert len(await enqueued(db, Say)) == 4
    assert (await db.fetchrow(SQL["find_runnable"], None))["at"] is not None
    await db.fetch(SQL["list_ran"], await db.fetchval("SELECT now()"))


@pytest.mark.parametrize("odd", ODD)
async def test_workers_go_on_working(dsn: str, db: Any, odd: str) -> None:
    """Due tasks run, those with keys too. Clocks of tests can be moved. In the end the key is free, or taken."""
    await fill(db, odd)
    seen = Seen()
    app = saying(seen)
    async with app.connect(dsn), working(app, dsn, queues=["odd", "default"]):
        await app.enqueue(Say("plain"))
        await app.enqueue(Say("limited"), limit_key="k", rate="5/s")
        await app.enqueue(Say("unique"), unique="u", unique_for=10)
        ref = await app.enqueue(Say("result"))
        assert await ref.result(timeout=limit()) == "result"
        with anyio.fail_after(limit()):
            while not {"plain", "limited"} <= set(seen.items):
                await anyio.sleep(0.01)
    for statement, args in (
        ("prune_finished", (60.0, 60.0, 10, None)),
        ("prune_rate_log", (10,)),
        ("prune_unique_keys", (10,)),
    ):
        await db.fetchval(SQL[statement], *args)
    assert [*await db.fetchrow(SQL["list_misdated"], "odd")] == [[], []] or odd == "294276-12-31"
    if odd.endswith("infinity"):
        await advance(db, 3600.0)


@pytest.mark.parametrize("odd", ["infinity", "-infinity"])
async def test_a_key_without_an_end(db: Any, odd: str) -> None:
    """The task is enqueued, or the other's id is returned; no error either way."""
    first = await db.fetchval("SELECT notifyq.enqueue('Say', options => '{\"unique_key\": \"u\"}')")
    for column in ("enqueued_at", "until"):
        await db.execute(f"UPDATE notifyq.unique_key SET {column} = '{odd}'")
        options = '{"unique_key": "u", "unique_for": 10}'
        assert await db.fetchval("SELECT notifyq.enqueue('Say', options => $1::text::jsonb)", options) >= first


# --- Encodings


def test_every_statement_is_plain_ascii() -> None:
    """So it can be sent to, and stored in, a database of any encoding."""
    files = [*HERE.rglob("*.sql")]
    assert len(files) > 50
    for text in (schema.schema_sql(), *(path.read_text(encoding="utf-8") for path in files)):
        assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:1]


@pytest.fixture(params=["SQL_ASCII", "LATIN1", "EUC_JP"])
async def encoded(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[tuple[str, str]]:
    """The encoding, and the DSN of a database in it, with the schema."""
    name = f"enc_{request.param.lower()}"
    await admin(server, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{request.param}' LOCALE 'C'")
    conn = await connection.connect(server.dsn(name), role="test")
    await schema.migrate(conn)
    await conn.close()
    yield request.param, server.dsn(name)
    await admin(server, f"DROP DATABASE {name} WITH (FORCE)")


ODD_ROWS = r"""
    INSERT INTO notifyq.task (type, payload) VALUES (E'caf\xe9', '{}');
    INSERT INTO notifyq.task (type, payload) VALUES ('Say', E'{"text": "caf\xe9"}');
    INSERT INTO notifyq.task (type, queue) VALUES ('Say', E'caf\xe9')"""


async def test_other_encodings(encoded: tuple[str, str], run: Run) -> None:
    """What fits is stored; what doesn't fit stops no other task. In SQL_ASCII some bytes are no text at all."""
    encoding, dsn = encoded
    seen = Seen()
    app = saying(seen)
    conn = await connection.connect(dsn, role="test")
    async with app.connect(dsn), working(app, dsn):
        if encoding == "SQL_ASCII":
            await conn.execute(ODD_ROWS)
            await app.enqueue(Say("smile \U0001f600"))
        await app.enqueue(Say("note"))
        last = await app.enqueue(Say("last"))
        assert await last.result(timeout=limit()) == "last"
        await seen.reach(3 if encoding == "SQL_ASCII" else 2)
    states = {row["state"] for row in await conn.fetch("SELECT state FROM notifyq.all_tasks")}
    await conn.close()
    assert states == ({"done", "dead", "ready"} if encoding == "SQL_ASCII" else {"done"})
    for command in ("tasks", "tasks --json", "show 1", "show 2", "stats"):
        said = await run(command, dsn=dsn)
        note = "notifyq: 1 isn't started: no worker is up\n" if command == "show 1" and encoding == "SQL_ASCII" else ""
        assert (said.code, said.err) == (0, note), command
    if encoding == "SQL_ASCII":
        assert "caf\ufffd" in (await run("tasks", dsn=dsn)).out
        assert "can't decode byte 0xe9" in (await run("show 2", dsn=dsn)).out


async def test_an_error_that_the_encoding_lacks(encoded: tuple[str, str]) -> None:
    """It is stored in another form, and the task ends."""
    _, dsn = encoded
    app = notifyq.App()

    @app.handler
    async def say(task: Say) -> None:
        raise notifyq.Dead(f"{task.text} \U0001f40d")

    async with app.connect(dsn), working(app, dsn):
        ref = await app.enqueue(Say("snake"))
        with pytest.raises(notifyq.TaskFailed, match="snake"):
            await ref.result(timeout=limit())


async def test_a_long_name_is_cut_in_the_middle_of_a_character(server: Server, dsn: str) -> None:
    """The database is SQL_ASCII, where a character is a byte."""
    await admin(server, "CREATE DATABASE enc_cut TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    async with database(server, "enc_cut") as copy:
        conn: Any = await connection.connect(copy, role="test")
        await schema.migrate(conn)
        await conn.execute("INSERT INTO notifyq.task (type) VALUES ($1)", "\u00e9" * 200)
        me = await conn.fetchval(SQL["register_worker"], "host:1", ["default"], ["Say"], [10], 1, 30.0)
        [job] = await claims.claim(conn, me, {"default": 1}, 1)
        assert len(job.type) > 100
        await conn.close()
    await admin(server, "DROP DATABASE enc_cut")
