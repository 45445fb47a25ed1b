"""The log records of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Logged = Callable[[str], list[dict[str, Any]]]


def ids_of(lines: list[dict[str, Any]]) -> list[int]:
    """The ids of all tasks that these log lines name, in order: one that is named twice is there twice."""
    return sorted(id for line in lines for id in line["ids"])
