"""The databases that the plugin makes."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from notifyq.database import connection
from notifyq.embedded import Server
from notifyq.errors import DatabaseError
from notifyq.testing import (
    Databases,
    Drained,
    drain,
)

from ..helpers.databases import admin
from ..helpers.kit import Thread, app


async def test_databases(notifyq_server_dsn: str) -> None:
    """Each test has its own, with the schema. It is dropped with its template, even if sessions are still connected."""
    async with Databases(notifyq_server_dsn) as databases:
        async with databases.new() as one, databases.new() as other:
            first = await connection.connect(one)
            await first.execute("INSERT INTO notifyq.task (type) VALUES ('X')")
            second = await connection.connect(other)
            assert await second.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 0
        admin = await connection.connect(notifyq_server_dsn)
        names = "SELECT datname FROM pg_database WHERE datname LIKE $1 || '%'"
        prefix = databases.template.removesuffix("_template")
        assert [row[0] for row in await admin.fetch(names, prefix)] == [databases.template]
    assert await admin.fetch(names, prefix) == []
    await admin.close()
    for conn in (first, second):
        conn.terminate()


async def test_a_role_that_may_not_create_databases(notifyq_server_dsn: str, server: Server) -> None:
    await admin(server, "CREATE ROLE guest LOGIN")
    with pytest.raises(DatabaseError, match="this role may not create databases"):
        await Databases(notifyq_server_dsn.replace("notifyq@", "guest@")).__aenter__()
    await admin(server, "DROP ROLE guest")


def test_a_plain_test(notifyq_dsn: str) -> None:
    """There is no event loop, and it makes one; that of docs/testing.md is of a project of its own."""

    async def use() -> Drained:
        async with app.connect(notifyq_dsn):
            await app.enqueue(Thread())
            return await drain(app)

    assert asyncio.run(use()) == Drained(done=1)


def test_only_the_plugin_imports_pytest() -> None:
    code = "import sys, notifyq.testing; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
