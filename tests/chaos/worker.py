"""A worker in a process of its own, with a lease that can run out in a chaos run: `worker DSN OPTIONS`, as JSON.

The other half of the fleet is the command `notifyq worker`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import anyio

import notifyq

from .app import app


async def main(dsn: str, options: dict[str, Any]) -> None:
    stop, force = anyio.Event(), anyio.Event()

    def stopping() -> None:
        (force if stop.is_set() else stop).set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping)
    async with app.connect(dsn):
        await app.run_worker(stop=stop, force=force, **options)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
    except notifyq.DatabaseError:
        sys.exit(3)  # as the command: there is none
