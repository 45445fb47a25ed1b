"""Texts that are no ids, as a stranger could notify."""

from __future__ import annotations

GARBAGE = [
    "",
    "x",
    "-1",
    "0",
    "1e3",
    "１",
    "9" * 7000,
    "99999999999999999999",
    "\n1",
    "1; DROP TABLE notifyq.task",
    "☃",
]
