"""What the user sees while the demo runs: in a terminal a live table, elsewhere a line each second."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .check import CHECKS, Facts

STATES = ("scheduled", "ready", "running", "done", "dead")


class Screen:
    """Prints lines. In a terminal, they appear above a live table, which is there while `live` is entered."""

    def __init__(self) -> None:
        self.live = Live(
            console=Console(highlight=False, markup=False, soft_wrap=True), auto_refresh=False, transient=True
        )
        self.is_terminal = self.live.console.is_terminal
        self._began = time.monotonic()

    def print(self, text: str = "", style: str | None = None) -> None:
        self.live.console.print(text, style=style)

    def event(self, text: str) -> None:
        """Print what happened, and when."""
        self.print(f"{time.monotonic() - self._began:5.1f} s  {text}", "bold")

    def show(self, tasks: Counter[tuple[str, str]], note: str) -> None:
        """Show how many tasks there are by type and state."""
        table = Table(title=f"notifyq demo, {time.monotonic() - self._began:.1f} s", caption=note, min_width=72)
        for column in ("type", *STATES):
            table.add_column(column, justify="left" if column == "type" else "right")
        for type in sorted({type for type, _ in tasks}):
            table.add_row(type, *(f"{tasks[type, state]:,}" for state in STATES))
        totals = [f"{sum(tasks[type, state] for type, its in tasks if its == state):,}" for state in STATES]
        table.add_section()
        table.add_row("all", *totals, style="bold")
        self.live.update(table, refresh=True)  # in a terminal; elsewhere it shows nothing
        if not self.is_terminal:
            self.event("  " + "  ".join(map(" ".join, zip(totals, STATES, strict=True))) + f"; {note}")

    def summary(self, facts: Facts) -> int:
        """Print the summary. Returns how many checks failed."""
        self.print(f"\n{'type':28}{'enqueued':>10}{'done':>10}{'dead':>8}{'run again':>12}", "bold")
        for type, enqueued, done, dead, again in facts.totals():
            self.print(f"{type:28}{enqueued:10,}{done:10,}{dead:8,}{again:12,}")
        self.print()
        findings = [check(facts) for check in CHECKS]
        for finding in findings:
            mark, style = ("FAILED", "bold red") if finding.wrong else ("ok    ", "green")
            self.print(f"{mark}  {finding}", style)
        failed = sum(bool(finding.wrong) for finding in findings)
        if failed:
            self.print(f"\n{failed} of {len(CHECKS)} checks failed", "bold")
        else:
            self.print(f"\nall {len(CHECKS)} checks hold", "bold")
            next_one = f"{notifyq_command()} dev"
            self.print(f'what next: `{next_one}` for a database to try things on, and README\'s "A first task"')
        return failed


def notifyq_command() -> str:
    """How this notifyq is run from the shell: `make demo` has neither installed nor activated the command."""
    if shutil.which("notifyq"):
        return "notifyq"
    return f"{shlex.quote(os.path.relpath(sys.executable))} -m notifyq"
