"""What a person sees while it runs: a live table in a terminal, a line a second elsewhere or without rich."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

STATES = ("scheduled", "ready", "running", "done", "dead")


class Snapshot(msgspec.Struct, kw_only=True):
    """How things stand."""

    tasks: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter[tuple[str, str]])  # by type and state
    running: dict[str, int | None] = msgspec.field(default_factory=dict[str, int | None])  # by worker; None: gone
    received: int = 0  # mails
    refused: int = 0

    def count(self, state: str) -> int:
        return sum(number for (_, its), number in self.tasks.items() if its == state)

    @property
    def workers(self) -> str:
        return ", ".join(f"{name} {'gone' if n is None else f'runs {n}'}" for name, n in self.running.items())

    @property
    def mails(self) -> str:
        return f"{self.received:,} mails, {self.refused:,} refused"


class Screen:
    """`event` and `show`, from when it is entered; the clock starts with `begin`."""

    def __init__(self, live: bool | None = None) -> None:
        """live: None is for "if stdout is a terminal and rich is there"."""
        self._began = time.monotonic()
        self._live = _live() if live or (live is None and sys.stdout.isatty()) else None
        self.every = 0.25 if self._live else 1.0  # seconds, between two calls of `show`

    def begin(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def event(self, text: str) -> None:
        """Something happened."""
        self.line(f"{self.seconds:5.1f} s  {text}", "bold")

    def show(self, now: Snapshot) -> None:
        """How it goes."""
        if self._live:
            self._live.update(_table(now, self.seconds), refresh=True)
            return
        states = "  ".join(f"{now.count(state):,} {state}" for state in STATES)
        self.line(f"{self.seconds:5.1f} s    {states}; {now.mails}; {now.workers}")

    def line(self, text: str, style: str | None = None) -> None:
        if self._live:
            self._live.console.print(text, style=style, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._live:
            self._live.stop()


def _live() -> Live | None:
    try:
        from rich.live import Live
    except ImportError:
        return None
    return Live(auto_refresh=False, transient=True)  # the summary takes the table's place


def _table(now: Snapshot, seconds: float) -> Table:
    from rich.table import Table

    table = Table(title=f"notifyq demo, {seconds:.1f} s", caption=f"{now.mails}\n{now.workers}", min_width=72)
    table.add_column("type")
    for state in STATES:
        table.add_column(state, justify="right")
    for type in sorted({type for type, _ in now.tasks}):
        table.add_row(type, *(f"{now.tasks[type, state]:,}" for state in STATES))
    table.add_section()
    table.add_row("all", *(f"{now.count(state):,}" for state in STATES), style="bold")
    return table
