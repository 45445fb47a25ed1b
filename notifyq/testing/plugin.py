"""Fixtures of pytest: `pytest_plugins = ["notifyq.testing.plugin"]`, or `-p notifyq.testing.plugin`.

    notifyq_dsn         the DSN of a database with the schema, for one test alone
    notifyq_databases   makes these databases, during the whole session
    notifyq_server_dsn  the DSN of their server, during the whole session. It is NOTIFYQ_TEST_DSN, whose role may create
                        databases; without it an embedded server starts (the extra `embedded`). To use another server,
                        define a fixture of this name

They are plain fixtures, so a test may be a plain function, or a coroutine of anyio's or pytest-asyncio's plugin in any
mode. The async code of the fixtures runs on an event loop in a thread of its own.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .databases import Databases


@pytest.fixture(scope="session")
def notifyq_server_dsn() -> Generator[str, None, None]:
    """The DSN of a database of the server on which the tests' databases are created."""
    if dsn := os.environ.get("NOTIFYQ_TEST_DSN"):
        yield dsn
        return
    from notifyq.embedded import Server  # imported here, as it is an extra, and doesn't run on every system

    with Server() as server:
        yield server.dsn("postgres")


@pytest.fixture(scope="session")
def _notifyq_portal() -> Generator[BlockingPortal, None, None]:  # pyright: ignore[reportUnusedFunction]
    with start_blocking_portal("asyncio") as portal:
        yield portal


@pytest.fixture(scope="session")
def notifyq_databases(_notifyq_portal: BlockingPortal, notifyq_server_dsn: str) -> Generator[Databases, None, None]:
    """Makes databases: for a test that needs several, and for fixtures of another scope."""
    with _notifyq_portal.wrap_async_context_manager(Databases(notifyq_server_dsn)) as databases:
        yield databases


@pytest.fixture
def notifyq_dsn(_notifyq_portal: BlockingPortal, notifyq_databases: Databases) -> Generator[str, None, None]:
    """The DSN of an empty database with the schema, for this test alone."""
    with _notifyq_portal.wrap_async_context_manager(notifyq_databases.new()) as dsn:
        yield dsn
