"""An app of the handlers in helpers/payments.py, connected to the test's database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import notifyq

from ..helpers.payments import app


@pytest.fixture
async def connected(dsn: str) -> AsyncIterator[notifyq.App]:
    async with app.connect(dsn):
        yield app
