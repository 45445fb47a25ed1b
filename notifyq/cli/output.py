"""Output for people and for pipes. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

NUMBERS = (
    "id",
    "scheduled",
    "ready",
    "running",
    "done",
    "dead",
    "cancelled",
    "oldest ready",
    "longest running",
    "attempts",
    "slots",
    "waiting",
    "limit",
    "workers",
)


def our_version() -> str:
    """The version of the installed notifyq."""
    try:
        return version("notifyq")
    except PackageNotFoundError:
        return "0+checkout"


def say(text: str) -> None:
    """Print a message on stderr, each line after "notifyq: "."""
    for line in text.splitlines() or [""]:
        click.echo(f"notifyq: {line}", err=True)


def span(seconds: float | None) -> str:
    """A duration as a person reads it: 5s, 12m, 3h, 2d. None: ""."""
    if seconds is None:
        return ""
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{max(0.0, seconds) / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def percent(task: Mapping[str, Any]) -> str:
    """The progress of a task, as `40% resizing`; "" if its handler reports none."""
    return "" if task["progress"] is None else f"{task['progress']:.0%} {task['note'] or ''}".strip()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their columns: by rich on a terminal, if rich is installed, else as aligned text."""
    cells = [[plain(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _rich(columns, cells)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        padded = (
            cell.rjust(width) if column in NUMBERS else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        last = column == columns[-1]
        shown.add_column(
            column,
            justify="right" if column in NUMBERS else "left",
            no_wrap=column in NUMBERS or last,
            overflow="ellipsis" if last else "fold",
        )
    styles = {"dead": "red", "running": "green", "scheduled": "cyan", "done": "dim", "cancelled": "dim"}
    for row in rows:
        # A Text, as rich reads a str as markup, and a queue may be called [red].
        shown.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console().print(shown)


def plain(cell: object) -> str:
    """One line of printable characters: a value in the database may have control sequences for the terminal."""
    text = "" if cell is None else str(cell)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
