"""assert_enqueued: what it finds is what is there, and its messages say why not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

import notifyq
from notifyq.database import connection
from notifyq.errors import ConfigError
from notifyq.testing import (
    assert_enqueued,
    drain,
    enqueued,
    refute_enqueued,
)

from ..helpers.kit import NOW, Act, Chain, Mail, User, app


@pytest.fixture
async def connected(dsn: str) -> AsyncIterator[notifyq.App]:
    async with app.connect(dsn):
        yield app


async def fill() -> None:
    ann, bob = User(id=1, email="ann@b.c"), User(id=2, email="bob@b.c")
    await app.enqueue(
        Mail(to="ann", user=ann, copies=[ann, bob], headers={"a": "1", "b": "2"}), queue="mail", priority=3
    )
    await app.enqueue(Mail(to="bob", user=bob), delay=60)
    await app.enqueue(Mail(to="nobody", queue="field"), run_at=NOW)
    await app.enqueue(Act())


MATCHES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {}, ["ann", "bob", "nobody"]),
    ({}, {"to": "ann"}, ["ann"]),
    ({"to": "ann"}, {}, ["ann"]),
    ({}, {"to": "an"}, []),
    ({}, {"user": {"email": "bob@b.c"}}, ["bob"]),
    ({}, {"user": User(id=2, email="bob@b.c")}, ["bob"]),
    ({}, {"user": {"email": "bob@b.c", "id": 1}}, []),
    ({}, {"user": None}, ["nobody"]),
    ({}, {"copies": [{"id": 1}, {}]}, ["ann"]),
    ({}, {"copies": [{"id": 1}]}, []),
    ({}, {"headers": {"b": "2"}}, ["ann"]),
    ({}, {"headers": {"c": "2"}}, []),
    ({}, {"queue": "mail"}, ["ann"]),
    ({"queue": "field"}, {"queue": "default"}, ["nobody"]),
    ({}, {"priority": 3}, ["ann"]),
    ({}, {"priority": 0}, ["bob", "nobody"]),
    ({}, {"delay": 60}, ["bob"]),
    ({}, {"delay": 0}, ["ann"]),
    ({}, {"delay": 62}, []),
    ({}, {"run_at": NOW}, ["nobody"]),
    ({}, {"to": "bob", "queue": "mail"}, []),
]


async def test_what_matches(connected: notifyq.App) -> None:
    await fill()
    for fields, more, names in MATCHES:
        assert [mail.to for mail in await enqueued(app, Mail, fields, **more)] == names, (fields, more)
        if names:
            found = await assert_enqueued(app, Mail, fields, **more)
            assert [mail.to for mail in found] == names
            with pytest.raises(AssertionError, match=r"enqueued as Mail\("):
                await refute_enqueued(app, Mail, fields, **more)
        else:
            await refute_enqueued(app, Mail, fields, **more)
            with pytest.raises(AssertionError, match="no task is enqueued as"):
                await assert_enqueued(app, Mail, fields, **more)
        await assert_enqueued(app, Mail, fields, count=len(names), **more)
        with pytest.raises(AssertionError):
            await assert_enqueued(app, Mail, fields, count=len(names) + 1, **more)


async def message(awaitable: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        await awaitable
    return str(caught.value)


async def test_what_the_messages_say(connected: notifyq.App) -> None:
    """They say what is there instead, the nearest first, and how it differs."""
    assert await message(assert_enqueued(app, Mail)) == "no task is enqueued as Mail(); there is none of this type"
    await fill()
    text = await message(assert_enqueued(app, Mail, to="bob", user={"email": "ann@b.c"}, queue="mail"))
    first, *rest = text.splitlines()
    assert first == (
        "no task is enqueued as Mail(to='bob', user={'email': 'ann@b.c'}), queue 'mail'. There is, the nearest first:"
    )
    assert rest[0].startswith("  id 1: to is 'ann', not 'bob'; Mail(to='ann', ")
    assert rest[1].startswith("  id 2: queue is 'default', not 'mail'; user.email is 'bob@b.c', not 'ann@b.c'; Mail(")
    assert rest[2].startswith("  id 3: queue is 'default', not 'mail'; to is 'nobody', not 'bob'; user is None, not {")
    text = await message(assert_enqueued(app, Mail, copies=[{"id": 1}, {"id": 3}]))
    assert "  id 1: copies[1].id is 2, not 3; Mail(" in text
    assert "no task, instead of 2, is enqueued" in await message(assert_enqueued(app, Mail, to="x", count=2))
    text = await message(assert_enqueued(app, Mail, to="bob", count=2))
    assert text.startswith("1 task is enqueued, not 2, as Mail(to='bob'):\n  id 2: Mail(")
    assert (await message(refute_enqueued(app, Mail, queue="default"))).startswith("2 tasks are enqueued as Mail(), qu")
    text = await message(assert_enqueued(app, Chain))
    assert text == (
        "no task is enqueued as Chain(); there is none of this type; "
        "of others: Act 1 ready, MAIL 1 ready, MAIL 2 scheduled"
    )
    await drain(app)
    assert "; of this type there is 1 done; of others: MAIL" in await message(assert_enqueued(app, Act))
    await app.enqueue_many([Mail(to="many")] * 20)
    assert (await message(assert_enqueued(app, Mail, to="x"))).endswith("\n  and 17 more")


async def test_a_field_that_is_not_there(connected: notifyq.App) -> None:
    """It never matches, so refuting it would be a test that can't fail."""
    with pytest.raises(ConfigError, match=r"Mail has no field 'too'; did you mean 'to'\?"):
        await refute_enqueued(app, Mail, too="x")
    for helper in (enqueued, assert_enqueued, refute_enqueued):
        with pytest.raises(ConfigError, match=r"'after' is an option .* isn't compared .*, delay, run_at"):
            await helper(app, Mail, after=[1])
    with pytest.raises(ConfigError, match="Act has no field 'zzz'; it has how"):
        await enqueued(app, Act, zzz=1)
    await fill()
    with pytest.raises(ConfigError, match=r"User has no field 'mail'; did you mean 'email'\?"):
        await refute_enqueued(app, Mail, user={"mail": "x"})
    with pytest.raises(ConfigError, match="expected a subclass"):
        await enqueued(app, Mail(to="x"))  # type: ignore[arg-type]


async def test_a_payload_that_does_not_fit(connected: notifyq.App, dsn: str) -> None:
    db = await connection.connect(dsn)
    await db.execute("INSERT INTO notifyq.task (type, payload) VALUES ('MAIL', '{\"to\": 5}')")
    for look in (enqueued, assert_enqueued, refute_enqueued):
        with pytest.raises(
            AssertionError, match=r"task 1 is enqueued, but its payload doesn't fit MAIL: Expected `str`"
        ):
            await look(db, Mail)
    await db.close()


async def test_in_a_transaction(connected: notifyq.App, dsn: str) -> None:
    """It is a user's connection, with whatever codec it has for jsonb. Other sessions don't see the task yet."""
    conn = await asyncpg.connect(dsn)
    await conn.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    async with conn.transaction():
        await app.enqueue(Mail(to="ann"), conn=conn)
        await assert_enqueued(conn, Mail, to="ann", count=1)
        await refute_enqueued(app, Mail)
    await assert_enqueued(dsn, Mail, to="ann")
    await conn.close()


async def test_an_app_that_is_not_connected() -> None:
    with pytest.raises(ConfigError, match="not connected"):
        await enqueued(app, Mail)
    with pytest.raises(ConfigError, match="expected a connected app, a connection of asyncpg, or a DSN"):
        await enqueued(None, Mail)  # type: ignore[arg-type]
