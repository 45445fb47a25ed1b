"""Fixtures of pytest, for those who ask: `pytest_plugins = ["notifyq.testing.plugin"]`, or `-p notifyq.testing.plugin`.

    notifyq_dsn         a database with the schema for this test alone: its DSN
    notifyq_databases   of the session: where that comes from
    notifyq_server_dsn  of the session: the server. NOTIFYQ_TEST_DSN names one on which the role may create databases;
                        without it an embedded one starts (the extra `embedded`). Yours, if you define the fixture

They are plain fixtures, so tests may be plain functions, or coroutines of anyio's or pytest-asyncio's plugin, whatever
its mode and the scope of its loops: what is asynchronous here runs on an event loop in a thread of its own.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .databases import Databases


@pytest.fixture(scope="session")
def notifyq_server_dsn() -> Generator[str, None, None]:
    """A database of the server on which those of the tests are created."""
    if dsn := os.environ.get("NOTIFYQ_TEST_DSN"):
        yield dsn
        return
    from notifyq.embedded import Server  # an extra, and not for every system

    with Server() as server:
        yield server.dsn("postgres")


@pytest.fixture(scope="session")
def _notifyq_portal() -> Generator[BlockingPortal, None, None]:  # pyright: ignore[reportUnusedFunction]
    with start_blocking_portal("asyncio") as portal:
        yield portal


@pytest.fixture(scope="session")
def notifyq_databases(_notifyq_portal: BlockingPortal, notifyq_server_dsn: str) -> Generator[Databases, None, None]:
    """Makes databases, for a test that wants more than one, and for fixtures of another scope."""
    with _notifyq_portal.wrap_async_context_manager(Databases(notifyq_server_dsn)) as databases:
        yield databases


@pytest.fixture
def notifyq_dsn(_notifyq_portal: BlockingPortal, notifyq_databases: Databases) -> Generator[str, None, None]:
    """A database with the schema, and nothing in it, for this test alone: its DSN."""
    with _notifyq_portal.wrap_async_context_manager(notifyq_databases.new()) as dsn:
        yield dsn
