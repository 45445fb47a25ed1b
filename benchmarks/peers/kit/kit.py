"""What the Python drivers share: the commands, the payload and the clocks. The standard library and uvloop only.

A driver is a module with NAME, PACKAGE, SETTINGS (mode -> what the documentation calls it -> value), TASKS (mode -> how
many tasks a drain gets), LEFT and FAILED (counts of what isn't durably done, and of what ended otherwise), and

    setup(dsn, mode)       makes the tables and what else must be there
    client(dsn, mode)      an async context manager of (enqueue(payload), bulk(payloads))
    work(dsn, mode)        runs a worker here until it is cancelled; its handler calls `started(at)` and no more

`python driver.py COMMAND ...` prints its answer as one line of JSON.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import sys
import time

import uvloop

CONCURRENCY = 100  # handlers at once, where it is a setting: notifyq's default
CONNECTIONS = 16  # of a producer's pool, where its size is a setting: one for each of the 16 that enqueue

delays = []  # seconds from before the enqueue call to the handler's start


def payload(at=0.0):
    """About 100 bytes; `at` is the time of its enqueue call, where anybody wants to know."""
    return {"user": {"id": "3f2b8a7e-0001", "email": "somebody@example.org"}, "key": "k" * 24, "at": at}


def started(at):
    """The whole of every handler."""
    if at:
        delays.append(time.monotonic() - at)


async def bulk(peer, dsn, mode, count):
    payloads = [payload() for _ in range(count)]
    async with peer.client(dsn, mode) as (_, many):
        begin = time.monotonic()
        await many(payloads)
        return {"rate": count / (time.monotonic() - begin)}


async def enqueue(peer, dsn, mode, seconds, clients):
    async def loop():
        count = 0
        while time.monotonic() < end:
            await one(payload())
            count += 1
        return count

    async with peer.client(dsn, mode) as (one, _):
        await asyncio.gather(*(one(payload()) for _ in range(clients)))  # the pool has its connections
        begin = time.monotonic()
        end = begin + seconds
        counts = await asyncio.gather(*(loop() for _ in range(clients)))
        return {"rate": sum(counts) / (time.monotonic() - begin)}


async def latency(peer, dsn, mode, count, gap):
    worker = asyncio.create_task(peer.work(dsn, mode))
    async with peer.client(dsn, mode) as (one, _):
        await one(payload(time.monotonic()))
        async with asyncio.timeout(60):
            while not delays:
                await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # until it is idle again
        delays.clear()
        for _ in range(count):
            begin = time.monotonic()
            await one(payload(begin))
            await asyncio.sleep(max(0.0, begin + gap - time.monotonic()))
            if worker.done():
                worker.result()
                raise RuntimeError("the worker returned")
        for _ in range(100):
            if len(delays) < count:
                await asyncio.sleep(0.1)
        return {"seconds": list(delays)}


def main(peer):
    command, *args = sys.argv[1:]
    if command == "about":
        answer = {
            "version": importlib.metadata.version(peer.PACKAGE),
            "runtime": f"Python {platform.python_version()}",
            **{name.lower(): getattr(peer, name) for name in ("SETTINGS", "TASKS", "LEFT", "FAILED")},
        }
    elif command in {"setup", "work"}:
        answer = uvloop.run(getattr(peer, command)(*args))
    else:
        dsn, mode, *numbers = args
        job = {"bulk": bulk, "enqueue": enqueue, "latency": latency}[command]
        answer = uvloop.run(ended(job(peer, dsn, mode, *map(json.loads, numbers))))
    print(json.dumps(answer), flush=True)


async def ended(job):
    """Print the answer and exit: how long a peer's worker takes to stop isn't measured here."""
    print(json.dumps(await job), flush=True)
    os._exit(0)
