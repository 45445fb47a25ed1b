"""What CONTRIBUTING.md and SECURITY.md say of the code is there: files, names, links, and targets of make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = ["CONTRIBUTING.md", "SECURITY.md"]
FOLDERS = ("notifyq", "tests", "docs", "benchmarks", ".github")
SUFFIXES = {".py", ".sql", ".md", ".toml", ".yml"}


def files() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in (*ROOT.glob("*"), *inside) if path.suffix in SUFFIXES or path.name == "Makefile"]


def prose(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page)):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_its_files_are_there(page: str) -> None:
    """A path may begin anywhere: `worker/settle.py`."""
    paths = [f"/{path.relative_to(ROOT).as_posix()}" for path in files()]
    named = re.findall(r"[\w./-]+\.(?:py|sql|md|toml|yml)\b", prose(page))
    assert named
    for name in named:
        if not name.endswith("N.sql"):
            assert any(path.endswith(f"/{name}") for path in paths), name


def test_the_map_has_every_folder_and_module() -> None:
    """Those at the top of the package; each folder's own map is its `__init__`."""
    page = prose("CONTRIBUTING.md")
    for path in (ROOT / "notifyq").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in page, path.name


@pytest.mark.parametrize("page", PAGES)
def test_its_names_are_those_of_the_code(page: str) -> None:
    """Each identifier in backticks occurs in the code, whole."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in files() if path.suffix in {".py", ".sql"})
    words = set(re.findall(r"\w+", code))
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", prose(page), flags=re.DOTALL)):
        if re.fullmatch(r"[A-Za-z_.]+", quoted) and not quoted.endswith(tuple(SUFFIXES)):
            for word in re.findall(r"\w+", quoted):
                assert word in words, quoted


@pytest.mark.parametrize("page", PAGES)
def test_its_targets_of_make_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", prose(page), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
