"""`notifyq tasks`, `show`, `retry`, `cancel` and `prune`."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import pytest

from notifyq.cli import tasks
from notifyq.options import STATES

from ..helpers.command import Run
from ..helpers.waiting import eventually


async def test_a_type_that_no_worker_takes(run: Run, dsn: str, db: Any) -> None:
    """If workers are up, a note stands beside the id. The task is enqueued all the same."""
    assert (await run("enqueue SEND_MIAL", dsn=dsn)).err == "", "no worker is up"
    worker = (
        "INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease, seen_at)"
        " VALUES ($1, $2, $3, '{}', 1, '1 min', now() - $4::interval)"
    )
    await db.execute(worker, "gone:1", ["old"], ["SEND_MIAL"], timedelta(hours=1))
    assert (await run("enqueue SEND_MIAL", dsn=dsn)).err == ""
    await db.execute(worker, "here:1", ["default", "mail"], ["SEND_MAIL", "SLEEP"], timedelta(0))
    for words, note in (
        ("SEND_MIAL", "no worker that is up takes type 'SEND_MIAL' from queue 'default'; did you mean 'SEND_MAIL'?"),
        ("XYZZY", "no worker that is up takes type 'XYZZY' from queue 'default'"),
        ("SEND_MAIL -q mial", "no worker that is up serves queue 'mial'; did you mean 'mail'?"),
    ):
        said = await run(f"enqueue {words}", dsn=dsn)
        assert (said.code, said.err) == (0, f"notifyq: {note}\n")
        assert int(said.out)
    assert (await run("enqueue SEND_MAIL -q mail", dsn=dsn)).err == ""


async def test_show_says_why_a_task_is_not_started(run: Run, dsn: str, db: Any) -> None:
    """No worker is up, none serves the queue, none of those that serve it takes the type, or the queue is paused."""
    id = (await run("enqueue BUY -q shop", dsn=dsn)).out.strip()

    async def note() -> str:
        said = await run(f"show {id}", dsn=dsn)
        assert said.code == 0
        return said.err

    assert await note() == f"notifyq: {id} isn't started: no worker is up\n"
    worker = (
        "INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)"
        " VALUES ('here:1', $1, $2, '{}', 1, '1 min')"
    )
    await db.execute(worker, ["default"], ["BUY"])
    assert await note() == f"notifyq: {id} isn't started: no worker that is up serves queue 'shop'\n"
    await db.execute(worker, ["shop"], ["SELL"])
    why = "no worker that is up takes type 'BUY' from queue 'shop'"
    assert await note() == f"notifyq: {id} isn't started: {why}\n", "the one that takes it serves another queue"
    await db.execute(worker, ["shop"], ["BUY"])
    assert await note() == ""

    await run("queue pause shop", dsn=dsn)
    why = "queue 'shop' is paused; resume it with: notifyq queue resume shop"
    assert await note() == f"notifyq: {id} isn't started: {why}\n"
    assert (await run("enqueue BUY -q shop", dsn=dsn)).err == f"notifyq: {why}\n"
    assert (await run("stats", dsn=dsn)).lines[1].split() == ["shop", "0", "2", "0", "0", "0", "0", "paused"]

    await run(f"cancel {id}", dsn=dsn)
    assert await note() == "", "it has ended"


async def test_show_of_a_task_that_never_began(run: Run, dsn: str, db: Any) -> None:
    await db.execute("SELECT notifyq.cancel(notifyq.enqueue('A'))")
    why = b'[{"attempt": 0, "at": "now", "error": "task 9 was cancelled"}]'
    id = await db.fetchval("UPDATE notifyq.finished SET errors = $1 RETURNING id", why)
    said = await run(f"show {id}", dsn=dsn)
    assert said.out.endswith("\nbefore the first attempt, at now:\n    task 9 was cancelled\n")


async def fill(db: Any) -> dict[str, int]:
    """A task in each state, the newest last. Returns the ids by state."""
    ids: dict[str, int] = {}
    finish = """
        WITH gone AS (DELETE FROM notifyq.task WHERE id = $1 RETURNING *)
        INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, max_attempts, state,
                                      queue, type, payload, errors)
        SELECT id, created_at, run_at, now() - $4::text::interval, priority, 2, 2, $2, queue, type, payload, $3
        FROM gone"""
    insert = "INSERT INTO notifyq.task (type, queue, payload) VALUES ($1, $2, $3) RETURNING id"
    for state in STATES:
        ids[state] = await db.fetchval(insert, f"A_{state}".upper(), "q1", b'{"to": "a@b.c"}')
    await db.execute("UPDATE notifyq.task SET run_at = now() + '90 min' WHERE id = $1", ids["scheduled"])
    worker = await db.fetchval(
        "INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease, running)"
        " VALUES ('here:1', '{q1}', '{A_RUNNING}', '{10}', 5, '30 s', 1) RETURNING id"
    )
    await db.execute(
        "UPDATE notifyq.task SET worker = $2, attempts = 1, processing_at = now() - interval '3 h' WHERE id = $1",
        ids["running"], worker,
    )  # fmt: skip
    errors = [{"error": "first"}, {"error": "no such host\n\x1b[31m" + "x" * 100}]
    await db.execute(finish, ids["done"], "done", None, "1 h")
    await db.execute(finish, ids["dead"], "dead", json.dumps(errors).encode(), "3 d")
    await db.execute(finish, ids["cancelled"], "cancelled", None, "3 d")
    return ids


async def test_tasks(run: Run, dsn: str, db: Any) -> None:
    """The newest come first, with the time that matters in each state, and the error's first characters, without
    control characters."""
    ids = await fill(db)
    said = await run("tasks", dsn=dsn)
    assert (said.code, said.err) == (0, "")
    header, *rows = [re.split(r"  +", line.strip()) for line in said.lines]
    assert header == ["id", "state", "when", "queue", "type", "attempts", "says"]
    assert [row[1] for row in rows] == list(reversed(STATES))
    by_state = {row[1]: row for row in rows}
    assert by_state["scheduled"][2:] == ["in 90m", "q1", "A_SCHEDULED", "0"]
    assert by_state["running"][2:] == ["for 3h", "q1", "A_RUNNING", "1"]
    assert by_state["done"][2:] == ["60m ago", "q1", "A_DONE", "2/2"]
    assert by_state["dead"][2:6] == ["3d ago", "q1", "A_DEAD", "2/2"]
    assert by_state["dead"][6].startswith("no such host \\x1b[31mxxx")
    assert by_state["dead"][6].endswith("…")
    assert len(by_state["dead"][6]) < 70
    assert len({line.index(" q1 ") for line in said.lines[1:]}) == 1, "aligned"
    for flags, states in (
        ("--state dead", ["dead"]), ("--state DEAD", ["dead"]), ("--type A_READY", ["ready"]), ("--queue q2", []),
        ("--limit 2", ["cancelled", "dead"]), ("-q q1 --state running --type A_RUNNING --limit 9", ["running"]),
    ):  # fmt: skip
        said = await run(f"tasks --json {flags}", dsn=dsn)
        assert [json.loads(line)["state"] for line in said.lines] == states
    assert said.code == 0
    assert json.loads(said.out)["id"] == ids["running"]


async def test_a_task_that_is_overdue(run: Run, dsn: str, db: Any) -> None:
    await db.execute(
        "INSERT INTO notifyq.task (type, created_at, run_at) VALUES ('A', now() - interval '3h', now() - interval '2h')"
    )
    said = await run("tasks", dsn=dsn)
    assert "scheduled  due 2h ago" in said.out


@pytest.mark.parametrize("name", ["o'clock", "' OR true --", "q%"])
async def test_a_queue_of_any_name(run: Run, dsn: str, db: Any, name: str) -> None:
    """The name is compared, and is no part of the statement."""
    await db.execute("INSERT INTO notifyq.task (type, queue) VALUES ('A', $1), ('A', 'quiet')", name)
    said = await run("tasks --json --queue", name, dsn=dsn)
    assert [json.loads(line)["queue"] for line in said.lines] == [name]


async def test_tasks_say_what_one_waits_for(run: Run, dsn: str, db: Any) -> None:
    await db.execute(
        """INSERT INTO notifyq.task (type, withheld, parked, waiting_on, crashes, attempts)
           VALUES ('A', true, 'limit', 'limit:x', NULL, 0), ('B', true, 'crashed', 'crashed:default', 2, 2)"""
    )
    said = await run("tasks", dsn=dsn)
    assert re.search(r" scheduled  waits for limit +default  A ", said.out)
    assert re.search(r" scheduled  waits to run alone, as its worker vanished +default  B ", said.out)


async def test_tasks_as_json(run: Run, dsn: str, db: Any) -> None:
    """Each task is a line with all that the view has, whole."""
    await fill(db)
    said = await run("tasks --json --state dead", dsn=dsn)
    task = json.loads(said.out)
    assert list(task) == [
        "id", "queue", "type", "state", "priority", "attempts", "max_attempts", "created_at", "run_at",
        "processing_at", "processed_at", "payload", "error", "result", "worker", "waits_for", "errors",
        "progress", "note",
    ]  # fmt: skip
    assert task["payload"] == {"to": "a@b.c"}
    assert [error["error"][:5] for error in task["errors"]] == ["first", "no su"]
    assert task["created_at"].endswith("+00:00")


async def test_tasks_that_are_not_there(run: Run, dsn: str, db: Any) -> None:
    """Nothing is on stdout; on stderr stands what may have been meant."""
    assert (await run("tasks", dsn=dsn)).err == "notifyq: no such tasks\n"
    await fill(db)
    said = await run("tasks --type A_REDY -q q", dsn=dsn)
    assert (said.code, said.out) == (0, "")
    assert "no task is of type 'A_REDY'; did you mean 'A_READY'" in said.err
    assert "no task is of queue 'q'; did you mean 'q1'?" in said.err


async def test_tasks_and_show_say_how_far_one_is(run: Run, dsn: str, db: Any) -> None:
    id = (await fill(db))["running"]
    update = "UPDATE notifyq.task SET progress = 0.4, note = E'resizing\\n\\x1b[31m' WHERE id = $1"
    await db.execute(update, id)
    assert (await run("tasks --state running", dsn=dsn)).lines[1].endswith(" 40% resizing \\x1b[31m")
    assert "\nprogress:      40% resizing\\n\\x1b[31m\n" in (await run(f"show {id}", dsn=dsn)).out


async def test_show(run: Run, dsn: str, db: Any) -> None:
    """It shows all of one task, for people and as JSON, with its errors attempt by attempt."""
    ids = await fill(db)
    said = await run(f"show {ids['dead']}", dsn=dsn)
    assert (said.code, said.err) == (0, "")
    values = dict(re.split(r": +", line, maxsplit=1) for line in said.lines if not line.startswith(("attempt ", " ")))
    assert (values["id"], values["state"], values["type"]) == (str(ids["dead"]), "dead", "A_DEAD")
    assert values["payload"] == '{"to": "a@b.c"}'
    assert said.out.endswith("    no such host\n    \\x1b[31m" + "x" * 100 + "\n")
    assert json.loads((await run(f"show {ids['dead']} --json", dsn=dsn)).out)["errors"][0] == {"error": "first"}
    keyed = (await run("enqueue X --unique a\x1b --after", str(ids["dead"]), dsn=dsn)).out.strip()
    options = f'{{"after": [{ids["dead"]}], "unique_key": "a\\u001b", "on_conflict": "keep"}}'
    assert f"\noptions:       {options}\n" in (await run("show", keyed, dsn=dsn)).out
    said = await run("show 12345", dsn=dsn)
    assert (said.code, said.err) == (1, "notifyq: 12345: there is no such task; it may have been pruned\n")


async def looked(db: Any) -> None:
    """Wait until `show --follow` has looked once more."""
    looks = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'"
        " AND application_name = 'notifyq cli' AND query LIKE '%to_json(t)%' AND query_start > $1"
    )
    now = await db.fetchval("SELECT clock_timestamp()")
    await eventually(lambda: db.fetchval(looks, now), 1)


async def test_show_follows(run: Run, dsn: str, db: Any) -> None:
    """It prints each change until the end, and then the whole. The exit code is 1 if the task isn't done."""
    ids = await fill(db)
    assert (await run(f"show --follow {ids['dead']}", dsn=dsn)).code == 1
    assert (await run(f"show --follow {ids['done']}", dsn=dsn)).code == 0
    said: list[Any] = []
    async with anyio.create_task_group() as group:

        async def follow() -> None:
            said.append(await run(f"show --follow {ids['running']}", dsn=dsn))

        group.start_soon(follow)
        await looked(db)
        await db.execute("UPDATE notifyq.task SET progress = 0.5 WHERE id = $1", ids["running"])
        await looked(db)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ids["running"])
    assert "\nrunning 50%\nid: " in said[0].out
    assert "\nstate:         cancelled\n" in said[0].out
    assert said[0].code == 1


