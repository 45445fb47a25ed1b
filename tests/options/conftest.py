"""An app without handlers, for tests of what is enqueued."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import notifyq


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[notifyq.App]:
    app = notifyq.App()
    async with app.connect(dsn):
        yield app
