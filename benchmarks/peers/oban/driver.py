"""oban-py without its paid add-on, which has the bulk acks."""

import asyncio
import sys
from contextlib import asynccontextmanager

import kit
from oban import Oban, worker
from oban.schema import install

NAME = PACKAGE = "oban"
SETTINGS = {
    "tuned": {"queues": {"default": kit.CONCURRENCY}, "max_size": kit.CONNECTIONS},  # a queue's limit; the pool's size
    "defaults": {"queues": {"default": 10}},  # as its README; a queue has no limit of its own
}
TASKS = {"tuned": 10_000, "defaults": 10_000}
LEFT = "SELECT count(*) FROM oban_jobs WHERE state IN ('available', 'scheduled', 'executing', 'retryable')"
FAILED = "SELECT count(*) FROM oban_jobs WHERE state NOT IN ('available', 'scheduled', 'executing', 'completed')"


@worker(queue="default")
class Mail:
    async def process(self, job):
        kit.started(job.args["at"])


async def pool(dsn, mode):
    return await Oban.create_pool(dsn, max_size=SETTINGS[mode].get("max_size"))


async def setup(dsn, mode):
    await install(await pool(dsn, mode))


@asynccontextmanager
async def client(dsn, mode):
    oban = Oban(pool=await pool(dsn, mode), name="client")

    async def one(payload):
        await oban.enqueue(Mail.new(payload))

    async def many(payloads):
        await oban.enqueue_many(Mail.new(payload) for payload in payloads)

    async with oban:
        yield one, many


async def work(dsn, mode):
    async with Oban(pool=await pool(dsn, mode), queues=SETTINGS[mode]["queues"]):
        await asyncio.Event().wait()


if __name__ == "__main__":
    kit.main(sys.modules["__main__"])
