"""`python -m tests.models`: write docs/doorbell.svg, and the tables in docs/protocol.md. Takes minutes."""

from __future__ import annotations

from pathlib import Path

from . import drawing
from .explore import explore
from .runs import RUNS, WRONG

docs = Path(__file__).parents[2] / "docs"
(docs / "doorbell.svg").write_text(drawing.draw(), encoding="utf-8")
holds = ["| holds in all states of | states | steps |", "| --- | ---: | ---: |"]
for run in RUNS:
    explored = explore(run.model())
    print(f"{run.text}: {explored} in {explored.seconds:.1f} s", flush=True)
    holds.append(drawing.row(run, explored))
fails = ["| changed | then | after steps |", "| --- | --- | ---: |"]
for text, model in WRONG.items():
    fails.append(drawing.wrong_row(text, explore(model())))
page = docs / "protocol.md"
text, heading, _ = page.read_text(encoding="utf-8").partition("## What was explored\n")
page.write_text("\n".join([text + heading, *holds, "", *fails, ""]), encoding="utf-8")
