"""saq, with its Postgres queue."""

import asyncio
import sys
from contextlib import asynccontextmanager

import kit
from saq import Queue, Worker

NAME = PACKAGE = "saq"
SETTINGS = {
    "tuned": {"concurrency": kit.CONCURRENCY},  # "number of jobs to process concurrently"
    "defaults": {},
}
TASKS = {"tuned": 5_000, "defaults": 5_000}
LEFT = "SELECT count(*) FROM saq_jobs WHERE status IN ('new', 'queued', 'active')"
FAILED = "SELECT count(*) FROM saq_jobs WHERE status NOT IN ('new', 'queued', 'active', 'complete')"


async def mail(ctx, *, user, key, at):
    kit.started(at)


@asynccontextmanager
async def connected(dsn):
    queue = Queue.from_url(dsn)  # its pool grows to 20 connections
    await queue.connect()
    yield queue
    await queue.disconnect()


async def setup(dsn, mode):
    async with connected(dsn):
        pass


@asynccontextmanager
async def client(dsn, mode):
    async with connected(dsn) as queue:

        async def one(payload):
            await queue.enqueue("mail", kwargs=payload)

        async def many(payloads):  # there is no bulk enqueue: 16 at a time
            rest = iter(payloads)

            async def feed():
                for payload in rest:
                    await one(payload)

            await asyncio.gather(*(feed() for _ in range(kit.CONNECTIONS)))

        yield one, many


async def work(dsn, mode):
    async with connected(dsn) as queue:
        await Worker(queue, [mail], **SETTINGS[mode]).start()


if __name__ == "__main__":
    kit.main(sys.modules["__main__"])
