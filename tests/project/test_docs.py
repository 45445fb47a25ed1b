"""What the pages under docs/ say of tests is so: each that they name is there, in the file that they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


@pytest.mark.parametrize("page", ["guarantees.md", "security.md", "upgrades.md"])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    """`[test_a: `test_x`, `test_y`; test_b]`, over lines and with other words in between."""
    named, missing = 0, []
    for bracket in re.findall(r"\[([^\]]*\btest_[^\]]*)\]", (DOCS / page).read_text(encoding="utf-8")):
        for part in re.split(r"[;,]\s*(?=test_\w+[:;,\]\s]*)", bracket):
            file = re.match(r"\s*(test_\w+)", part)
            if file is None:
                continue
            path = next(TESTS.rglob(f"{file[1]}.py"), TESTS / f"{file[1]}.py")
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            names = re.findall(r"`(test_\w+)", part)
            missing += [f"{file[1]}: {name}" for name in names if f"def {name}(" not in text]
            missing += [] if path.exists() else [str(path.name)]
            named += len(names)
    assert not missing
    assert named > 10
