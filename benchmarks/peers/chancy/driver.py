"""chancy."""

import logging
import sys
from contextlib import asynccontextmanager

import kit
from chancy import Chancy, Queue, Worker, job

NAME = PACKAGE = "chancy"
SETTINGS = {
    # A queue's "concurrency" bounds what a poll fetches, "eager_polling" polls again as soon as jobs complete,
    # and the asyncio executor is the one for handlers that wait.
    "tuned": {"executor": Chancy.Executor.Async, "concurrency": 1000, "eager_polling": True},
    "defaults": {},  # a process pool, as many at once as there are cores
}
TASKS = {"tuned": 20_000, "defaults": 1_000}
LEFT = "SELECT count(*) FROM chancy_jobs WHERE state IN ('pending', 'running', 'retrying')"
FAILED = "SELECT count(*) FROM chancy_jobs WHERE state NOT IN ('pending', 'running', 'succeeded')"


def mail_sync(*, user, key, at):
    kit.started(at)


async def mail(*, user, key, at):
    kit.started(at)


def app(dsn):
    log = logging.getLogger("quiet")
    log.setLevel(logging.ERROR)
    return Chancy(dsn, max_connection_pool_size=kit.CONNECTIONS, log=log)


async def setup(dsn, mode):
    async with app(dsn) as chancy:
        await chancy.migrate()
        await chancy.declare(Queue("default", **SETTINGS[mode]))


@asynccontextmanager
async def client(dsn, mode):
    import driver  # by the name a worker imports it by

    handler = job()(driver.mail if mode == "tuned" else driver.mail_sync)
    async with app(dsn) as chancy:

        async def one(payload):
            await chancy.push(handler.job.with_kwargs(**payload))

        async def many(payloads):
            async for _ in chancy.push_many([handler.job.with_kwargs(**payload) for payload in payloads]):
                pass

        yield one, many


async def work(dsn, mode):
    async with app(dsn) as chancy, Worker(chancy) as worker:
        await worker.wait_for_shutdown()


if __name__ == "__main__":
    kit.main(sys.modules["__main__"])
