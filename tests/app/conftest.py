"""An empty app."""

from __future__ import annotations

import pytest

import notifyq


@pytest.fixture
def app() -> notifyq.App:
    return notifyq.App()