async def test_show_follows_one_task_only(run: Run, dsn: str, db: Any) -> None:
    """After a failover to a standby that lagged, its id may be another task's."""
    id = (await fill(db))["running"]
    said: list[Any] = []
    async with anyio.create_task_group() as group:

        async def follow() -> None:
            said.append(await run(f"show --follow {id}", dsn=dsn))

        group.start_soon(follow)
        await looked(db)
        await db.execute("UPDATE notifyq.task SET created_at = created_at + interval '1 hour' WHERE id = $1", id)
    assert said[0].code == 1
    assert f"task {id} isn't the one" in said[0].err


async def test_retry(run: Run, dsn: str, db: Any) -> None:
    """A task that can be retried is. For the others it says why not, and the exit code is 1."""
    ids = await fill(db)
    can = [str(ids[state]) for state in ("dead", "cancelled", "scheduled")]
    said = await run("retry", *can, dsn=dsn)
    assert (said.code, said.err) == (0, "")
    assert said.lines == [f"{id}: will run now" for id in can]
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks WHERE state = 'ready'") == 4
    said = await run("retry", *(str(ids[state]) for state in ("ready", "running", "done")), "999", "999", dsn=dsn)
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines() == [
        f"notifyq: {ids['ready']}: not retried: it is ready already",
        f"notifyq: {ids['running']}: not retried: it is running",
        f"notifyq: {ids['done']}: not retried: it is done; enqueue another to run it once more",
        "notifyq: 999: not retried: there is no such task; it may have been pruned",
    ]


