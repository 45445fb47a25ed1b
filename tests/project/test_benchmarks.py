"""Every benchmark runs, with a tenth of its work. What it measures then means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.__main__ import NAMES, table
from benchmarks.common import Line, Plot

PROJECT = Path(__file__).parents[2]
FAST = {"codec"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.long]) for n in NAMES])
def test_benchmark(name: str, tmp_path: Path) -> None:
    """It ends without error, and leaves its lines and plots."""
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_bytes())
    assert found["where"]["settings"]["fsync"] == "on"
    assert found["lines"]
    for line in found["lines"]:
        assert line["what"] in done.stdout
    for plot in tmp_path.glob("*.svg"):
        assert ET.parse(plot).getroot().tag.endswith("svg")


def test_failure_is_reported(tmp_path: Path) -> None:
    """A benchmark that can't run fails the whole, by name."""
    nowhere = f"postgresql://nobody@/nothing?host={tmp_path}"
    command = [sys.executable, "-m", "benchmarks", "timers", "--dsn", nowhere, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED: DatabaseError" in done.stdout
    assert "failed: timers" in done.stderr


def test_plots(tmp_path: Path) -> None:
    """One file a name, the same bytes each time."""
    pytest.importorskip("matplotlib", reason="`make bench` installs it")
    series = {"a": [(1.0, 2.0), (4.0, 30.0)], "b": [(1.0, 3.0)]}
    panels = [Plot("two", title, "x", "y", series, log_x=True, log_y=True) for title in ("left", "right")]
    drawn: list[bytes] = []
    for _ in range(2):
        plots.draw(tmp_path, [*panels, Plot("one", "alone", "x", "y", series)])
        drawn.append((tmp_path / "two.svg").read_bytes())
    assert drawn[0] == drawn[1]
    assert {path.name for path in tmp_path.iterdir()} == {"one.svg", "two.svg"}


def test_aims() -> None:
    """An aim bounds the ratio where there is one, else the value; and the table says whether it was met."""
    assert Line("a", 1, "s").met is None
    assert Line("a", 1, "s", "b", 0.9, least=0.8).met is True
    assert Line("a", 1, "s", "b", 0.7, least=0.8).met is False
    assert Line("a", 3, "s", most=2).met is False
    assert Line("a", 2, "s", least=1, most=2).met is True
    short, long = table([Line("a", 1234.5, "/s"), Line("bcd", 0.123, "ms", "floor", 1.5, most=1.2)]).splitlines()
    assert short.split() == ["a", "1,234", "/s"]
    assert long.split() == ["bcd", "0.123", "ms", "1.50", "x", "floor", "<=", "1.2", "MISSED"]
