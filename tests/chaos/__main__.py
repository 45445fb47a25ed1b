"""Run it: prints the table, and exits with 1 if a promise was broken, or if nothing was injected."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from . import mutants, report
from .checker import check
from .faults import FAULTS
from .stage import Stage


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults; what is left then has a minute to end")
    parser.add_argument("--seed", type=int, help="the schedule of an earlier run")
    parser.add_argument("--fault", action="append", metavar="NAME", help="only those that begin so; repeatable")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="run notifyq with a known mistake; must fail")
    options = parser.parse_args()
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    chosen = [fault for fault in FAULTS if not options.fault or fault.name.startswith(tuple(options.fault))]
    if not chosen:
        parser.error(f"no such fault; there are: {'; '.join(fault.name for fault in FAULTS)}")
    print(f"chaos for {options.minutes:g} minutes; the same schedule again: SEED={seed}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="notifyq-chaos-") as name:
        folder = Path(name)
        environment: dict[str, str] = {}
        schema = None
        if options.mutant:
            (folder / "mutant").mkdir()
            schema = mutants.breed(options.mutant, folder / "mutant")
            environment["PYTHONPATH"] = os.pathsep.join([str(folder / "mutant"), os.environ.get("PYTHONPATH", "")])
        stage = Stage(
            seed,
            folder,
            faults=chosen,
            environment=environment,
            schema=schema,
            say=lambda text: print(text, flush=True),
        )
        history = asyncio.run(stage.run(options.minutes * 60))
    breaches = check(history)
    print(*report.told(history, breaches), "", *report.table(history, breaches), "", sep="\n")
    print(report.summary(history))
    injected = sum(window.name != "(no fault)" for window in history.windows)
    print(
        f"{injected} faults in {time.monotonic() - begin:.0f} s, {len(breaches)} promises broken; "
        f"the same schedule again: SEED={seed}"
    )
    if not injected:
        print("nothing was injected, so nothing was shown")
    return 1 if breaches or not injected else 0


if __name__ == "__main__":
    sys.exit(main())
