"""notifyq beside the queues people know, in turns on one embedded PostgreSQL with fsync on."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from notifyq.database import connection
from notifyq.embedded import Server

from ..__main__ import keep, table
from ..common import SERVER, Result, warm_up
from . import measures
from .driven import Peer
from .environments import PEERS
from .report import BLOAT, Figures, figures, lines, plots

ROUNDS = 3
BLOAT_TASKS = 100_000

STEPS: dict[str, Callable[[Peer], Awaitable[Any]]] = {
    "drain": lambda peer: measures.drain(peer, "tuned"),
    "defaults": lambda peer: measures.drain(peer, "defaults"),
    "enqueue": lambda peer: measures.enqueue(peer, consuming=False),
    "consuming": lambda peer: measures.enqueue(peer, consuming=True),
    "latency": measures.latency,
    "bloat": lambda peer: measures.drain(peer, "tuned", tasks=BLOAT_TASKS, held=True),
}


async def measure(names: list[str], server: Server, rounds: int) -> tuple[Figures, dict[str, str]]:
    """step -> queue -> what each round gave; and queue -> what it failed at."""
    conn = await connection.connect(server.dsn(), role="benchmark")
    await warm_up(conn)
    await conn.close()
    failed: dict[str, str] = {}
    peers: list[Peer] = []
    for name in ("notifyq", *names):
        try:
            await (peer := Peer(name, server)).start()
            peers.append(peer)
        except Exception as error:  # whatever it is, the others go on
            failed[name] = f"can't be set up: {error}"
            print(f"{name} {failed[name]}", flush=True)
    found: Figures = {step: {peer.name: [] for peer in peers if asked(step, peer)} for step in STEPS}
    for round_ in range(rounds):
        for step, ask in STEPS.items():
            for peer in peers[round_:] + peers[:round_]:  # no peer is always first
                if peer.name not in found[step] or (step == "defaults" and round_):  # of these, once says enough
                    continue
                if sys.stderr.isatty():
                    print(f"\r\033[Kround {round_ + 1}, {step}: {peer.name}\r", end="", file=sys.stderr, flush=True)
                try:
                    found[step][peer.name].append(await ask(peer))
                except Exception as error:  # whatever it is, the others go on
                    del found[step][peer.name]
                    failed[peer.name] = f"{step}: {type(error).__name__}: {error}"
                    print(f"{peer.name} failed at {failed[peer.name]}", flush=True)
    print(figures(peers, found))
    return found, failed


def asked(step: str, peer: Peer) -> bool:
    """The slow ones would take minutes to show what a snapshot costs, and notifyq's defaults are what it has."""
    match step:
        case "bloat":
            return peer.name in BLOAT
        case "defaults":
            return peer.name != "notifyq"
        case _:
            return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all if none")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="for JSON and SVG")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the drivers, like Ctrl-C
    with Server(durable=True, port=port, settings=SERVER) as server:
        found, failed = asyncio.run(measure(options.names or list(PEERS), server, options.rounds))
        where = {
            "seconds": round(time.monotonic() - began, 1),
            "postgresql": server.binaries.version,
            "rounds": options.rounds,
            "failed": failed,
        }
    if aims := lines(found):
        print(table(aims))
    keep(options.out, "peers", Result(aims, found, plots(found)), where)
    print(f"\n{where['seconds']:g} s; JSON and plots: {options.out}")
    for name, what in failed.items():
        print(f"FAILED: {name}: {what.splitlines()[0]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
