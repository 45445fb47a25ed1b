"""procrastinate, with its psycopg connector. It claims one job at a time, whatever the settings."""

import sys
from contextlib import asynccontextmanager

import kit
from procrastinate import App, PsycopgConnector

NAME = PACKAGE = "procrastinate"
SETTINGS = {
    # "concurrency": asynchronous jobs in parallel; "delete_jobs": finished jobs are not kept; max_size: its pool's
    "tuned": {"concurrency": kit.CONCURRENCY, "delete_jobs": "successful", "max_size": kit.CONNECTIONS},
    "defaults": {},
}
TASKS = {"tuned": 5_000, "defaults": 3_000}
LEFT = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
FAILED = "SELECT count(*) FROM procrastinate_jobs WHERE status NOT IN ('todo', 'doing', 'succeeded')"


def make(dsn, mode):
    pool = {key: value for key, value in SETTINGS[mode].items() if key == "max_size"}
    app = App(connector=PsycopgConnector(conninfo=dsn, **pool))

    @app.task(name="mail")
    async def mail(user, key, at):
        kit.started(at)

    return app, mail


async def setup(dsn, mode):
    async with make(dsn, mode)[0].open_async() as app:
        await app.schema_manager.apply_schema_async()


@asynccontextmanager
async def client(dsn, mode):
    app, mail = make(dsn, mode)

    async def one(payload):
        await mail.defer_async(**payload)

    async def many(payloads):
        for start in range(0, len(payloads), 1000):  # a row notifies twice: much larger batches get slower
            await mail.batch_defer_async(*payloads[start : start + 1000])

    async with app.open_async():
        yield one, many


async def work(dsn, mode):
    options = {key: value for key, value in SETTINGS[mode].items() if key != "max_size"}
    async with make(dsn, mode)[0].open_async() as app:
        await app.run_worker_async(**options)


if __name__ == "__main__":
    kit.main(sys.modules["__main__"])
