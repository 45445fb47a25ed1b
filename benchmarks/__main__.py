"""Run the benchmarks, all or those named, each on a fresh embedded PostgreSQL with fsync on, or on --dsn."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from notifyq.database import connection, schema
from notifyq.embedded import Server

from . import plots
from .common import SERVER, Bench, Line, Result, warm_up

NAMES = ("drain", "enqueue", "latency", "timers", "herd", "scale", "bloat", "idle", "codec", "results")

TOLD = (
    "fsync", "synchronous_commit", "wal_sync_method", "full_page_writes", "wal_level", "commit_delay", "shared_buffers",
    "max_wal_size", "max_connections", "autovacuum", "jit",
)  # fmt: skip


@contextmanager
def database(dsn: str | None, quick: bool) -> Generator[Bench]:
    if dsn:
        yield Bench(dsn, None, quick)
    else:
        with Server(durable=True, settings=SERVER) as server:
            yield Bench(server.dsn(), server, quick)


async def measure(name: str, bench: Bench) -> tuple[Result, dict[str, Any]]:
    """One benchmark, and where it ran."""
    conn = await connection.connect(bench.dsn, role="benchmark")
    await schema.migrate(conn)
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    if bench.server and not bench.quick:
        await warm_up(conn)
    began = time.perf_counter()
    result: Result = await import_module(f".{name}", __package__).run(bench)
    where = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "quick": bench.quick,
        "postgresql": await connection.server_version(conn),
        "embedded": bench.server is not None,
        "settings": {setting: await conn.fetchval("SELECT current_setting($1)", setting) for setting in TOLD},
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    await conn.execute("TRUNCATE notifyq.task, notifyq.finished")
    await conn.close()
    return result, where


def table(lines: Sequence[Line]) -> str:
    rows = [
        (
            line.what,
            number(line.value),
            line.unit,
            "" if line.ratio is None else f"{line.ratio:.2f} x {line.reference}",
            line.aim,
            {None: "", True: "met", False: "MISSED"}[line.met],
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    w, v, u, r, a = widths
    return "\n".join(
        f"  {what:<{w}}  {value:>{v}} {unit:<{u}}  {ratio:<{r}}  {aim:<{a}}  {met}".rstrip()
        for what, value, unit, ratio, aim, met in rows
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def keep(folder: Path, name: str, result: Result, where: dict[str, Any]) -> None:
    """DIR/NAME.json, and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line._asdict() | {"met": line.met} for line in result.lines]
    found = {"benchmark": name, "where": where, "lines": lines, "data": result.data}
    (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    plots.draw(folder, result.plots)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none")
    parser.add_argument("--dsn", help="a database to run on; its notifyq tables are EMPTIED")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="for JSON and SVG")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the work: does it run? The figures say nothing"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    failed: list[str] = []
    for name in options.names or NAMES:
        print(f"{name} ...", flush=True)
        try:
            # On the loop that `notifyq worker` runs on, the floors too.
            with (
                database(options.dsn, options.quick) as bench,
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop,
            ):
                result, where = loop.run(measure(name, bench))
            keep(options.out, name, result, where)
        except (Exception, SystemExit) as error:
            failed.append(name)
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{table(result.lines)}\n  {where['seconds']:g} s, PostgreSQL {where['postgresql']}\n", flush=True)
    print(f"JSON and plots: {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
