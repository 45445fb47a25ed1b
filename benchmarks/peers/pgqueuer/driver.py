"""pgqueuer, with its asyncpg driver."""

import json
import sys
from contextlib import asynccontextmanager

import asyncpg
import kit
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries

NAME = PACKAGE = "pgqueuer"
SETTINGS = {
    "tuned": {"batch_size": 1000},  # "--batch-size: number of jobs to pull from the queue at once"; flushes as many
    "defaults": {},
}
TASKS = {"tuned": 100_000, "defaults": 20_000}
LEFT = "SELECT count(*) FROM pgqueuer"  # done is deleted, and logged
FAILED = "SELECT count(*) FROM pgqueuer_log WHERE status NOT IN ('queued', 'picked', 'successful')"


async def setup(dsn, mode):
    conn = await asyncpg.connect(dsn)
    await Queries(AsyncpgDriver(conn)).install()
    await conn.close()


@asynccontextmanager
async def client(dsn, mode):
    async with asyncpg.create_pool(dsn, min_size=kit.CONNECTIONS, max_size=kit.CONNECTIONS) as pool:
        queries = Queries(AsyncpgPoolDriver(pool))

        async def one(payload):
            await queries.enqueue("mail", json.dumps(payload).encode())

        async def many(payloads):
            count = len(payloads)
            await queries.enqueue(["mail"] * count, [json.dumps(p).encode() for p in payloads], [0] * count)

        yield one, many


async def work(dsn, mode):
    pgq = PgQueuer(AsyncpgDriver(await asyncpg.connect(dsn)))

    @pgq.entrypoint("mail")
    async def mail(job):
        kit.started(json.loads(job.payload)["at"])

    await pgq.run(**SETTINGS[mode])


if __name__ == "__main__":
    kit.main(sys.modules["__main__"])
