"""schema.sql is installed once, whole or not at all; a wrong or missing version is named with the cure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg
import pytest

from notifyq.database import connection, schema
from notifyq.database.schema import SCHEMA_VERSION
from notifyq.errors import DatabaseError, SchemaError

from .test_schema import EVIL, TEMPORARY


@pytest.fixture
async def empty(empty_dsn: str) -> AsyncIterator[Any]:
    conn = await connection.connect(empty_dsn, role="test")
    yield conn
    conn.terminate()


async def test_migrate_installs_and_then_does_nothing(empty: Any) -> None:
    assert await schema.installed_version(empty) is None
    assert await schema.migrate(empty) == (None, schema.SCHEMA_VERSION)
    await empty.execute("INSERT INTO notifyq.task (type) VALUES ('T')")
    assert await schema.migrate(empty) == (schema.SCHEMA_VERSION, schema.SCHEMA_VERSION)
    assert await schema.check(empty) == schema.SCHEMA_VERSION
    assert await empty.fetchval("SELECT count(*) FROM notifyq.task") == 1


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_two_migrations_at_once_take_turns(empty_dsn: str, isolation: str) -> None:
    """Whatever the default isolation of the database is, the one that waited sees what the other has installed."""
    found = []

    async def migrate() -> None:
        settings = {"default_transaction_isolation": isolation}
        conn = await connection.connect(empty_dsn, role="test", settings=settings)
        found.append(await schema.migrate(conn))
        await conn.close()

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(migrate)
    assert sorted(found, key=str) == [(SCHEMA_VERSION, SCHEMA_VERSION)] * 2 + [(None, SCHEMA_VERSION)]


async def test_migrate_takes_no_names_from_the_search_path(empty_dsn: str) -> None:
    settings = {"search_path": "evil, pg_catalog"}
    conn: Any = await connection.connect(empty_dsn, role="test", settings=settings)
    await conn.execute(EVIL)
    await conn.execute("SET search_path = pg_catalog")
    await conn.execute(TEMPORARY)
    await conn.execute("RESET search_path")
    await schema.migrate(conn)
    assert await conn.fetchval("SELECT notifyq.enqueue('T', '{}')") == 1
    assert await conn.fetchval("SELECT called FROM evil.called") == 0
    await conn.close()


async def test_a_missing_schema_says_how_to_install_it(empty: Any) -> None:
    name = await empty.fetchval("SELECT current_database()")
    with pytest.raises(SchemaError, match=rf"^database '{name}' has no schema notifyq; .*notifyq migrate$"):
        await schema.check(empty)


async def test_a_newer_schema_is_refused(empty: Any) -> None:
    await schema.migrate(empty)
    await empty.execute("INSERT INTO notifyq.schema_version (version, serves) VALUES (7, 7)")
    for refuse in (schema.check, schema.migrate):
        with pytest.raises(SchemaError, match=rf"is version 7, newer than .* knows {SCHEMA_VERSION}; upgrade notifyq"):
            await refuse(empty)


async def test_an_older_schema_asks_for_migrate(empty: Any) -> None:
    await schema.migrate(empty)
    await empty.execute("UPDATE notifyq.schema_version SET version = 0")
    with pytest.raises(SchemaError, match=f"is version 0, this notifyq needs {SCHEMA_VERSION}; run: notifyq migrate"):
        await schema.check(empty)


@pytest.mark.parametrize(
    "what",
    [
        "",
        "CREATE TABLE notifyq.task (id integer)",
        "CREATE TABLE notifyq.schema_version (name text)",
        "CREATE TABLE notifyq.schema_version (version text); INSERT INTO notifyq.schema_version VALUES ('v1')",
        "CREATE TABLE notifyq.schema_version (version integer)",
    ],
    ids=["empty", "other tables", "other columns", "other types", "no version"],
)
async def test_another_schema_of_that_name_is_left_alone(empty: Any, what: str) -> None:
    await empty.execute(f"CREATE SCHEMA notifyq; {what}")
    for refuse in (schema.check, schema.migrate):
        with pytest.raises(SchemaError, match="has a schema notifyq that notifyq didn't make; rename or drop"):
            await refuse(empty)
    assert await empty.fetchval("SELECT to_regclass('notifyq.finished')") is None


async def test_a_migration_that_fails_leaves_nothing(empty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = schema.schema_sql()
    monkeypatch.setattr(schema, "schema_sql", lambda: f"{text}; SELECT 1 / 0")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await schema.migrate(empty)
    assert await schema.installed_version(empty) is None


async def test_a_role_that_may_not_create_is_told_so(empty: Any) -> None:
    await empty.execute("SET ROLE pg_monitor")
    with pytest.raises(DatabaseError, match=r"may not create the schema, .* as the database's owner"):
        await schema.migrate(empty)


async def test_a_standby_is_told_so(empty_dsn: str) -> None:
    conn = await connection.connect(empty_dsn, role="test", settings={"default_transaction_read_only": "on"})
    with pytest.raises(DatabaseError, match="read-only"):
        await schema.migrate(conn)
    await conn.close()
