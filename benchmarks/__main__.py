"""Run the benchmarks, all or those named, on an embedded PostgreSQL with fsync on, or on --dsn."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack

from notifyq import schema, store
from notifyq.embedded import Server

from . import drain, idle, insert, latency, timers
from .common import Line

NAMES = ("latency", "drain", "timers", "insert", "idle")


async def one(name: str, dsn: str, server: Server | None) -> list[Line]:
    match name:
        case "latency":
            return await latency.run(dsn)
        case "drain":
            return await drain.run(dsn)
        case "timers":
            return await timers.run(dsn)
        case "insert":
            return await insert.run(dsn, server.binaries.bin_dir if server else None)
        case _:
            return await idle.run(None if server else dsn)


async def migrate(dsn: str) -> str:
    conn = await store.connect(dsn)
    await schema.migrate(conn)
    version = await store.server_version(conn)
    await conn.close()
    return version


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none")
    parser.add_argument("--dsn", help="a database to run on; its notifyq tables are EMPTIED")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    with ExitStack() as stack:
        server = None if options.dsn else stack.enter_context(Server(durable=True))
        dsn = options.dsn or (server.dsn() if server else "")
        print(f"PostgreSQL {asyncio.run(migrate(dsn))}, {'embedded, fsync on' if server else 'the given server'}")
        for name in options.names or NAMES:
            for line in asyncio.run(one(name, dsn, server)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
