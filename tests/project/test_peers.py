"""The comparison with other queues: its arithmetic, and what it does about a peer that can't be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.measures import tenths

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]


def test_tenths() -> None:
    """Each tenth of what was done after the first sample, at the rate it had: here 100/s, then 50/s."""
    samples = [(1.0, 100), (4.0, 400), (6.0, 600), (16.0, 1100)]
    assert tenths(samples) == pytest.approx([100.0] * 5 + [50.0] * 5)


def test_peer_that_cannot_be_had(tmp_path: Path) -> None:
    """It is named, the others are measured, and the whole fails."""
    command = [sys.executable, "-m", "benchmarks.peers", "pg-boss", "--rounds", "0", "--out", str(tmp_path)]
    environ = os.environ | {"PATH": str(tmp_path)}  # where there is no Node
    done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "pg-boss can't be set up" in done.stdout
    assert "FAILED: pg-boss" in done.stderr
    assert "\nnotifyq" in done.stdout
