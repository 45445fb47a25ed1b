"""What a person sees while the demo runs: a live table in a terminal, a line a second elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .check import CHECKS, Facts

STATES = ("scheduled", "ready", "running", "done", "dead")


class Screen(ExitStack):
    """While it is entered, a terminal shows the live table below the printed lines."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._live: Live | None = None
        self.interval = 1.0  # seconds, between two calls of `show`
        if self._console.is_terminal:
            self._live = self.enter_context(Live(console=self._console, auto_refresh=False, transient=True))
            self.interval = 0.25

    def print(self, text: str = "", style: str | None = None) -> None:
        self._console.print(text, style=style)

    def event(self, text: str) -> None:
        """Print what happened, and when."""
        self.print(f"{time.monotonic() - self._began:5.1f} s  {text}", "bold")

    def show(self, tasks: Counter[tuple[str, str]], note: str) -> None:
        """Show how many tasks there are by type and state."""
        seconds = time.monotonic() - self._began
        total = Counter[str]()
        for (_, state), count in tasks.items():
            total[state] += count
        if self._live is None:
            self.event("  " + "  ".join(f"{total[state]:,} {state}" for state in STATES) + f"; {note}")
            return
        table = Table(title=f"notifyq demo, {seconds:.1f} s", caption=note, min_width=72)
        for column in ("type", *STATES):
            table.add_column(column, justify="left" if column == "type" else "right")
        for type in sorted({type for type, _ in tasks}):
            table.add_row(type, *(f"{tasks[type, state]:,}" for state in STATES))
        table.add_section()
        table.add_row("all", *(f"{total[state]:,}" for state in STATES), style="bold")
        self._live.update(table, refresh=True)

    def summary(self, facts: Facts) -> int:
        """Print it. Returns how many checks failed."""
        self.print(f"\n{'type':28}{'enqueued':>10}{'done':>10}{'dead':>8}{'run again':>12}", "bold")
        for type, enqueued, done, dead, again in facts.totals():
            self.print(f"{type:28}{enqueued:10,}{done:10,}{dead:8,}{again:12,}")
        self.print()
        findings = [check(facts) for check in CHECKS]
        for finding in findings:
            self.print(
                f"FAILED  {finding}" if finding.wrong else f"ok      {finding}", "red" if finding.wrong else "green"
            )
        failed = sum(bool(finding.wrong) for finding in findings)
        self.print(
            f"\n{failed} of {len(CHECKS)} checks failed" if failed else f"\nall {len(CHECKS)} checks hold", "bold"
        )
        if not failed:
            self.print('what next: `notifyq dev` for a database to try things on, and README\'s "A first task"')
        return failed
