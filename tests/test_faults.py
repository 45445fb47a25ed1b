"""What dies, freezes or goes away, and what must hold then: nothing lost, nothing run twice except by the fault."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio

from notifyq import store


@asynccontextmanager
async def outage(dsn: str) -> AsyncIterator[None]:
    """Inside, this one database ends every session and takes no new one."""
    parts = urlsplit(dsn)
    name = parts.path.strip("/")
    admin = await store.connect(parts._replace(path="/postgres").geturl(), role="test")
    try:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await admin.close()
