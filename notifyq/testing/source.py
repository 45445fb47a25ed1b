"""Where the tasks of a test are: a connected app, a connection of asyncpg (maybe in a transaction), or a DSN."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from notifyq.app import App
from notifyq.database.connection import connect
from notifyq.errors import ConfigError

if TYPE_CHECKING:
    from notifyq.database.connection import Connection

    Source: TypeAlias = App | Connection | str
else:
    Source = Any


@asynccontextmanager
async def connection(source: Source) -> AsyncGenerator[Connection, None]:
    """A connection to the source. Raises ConfigError for an app that isn't connected, or another object."""
    if isinstance(source, App):
        source.check_loop("a helper of notifyq.testing", "connect the app on the test's own event loop, or pass a DSN")
        via = source._connected("this")  # pyright: ignore[reportPrivateUsage]
        async with via.acquire() as pooled:
            yield pooled
    elif isinstance(source, str):
        conn = await connect(source, role="test")
        try:
            yield conn
        finally:
            await conn.close()
    elif hasattr(source, "fetch"):
        yield source
    else:
        raise ConfigError(f"expected a connected app, a connection of asyncpg, or a DSN, not {source!r:.100}")
