"""Mistakes that users of other queues make when they enqueue, and connections in states that people have them in."""

from __future__ import annotations

import asyncio
import traceback
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm
from sqlalchemy.ext.asyncio import create_async_engine

import notifyq


class Mail(notifyq.Task):
    to: str = ""


app = notifyq.App()


@app.handler
async def send(task: Mail) -> None: ...


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"countdown": 5}, "enqueue has no option 'countdown'; did you mean delay?"),
        ({"eta": 5}, "did you mean run_at?"),
        ({"max_retries": 5}, "did you mean max_attempts?"),
        ({"priorty": 5}, "did you mean priority?"),
        ({"ttl": 5}, "did you mean expires?"),
        ({"colour": 5}, "enqueue has no option 'colour'; it has queue, delay"),
        ({"timeout": 5}, "enqueue has no option 'timeout'; it is a setting of the task's class"),
    ],
)
async def test_options_of_other_queues(dsn: str, options: dict[str, Any], words: str) -> None:
    async with app.connect(dsn):
        for call in (app.enqueue(Mail(), **options), app.enqueue_many([Mail()], **options)):
            with pytest.raises(notifyq.ConfigError) as caught:
                await call
            assert words in str(caught.value)


def test_a_setting_is_no_option_of_a_handler() -> None:
    handler: Any = app.handler
    with pytest.raises(notifyq.ConfigError, match=r"handler has no option 'queue'; .* write `queue = \.\.\.` there"):
        handler(queue="mail")
    with pytest.raises(notifyq.ConfigError, match="handler has no option 'colour'; it has batch, linger, middleware"):
        handler(colour=5)


async def test_what_is_no_task(dsn: str, db: Any) -> None:
    async with app.connect(dsn, timeout=timedelta(seconds=30)):
        wrong: Any = send
        with pytest.raises(notifyq.ConfigError, match=r"enqueue Mail\(\.\.\.\), not its handler"):
            await app.enqueue(wrong)
        not_instances: list[tuple[Any, str]] = [
            (Mail, r"subclass of notifyq\.Task: Mail\(\.\.\.\)"),
            ([Mail()], "enqueue_many takes several tasks"),
            (send(Mail()), "enqueue the task itself, and don't call its handler"),
        ]
        for given, words in not_instances:
            with pytest.raises(notifyq.ConfigError, match=words):
                await app.enqueue(given)
        options: dict[str, Any] = {"then": Mail()}
        with pytest.raises(notifyq.ConfigError, match=r"enqueue has no option 'then'; .*enqueue_many\("):
            await app.enqueue(Mail(), **options)
        assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0
        ref = await app.enqueue(Mail())
        with pytest.raises(TimeoutError, match=r"hasn't ended within 0\.01 s"):
            await ref.result(timeout=timedelta(milliseconds=10))
        seconds: Any = "5"
        with pytest.raises(notifyq.ConfigError, match="timeout is '5'; expected seconds, or a timedelta"):
            await ref.result(timeout=seconds)
        pair: Any = (Mail(), {"delay": 3})
        with pytest.raises(notifyq.ConfigError, match="the options are for all tasks of a call"):
            await app.enqueue_many([pair])


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 2}, {"isolation_level": "AUTOCOMMIT"}])
async def test_sqlalchemy_s_connections_with_options(dsn: str, db: Any, driver: str, options: dict[str, Any]) -> None:
    client, url = notifyq.SyncClient(app), dsn.replace("postgresql://", f"postgresql+{driver}://")

    def blocking() -> None:
        engine = sqlalchemy.create_engine(url).execution_options(**options)
        with engine.connect() as conn:
            client.enqueue(Mail(), conn=conn)
            client.enqueue_many([Mail(), Mail()], conn=conn)
            conn.commit()
        with sqlalchemy.orm.Session(engine) as session:
            client.enqueue(Mail(), conn=session)
            session.commit()
        engine.dispose()

    if driver == "psycopg":
        await asyncio.to_thread(blocking)
    else:
        engine = create_async_engine(url)
        async with engine.connect() as plain:
            conn = await plain.execution_options(**options)
            await app.enqueue(Mail(), conn=conn)
            await app.enqueue_many([Mail()] * 3, conn=conn)
            await conn.commit()
        await engine.dispose()
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 4


@pytest.mark.parametrize("many", [False, True])
async def test_a_connection_whose_encoding_lacks_a_character(dsn: str, db: Any, many: bool) -> None:
    def blocking() -> None:
        client = notifyq.SyncClient(app)
        with psycopg.connect(dsn, client_encoding="latin1") as conn:
            client.enqueue(Mail("é"), conn=conn)
            enqueue: Any = client.enqueue_many if many else client.enqueue
            with pytest.raises(
                notifyq.ConfigError, match=r"client_encoding of `conn` is .*'€'; .*client_encoding=utf8"
            ):
                enqueue([Mail("é"), Mail("€")] if many else Mail("€"), conn=conn)

    await asyncio.to_thread(blocking)
    assert [row[0] for row in await db.fetch("SELECT payload ->> 'to' FROM notifyq.task")] == ["é"]


async def test_a_missing_schema_in_a_few_lines(server: Any) -> None:
    """The traceback of a first program ends with the cure, and without the driver's frames before that."""
    async with app.connect(server.dsn("postgres")):
        with pytest.raises(notifyq.SchemaError) as caught:
            await app.enqueue(Mail())
    text = "".join(traceback.format_exception(caught.value))
    assert "asyncpg/connection.py" not in text
    assert "UndefinedTableError" in text
