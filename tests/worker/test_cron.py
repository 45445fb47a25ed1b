"""Tasks by the clock: one for each slot, whichever workers look and whichever die."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.cron import Cron, next_slot
from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError
from notifyq.testing import advance
from notifyq.worker import maintenance
from notifyq.worker.crons import Crons

from ..helpers.crons import CRON, Nightly, known, made
from ..helpers.databases import Sessions
from ..helpers.logs import Logged
from ..helpers.machine import Probe
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually, heartbeats

pytestmark = pytest.mark.usefixtures("quick_heart")


class Needy(notifyq.Task):
    region: str


# --- When


def slots(expression: str, tz: str, after: str, count: int) -> list[str]:
    at = datetime.fromisoformat(after)
    found: list[str] = []
    for _ in range(count):
        at = next_slot(expression, tz, at)
        found.append(f"{at:%m-%d %H:%M}")
    return found


@pytest.mark.parametrize(
    ("expression", "tz", "after", "want"),
    [
        # 02:30 is left out on 29 March, and comes twice on 25 October: one slot on both days.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00Z", ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T00:00Z", ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
        # From within the second of the two hours: the slot in the first one is over.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10Z", ["10-26 01:30"]),
        ("30 1 * * *", "America/New_York", "2026-11-01T06:10Z", ["11-02 06:30"]),
        ("30 2 * * *", "America/New_York", "2026-03-07T00:00Z", ["03-07 07:30", "03-08 07:00", "03-09 06:30"]),
        ("30 1 * * *", "America/New_York", "2026-10-31T00:00Z", ["10-31 05:30", "11-01 05:30", "11-02 06:30"]),
        # 02:15 is left out: the clocks go forward by half an hour at 02:00.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-02T16:00Z", ["10-03 15:30", "10-04 15:15"]),
        # A * means real time: each hour of the day, 23 or 25 of them.
        ("0 * * * *", "Europe/Berlin", "2026-03-29T00:00Z", ["03-29 01:00", "03-29 02:00"]),
        ("0 3 * * MON", "UTC", "2026-11-25T00:00Z", ["11-30 03:00", "12-07 03:00"]),
    ],
)
def test_slots(expression: str, tz: str, after: str, want: list[str]) -> None:
    assert slots(expression, tz, after, len(want)) == want


# --- One for each slot


async def test_a_slot_has_one_task(dsn: str, db: Any, probe: Probe) -> None:
    """One of three workers enqueues it, at its time. The next slot is that of the day after, in Berlin's time."""
    seen = Seen()
    app = made(seen, tz="Europe/Berlin", task=Nightly(region="de"), queue="night", priority=3)
    async with working(app, dsn, queues=["night"]), working(app, dsn, queues=["night"]):
        first = await known(db)
        assert first == next_slot("0 3 * * *", "Europe/Berlin", datetime.now(UTC))
        async with working(app, dsn, queues=["night"]):
            soon = await db.fetchval(
                "UPDATE notifyq.cron SET next_at = clock_timestamp() + interval '1 s' RETURNING next_at"
            )
            await seen.reach(1)
            assert seen.items[0][1] == "de"
            row = await db.fetchrow(CRON)
            assert (row["last_at"], row["next_at"]) == (soon, next_slot("0 3 * * *", "Europe/Berlin", soon))
            await heartbeats(db, 3)  # they find nothing to do
    [task] = await db.fetch("SELECT * FROM notifyq.all_tasks")
    assert (task["id"], task["run_at"], task["queue"], task["priority"]) == (row["recent"][0], soon, "night", 3)
    late = (task["processing_at"] - soon).total_seconds()
    print(f"started {late * 1000:.1f} ms after its slot")
    assert 0 <= late < 0.5 + probe.late()


