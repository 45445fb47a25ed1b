"""The wheel: built without a network, holds what is read at run time, and works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import notifyq
from notifyq.database import connection, schema

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_what_is_in_it(wheel: Path) -> None:
    """Every module, statement and marker of the checkout, schema.sql beside them, and nothing of the tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "notifyq").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packaged = {name for name in names if not name.startswith("notifyq-")}
    assert packaged == sources | {"notifyq/schema.sql"}
    assert {"notifyq/py.typed", "notifyq/database/sql/worker/claim.sql", "notifyq/__init__.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.name == "notifyq-0.1.0-py3-none-any.whl"


LOOK = """
import sys; sys.path.insert(0, sys.argv[1])
import notifyq
from notifyq.database.connection import SQL
from notifyq.database.schema import schema_sql
assert notifyq.__file__.startswith(sys.argv[1]), notifyq.__file__
sys.stdout.buffer.write("\\0".join([schema_sql(), *sorted(SQL.values())]).encode())
"""


def test_installed_elsewhere_it_reads_its_own_files(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, as an installer does, in front of everything else; -I and another folder keep the checkout out."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    look = subprocess.run([sys.executable, "-I", "-c", LOOK, str(site)], cwd=tmp_path, capture_output=True, check=False)
    assert look.returncode == 0, look.stderr.decode()
    assert look.stdout.decode().split("\0") == [schema.schema_sql(), *sorted(connection.SQL.values())]
    assert (site / "notifyq" / "schema.sql").read_text() == (PROJECT / "schema.sql").read_text()


def test_the_command_is_there(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "notifyq = notifyq.cli:main" in archive.read(entry).decode()


def test_importing_it_is_cheap() -> None:
    """No demo, no embedded server, no tables for people; nothing printed, no warning."""
    code = (
        "import sys, notifyq; print(*(m for m in sys.modules if m.startswith(('notifyq.demo', 'notifyq.embedded',"
        " 'notifyq.cli.', 'rich', 'click', 'starlette', 'pytest'))))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert (run.stdout.strip(), run.stderr) == ("", "")
    assert notifyq.__doc__