async def test_cancel(run: Run, dsn: str, db: Any) -> None:
    """A task that hasn't ended ends as cancelled. If one had ended, or isn't there, the exit code is 1."""
    ids = await fill(db)
    said = await run("cancel", *(str(ids[state]) for state in ("scheduled", "ready", "running")), dsn=dsn)
    assert (said.code, said.err, len(said.lines)) == (0, "", 3)
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0
    said = await run("cancel", "999", str(ids["done"]), str(ids["dead"]), dsn=dsn)
    assert said.code == 1
    assert said.err.splitlines() == [
        "notifyq: 999: not cancelled: there is no such task; it may have been pruned",
        f"notifyq: {ids['done']}: not cancelled: it has ended already: done",
        f"notifyq: {ids['dead']}: not cancelled: it has ended already: dead",
    ]


async def test_prune(run: Run, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it does what workers do; by age; and all, in batches."""
    await fill(db)
    assert (await run("prune", dsn=dsn)).out == "pruned 1 task\n"  # the one cancelled 3 days ago
    assert (await run("prune --history 2h --dead 4d", dsn=dsn)).out == "pruned 0 tasks\n"
    assert (await run("prune --history 30m --dead 4d", dsn=dsn)).out == "pruned 1 task\n"
    monkeypatch.setattr(tasks, "PRUNE_AT_ONCE", 2)
    await db.execute("INSERT INTO notifyq.task (type) SELECT 'X' FROM generate_series(1, 5)")
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task WHERE type = 'X'")
    assert (await run("prune --history 0 --dead 0", dsn=dsn)).out == "pruned 6 tasks\n"
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 3