async def test_two_services_with_one_name_are_told(
    dsn: str, db: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both log it once. Workers of one app don't, nor does one whose other version has ended."""
    monkeypatch.setattr(maintenance.FIND_PROBLEMS, "every", 0.2)
    shop, blog = made(Seen(), queue="shop"), made(Seen(), "0 4 * * *", queue="blog")
    async with working(shop, dsn, queues=["shop"]), working(shop, dsn, queues=["shop"]):
        await known(db)
        assert logged("cron Nightly of this app") == []
        async with working(blog, dsn, queues=["blog"]):
            assert (
                len(logged("replaces that of another app, which has '0 3 * * *' (UTC) for Nightly in queue shop")) == 1
            )
            await eventually(lambda: counted(logged, "was overwritten by another app, which has '0 4 * * *'"), 2)
    async with working(shop, dsn, queues=["shop"]):
        await known(db)
    assert len(logged("cron Nightly of this app")) == 3


async def counted(logged: Logged, text: str) -> int:
    return len(logged(text))


async def test_two_workers_have_seen_the_same_slot(dsn: str, db: Any, connect: Sessions) -> None:
    """The second worker waits for the first, and finds the slot enqueued."""
    await db.execute("INSERT INTO notifyq.cron (name, expression, type, next_at) VALUES ('n', '* * * * *', 'T', now())")
    slot = await db.fetchval("SELECT next_at FROM notifyq.cron")
    args = ("n", slot, slot + timedelta(minutes=1), True)
    other = await connect()
    async with other.transaction():
        assert await other.fetchval(SQL["enqueue_cron_slot"], *args) is True
        async with anyio.create_task_group() as group:
            said: list[bool] = []

            async def second() -> None:
                said.append(await db.fetchval(SQL["enqueue_cron_slot"], *args))

            group.start_soon(second)
            waits = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            await eventually(lambda: other.fetchval(waits), 1)
            await other.execute("COMMIT; BEGIN")
    assert said == [False]
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 1


APP = """
import notifyq

app = notifyq.App()

class Beat(notifyq.Task):
    pass

@app.cron("* * * * * *")
@app.handler
async def beat(task: Beat) -> None:
    pass
"""


@pytest.mark.slow
async def test_every_second_while_workers_are_killed(tmp_path: Path, dsn: str, db: Any) -> None:
    """Each second has one task: none is missing, none comes twice."""
    (tmp_path / "beats.py").write_text(APP)
    argv = [sys.executable, "-m", "notifyq", "worker", "beats:app"]
    env = {**os.environ, "NOTIFYQ_DSN": dsn}
    workers = [subprocess.Popen(argv, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) for _ in range(3)]
    count = "SELECT count(*) >= $1 FROM notifyq.finished"
    try:
        for worker, ended in zip(workers, (3, 6), strict=False):
            await eventually(functools.partial(db.fetchval, count, ended))
            worker.send_signal(signal.SIGKILL)
        await eventually(lambda: db.fetchval(count, 10))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    rows = await db.fetch("SELECT run_at FROM notifyq.all_tasks ORDER BY run_at")
    times = [row["run_at"] for row in rows]
    assert len(times) >= 10
    assert times == [times[0] + timedelta(seconds=n) for n in range(len(times))]


@pytest.mark.parametrize(("missed", "runs"), [("once", 1), ("skip", 0)])
async def test_missed(dsn: str, db: Any, missed: str, runs: int) -> None:
    """Three slots pass without a worker: one run for all of them, or none; then the cron goes on."""
    seen = Seen()
    app = made(seen, missed=missed)
    async with working(app, dsn):
        await known(db)
    await advance(db, 3 * 86400)
    now = await db.fetchval("SELECT clock_timestamp()")
    assert (await db.fetchrow(CRON))["next_at"] < now - timedelta(days=2)
    async with working(app, dsn):
        await eventually(lambda: db.fetchval("SELECT next_at > clock_timestamp() FROM notifyq.cron"))
        await seen.reach(runs)
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == runs
    assert (await db.fetchrow(CRON))["next_at"] == next_slot("0 3 * * *", "UTC", now)


async def test_a_schedule_that_is_changed(dsn: str, db: Any) -> None:
    """The next deploy changes it, and it counts from then on. The same schedule again changes nothing."""
    seen = Seen()
    async with working(made(seen), dsn):
        first = await known(db)
    async with working(made(seen), dsn):
        await heartbeats(db)
        assert (await db.fetchrow(CRON))["next_at"] == first
    async with working(made(seen, "0 4 * * *", task=Nightly(region="us")), dsn):
        assert await known(db) == next_slot("0 4 * * *", "UTC", datetime.now(UTC))
        assert await db.fetchval("SELECT payload ->> 'region' FROM notifyq.cron") == "us"


async def test_a_change_when_slots_were_put_ahead(dsn: str, db: Any) -> None:
    """Slots that were enqueued ahead are not enqueued again if the new schedule has them too. Slots that a pause has
    cancelled are enqueued again."""
    cron = Cron("n", "* * * * * *", "UTC", "T", "{}", "default", 0, "once")
    schedule = Crons({"n": cron})
    for changed in (cron, cron._replace(tz="Europe/Berlin")):
        await db.execute(SQL["register_crons"], *([column] for column in changed))
        await schedule.enqueue_due(db)
        await schedule.enqueue_due(db)  # without a next slot, the first only computes it
    times = "SELECT run_at FROM notifyq.task ORDER BY run_at"
    put = [row["run_at"] for row in await db.fetch(times)]
    assert len(put) >= 2
    assert put == [put[0] + timedelta(seconds=n) for n in range(len(put))]
    await db.fetchval("SELECT notifyq.cron_pause('n'), notifyq.cron_resume('n')")
    assert await db.fetch(times) == []
    now = await db.fetchval("SELECT clock_timestamp()")
    await schedule.enqueue_due(db)
    first = (await db.fetch(times))[0]["run_at"]
    assert now < first <= await db.fetchval("SELECT clock_timestamp()") + timedelta(seconds=1)


# --- Pause, resume, run now


async def test_pause_resume_run(dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause cancels slots that were enqueued ahead. When the cron is resumed, it goes on with the next slot. Run now
    changes neither."""
    monkeypatch.setattr("notifyq.worker.crons.AHEAD_SECONDS", 600.0)
    seen, far = Seen(), f"0 {(datetime.now(UTC).hour + 12) % 24} * * *"
    async with working(made(seen, far), dsn):
        await known(db)
        await db.execute("UPDATE notifyq.cron SET next_at = clock_timestamp() + interval '500 s'")
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 1)
        assert await db.fetchval("SELECT notifyq.cron_pause('Nightly')")
        assert await db.fetchval("SELECT array_agg(state) FROM notifyq.all_tasks") == ["cancelled"]
        await db.execute("UPDATE notifyq.cron SET next_at = clock_timestamp()")
        id = await db.fetchval("SELECT notifyq.cron_run('Nightly')")
        assert await seen.reach(1) == [(id, "eu")]
        await heartbeats(db)
        assert await db.fetchval("SELECT notifyq.cron_resume('Nightly')")
        assert await known(db) == next_slot(far, "UTC", datetime.now(UTC))
    assert len(seen.items) == 1
    for function in ("cron_pause", "cron_resume"):
        assert await db.fetchval(f"SELECT notifyq.{function}('Nobody')") is False
    assert await db.fetchval("SELECT notifyq.cron_run('Nobody')") is None


async def test_run_now_is_enqueued_as_the_row_says(db: Any) -> None:
    await db.execute(
        """INSERT INTO notifyq.cron (name, expression, type, payload, queue, priority)
           VALUES ('n', '0 3 * * *', 'T', '{"region": "eu"}', 'night', 7)"""
    )
    id = await db.fetchval("SELECT notifyq.cron_run('n')")
    task = await db.fetchrow("SELECT type, payload, queue, priority FROM notifyq.task WHERE id = $1", id)
    assert tuple(task) == ("T", b'{"region": "eu"}', "night", 7)


async def test_a_worker_that_saw_the_slot_before_the_pause_enqueues_nothing(db: Any) -> None:
    """The worker reads the row, the cron is paused, and then the worker writes."""
    await db.execute("INSERT INTO notifyq.cron (name, expression, type, next_at) VALUES ('n', '* * * * *', 'T', now())")
    slot = await db.fetchval("SELECT next_at FROM notifyq.cron")
    assert await db.fetchval("SELECT notifyq.cron_pause('n')")
    assert await db.fetchval(SQL["enqueue_cron_slot"], "n", slot, slot + timedelta(minutes=1), True) is False
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0
    assert await db.fetchval("SELECT next_at FROM notifyq.cron") == slot


async def told(logged: Logged) -> bool:
    return len(logged("a cron whose next slot can't be computed")) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("expression = '61 * * * *'", "Bad minute"),
        ("expression = '* * */20 * 1L'", "it has no slot in the next fifty years"),
        ("tz = 'Nowhere'", "tz is 'Nowhere', which isn't known here"),
    ],
)
async def test_a_row_that_makes_no_sense(dsn: str, db: Any, logged: Logged, change: str, error: str) -> None:
    """It is logged once; the other cron and the heartbeat go on."""
    seen = Seen()
    app = made(seen)

    @app.cron("0 5 * * *", name="odd")
    @app.handler
    async def odd(task: Odd) -> None: ...

    async with working(app, dsn):
        await known(db)
        await db.execute(f"UPDATE notifyq.cron SET {change}, next_at = NULL WHERE name = 'odd'")
        await eventually(lambda: told(logged))
        await db.execute("UPDATE notifyq.cron SET next_at = clock_timestamp() WHERE name = 'Nightly'")
        await seen.reach(1)
    [said] = logged("a cron whose next slot can't be computed")
    assert said["cron"] == "odd"
    assert said["error"].startswith(error)


@pytest.mark.parametrize("never", ["-infinity", "infinity", "4000-01-01 BC", "10000-01-01"])
async def test_a_time_that_workers_cannot_read_is_refused(dsn: str, db: Any, never: str) -> None:
    """The database refuses it when it is written: a worker that looks for due crons would fail on it."""
    insert = f"INSERT INTO notifyq.cron (name, expression, type, next_at) VALUES ('x', '* * * * *', 'X', '{never}')"
    with pytest.raises(asyncpg.CheckViolationError):
        await db.execute(insert)


class Odd(notifyq.Task):
    pass


# --- What can't be


def handled(app: notifyq.App) -> Any:
    @app.handler
    async def nightly(task: Nightly) -> None: ...

    return nightly


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"expression": "61 * * * *"}, r"'61 \* \* \* \*' is no cron expression: Bad minute; expected five fields"),
        ({"expression": "@hourly"}, r"'@hourly' is no cron expression here; write '0 \* \* \* \*'"),
        ({"expression": "daily"}, "is no cron expression: Wrong number of fields"),
        ({"expression": "0 0 30 2 *"}, "is no cron expression: Bad day-of-month"),
        ({"tz": "Berlin"}, "tz is 'Berlin', which isn't known here; expected a name such as 'Europe/Berlin'"),
        ({"task": Needy(region="eu")}, "task is Needy.*, expected a Nightly"),
        ({"missed": "all"}, "missed is 'all'; expected 'once' or 'skip'"),
        ({"name": "x" * 201}, "expected 1 to 200 characters"),
        ({"name": ""}, "expected 1 to 200 characters"),
        ({"queue": ""}, "expected 1 to 200 characters"),
        ({"priority": 99999}, "priority is 99999; expected"),
    ],
)
def test_what_cannot_be(args: dict[str, Any], message: str) -> None:
    app = notifyq.App()
    with pytest.raises(ConfigError, match=message):
        app.cron(**{"expression": "0 3 * * *", **args})(handled(app))


def test_utc_needs_no_time_zones() -> None:
    """As in a slim image, without a folder of time zones or the package tzdata. Other zones are refused there, with the
    cure."""
    code = """if True:
        import sys, zoneinfo
        zoneinfo.reset_tzpath([])
        sys.modules["tzdata"] = None
        from datetime import UTC, datetime
        from notifyq.cron import check_schedule, next_slot
        check_schedule("0 3 * * *", "UTC")
        assert next_slot("0 3 * * *", "UTC", datetime(2026, 1, 1, tzinfo=UTC)) == datetime(2026, 1, 1, 3, tzinfo=UTC)
        check_schedule("0 3 * * *", "Europe/Berlin")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install tzdata" in done.stderr.splitlines()[-1]


def test_what_cannot_have_a_cron() -> None:
    app = notifyq.App()

    async def nobody(task: Nightly) -> None: ...

    with pytest.raises(ConfigError, match=r"@app.cron needs its expression: @app.cron\('0 3 \* \* \*'\)"):
        app.cron(nobody)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @app.handler
    async def needy(task: Needy) -> None: ...

    with pytest.raises(ConfigError, match="is no handler of this app; put it above"):
        app.cron("0 3 * * *")(nobody)
    with pytest.raises(ConfigError, match=r"can't be made without arguments .* task=Needy"):
        app.cron("0 3 * * *")(needy)
    twice = app.cron("0 3 * * *", task=Needy(region="eu"))
    twice(needy)
    with pytest.raises(ConfigError, match="two crons are named 'Needy'; give one another name"):
        twice(needy)
    app.cron("0 3 * * *", task=Needy(region="us"), name="us")(needy)


# --- By hand


@pytest.mark.slow
async def test_the_command(dsn: str, db: Any) -> None:
    async def run(*args: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "notifyq", "cron", *args, "--dsn", dsn,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    assert await run() == (0, "", "notifyq: no crons: a worker writes those of its app when it starts\n")
    seen = Seen()
    async with working(made(seen, "0 3 * * *", tz="Europe/Berlin"), dsn):
        await known(db)
        _, out, _ = await run()
        assert [word for word in ("Nightly", "0 3 * * *", "Europe/Berlin", "on", "in ") if word not in out] == []
        assert (await run("pause", "Nightly"))[1] == "Nightly: paused\n"
        assert "paused" in (await run())[1]
        code, out, _ = await run("run", "Nightly")
        assert (code, await seen.reach(1)) == (0, [(int(out), "eu")])
        assert (await run("resume", "Nightly"))[1] == "Nightly: resumed\n"
        code, _, err = await run("pause", "Nighty")
        assert (code, err) == (2, "notifyq: there is no cron 'Nighty'; did you mean 'Nightly'?\n")
        code, _, err = await run("remove", "Nightly")
        assert (code, "is declared by the app of running worker" in err) == (2, True)
    assert "no worker" in (await run())[1]
    assert '"name":"Nightly"' in (await run("--json"))[1]
    assert (await run("remove", "Nightly"))[1] == "Nightly: removed\n"
    assert await db.fetchval("SELECT count(*) FROM notifyq.cron") == 0


async def test_a_worker_without_crons_never_looks(dsn: str, db: Any) -> None:
    app = notifyq.App()
    handled(app)
    async with working(app, dsn):
        conn = await connection.connect(dsn, role="test")
        await conn.execute("BEGIN; LOCK TABLE notifyq.cron")
        id = await db.fetchval("INSERT INTO notifyq.task (type) VALUES ('Nightly') RETURNING id")
        before = await db.fetchval("SELECT seen_at FROM notifyq.worker")
        await eventually(lambda: db.fetchval("SELECT seen_at > $1 FROM notifyq.worker", before))
        await eventually(lambda: db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", id), "done")
        conn.terminate()
