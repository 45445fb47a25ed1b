"""Sessions that the tests of this folder step by hand."""

from __future__ import annotations

import pytest

from ..helpers.steps import Session, Steps


@pytest.fixture
async def w(s: Steps) -> Session:
    """A worker's session."""
    return await s.worker("w")


@pytest.fixture
async def p(s: Steps) -> Session:
    """A session of a person at psql."""
    return await s.session("p")


@pytest.fixture
async def k(s: Steps) -> Session:
    """The heartbeat's session of another worker."""
    return await s.worker("heartbeat")


@pytest.fixture
async def bell(s: Steps) -> Session:
    """A worker's session for the turn and the bell, in the transaction in which it will sleep."""
    bell = await s.worker("bell")
    await bell("BEGIN")
    return bell
