"""notifyq, by its public API and its command line, with its defaults."""

import os
import sys
from contextlib import asynccontextmanager

import kit
import msgspec

import notifyq

NAME = PACKAGE = "notifyq"
SETTINGS = {"tuned": {}, "defaults": {}}
TASKS = {"tuned": 100_000, "defaults": 0}  # tuned are the defaults
LEFT = "SELECT count(*) FROM notifyq.task"
FAILED = "SELECT count(*) FROM notifyq.finished WHERE state <> 'done'"

app = notifyq.App()


class User(msgspec.Struct):
    id: str
    email: str


class Mail(notifyq.Task):
    user: User
    key: str
    at: float


@app.handler
async def mail(task: Mail) -> None:
    kit.started(task.at)


async def setup(dsn, mode):
    from notifyq.database import connection, schema

    conn = await connection.connect(dsn)
    await schema.migrate(conn)
    await conn.close()


@asynccontextmanager
async def client(dsn, mode):
    def task(payload):
        return Mail(user=User(**payload["user"]), key=payload["key"], at=payload["at"])

    async def one(payload):
        await app.enqueue(task(payload))

    async def many(payloads):
        await app.enqueue_many([task(payload) for payload in payloads])

    async with app.connect(dsn):
        yield one, many


async def work(dsn, mode):
    """In the process that enqueues, for the latency; `work` by itself is the command line, see below."""
    await app.run_worker(dsn=dsn)


if __name__ == "__main__":
    if sys.argv[1] == "work":
        os.chdir(os.path.dirname(__file__))
        os.execv(sys.executable, [sys.executable, "-m", "notifyq", "worker", "driver:app", "--dsn", sys.argv[2]])
    kit.main(sys.modules["__main__"])
