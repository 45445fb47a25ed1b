"""Run it: prints the table, and exits with 1 if a promise was broken, or if nothing was injected."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from . import mutants, report
from .checker import check
from .faults import FAULTS
from .fleet import PROJECT
from .history import History
from .play import play


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults; what is left then has a minute to end")
    parser.add_argument("--seed", type=int, help="the schedule of an earlier run")
    parser.add_argument("--fault", action="append", metavar="NAME", help="only those that begin so; repeatable")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="run notifyq with a known mistake; must fail")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the history, as JSON")
    parser.add_argument("--check", type=Path, metavar="FILE", help="run nothing, and check that one")
    options = parser.parse_args()
    if options.check:
        return tell(msgspec.json.decode(options.check.read_bytes(), type=History))
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    chosen = [fault for fault in FAULTS if not options.fault or fault.name.startswith(tuple(options.fault))]
    if not chosen:
        parser.error(f"no such fault; there are: {'; '.join(fault.name for fault in FAULTS)}")
    print(f"chaos for {options.minutes:g} minutes; the same schedule again: SEED={seed}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="notifyq-chaos-") as name:
        folder = Path(name)
        project = mutants.breed(options.mutant, folder / "mutant") if options.mutant else PROJECT
        history = asyncio.run(play(seed, options.minutes * 60, folder, faults=chosen, project=project, say=say))
    print("all has ended; reading the history", flush=True)
    if options.save:
        options.save.write_bytes(msgspec.json.encode(history))
    code = tell(history)
    print(f"{time.monotonic() - begin:.0f} s; the same schedule again: SEED={seed}")
    return code


def tell(history: History) -> int:
    breaches = check(history)
    print(*report.told(history, breaches), "", *report.table(history, breaches), "", sep="\n")
    print(report.summary(history))
    injected = sum(window.name != "(no fault)" for window in history.windows)
    print(f"{injected} faults, {len(breaches)} promises broken")
    if not injected:
        print("nothing was injected, so nothing was shown")
    return 1 if breaches or not injected else 0


if __name__ == "__main__":
    sys.exit(main())
