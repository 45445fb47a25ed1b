"""`notifyq stats`, `queues`, and how tables are printed."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from notifyq.cli.output import span
from notifyq.options import STATES

from ..helpers.command import Run
from .test_cli_tasks import fill


async def test_stats(run: Run, dsn: str, db: Any) -> None:
    """It shows counts by queue and state, how long the oldest task waits, the types that no worker takes, and the
    workers."""
    await fill(db)
    await db.execute(
        "INSERT INTO notifyq.task (queue, type, created_at, run_at)"
        " VALUES ('q0', 'B', now() - interval '1 min', now() - interval '1 h')"
    )
    await db.execute(
        "INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease, seen_at)"
        " VALUES ('gone:2', '{q0}', '{B}', '{10}', 5, '30 s', now() - interval '5 min')"
    )
    said = await run("stats --json", dsn=dsn)
    found = json.loads(said.out)
    assert len(said.lines) == 1
    zeros, none_runs = dict.fromkeys(STATES, 0), {"longest_running_seconds": None}
    q0, q1 = found["queues"]
    assert (q0.pop("paused"), q1.pop("paused")) == (False, False)
    assert q0 == {"queue": "q0", **zeros, "ready": 1, "oldest_ready_seconds": pytest.approx(60, abs=5), **none_runs}
    assert q1 == {
        "queue": "q1",
        **dict.fromkeys(STATES, 1),
        "oldest_ready_seconds": pytest.approx(0, abs=5),
        "longest_running_seconds": pytest.approx(10800, abs=60),
    }
    assert found["longest_running_seconds"] == q1["longest_running_seconds"]
    assert found["oldest_ready_seconds"] == q0["oldest_ready_seconds"]
    assert [(row["queue"], row["type"], row["ready"]) for row in found["unserved"]] == [
        ("q0", "B", 1),
        ("q1", "A_READY", 1),
    ]
    lives, gone = found["workers"]
    assert (lives["name"], lives["status"], lives["running"], lives["concurrency"]) == ("here:1", "ok", 1, 5)
    assert (lives["queues"], lives["types"]) == (["q1"], ["A_RUNNING"])
    assert (gone["status"], gone["seen_seconds"]) == ("silent", pytest.approx(300, abs=5))

    said = await run("stats", dsn=dsn)
    assert (said.code, said.err) == (0, "")
    rows = [line.split() for line in said.lines]
    assert rows[:3] == [
        ["queue", *STATES, "oldest", "ready", "longest", "running"],
        ["q0", "0", "1", "0", "0", "0", "0", rows[1][7], "s"],
        ["q1", *"111111", rows[2][7], "s", rows[2][9], "s"],
    ]
    assert "ready, but no worker that lives takes this type from this queue:" in said.lines
    assert any(re.fullmatch(r" *\d+  gone:2 +0 +5  5m ago  q0 +silent", line) for line in said.lines)


async def test_queues(run: Run, dsn: str, db: Any) -> None:
    """They are paused, resumed and limited. A queue that no worker serves gets a note, since a name may be mistyped."""
    said = await run("queues", dsn=dsn)
    assert (said.code, said.out) == (0, "")
    assert "no queues" in said.err
    await db.execute(
        "INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)"
        " VALUES ('host:1', '{mail}', '{}', '{}', 1, '1 h')"
    )
    said = await run("queue pause mail male", dsn=dsn)
    assert (said.code, said.lines) == (0, ["mail: paused", "male: paused"])
    assert said.err == "notifyq: no worker serves queue 'male' now; did you mean 'mail'?\n"
    assert (await run("queue pause mail", dsn=dsn)).out == "mail: is paused already\n"
    assert (await run("queue limit mail --running 3 --rate 100/minute", dsn=dsn)).out == "mail: limited\n"
    await db.execute("INSERT INTO notifyq.task (type, queue) VALUES ('T', 'other'), ('T', 'mail')")
    assert [line.split() for line in (await run("queues", dsn=dsn)).lines] == [
        ["queue", "state", "limit", "rate", "running", "waiting", "workers"],
        ["mail", "paused", "3", "100/60s", "0", "0", "1"],
        ["male", "paused", "0", "0", "0"],
        ["other", "open", "0", "0", "0"],
    ]
    assert (await run("queue resume mail male", dsn=dsn)).lines == ["mail: resumed", "male: resumed"]
    assert (await run("queue limit mail --none", dsn=dsn)).out == "mail: no limits\n"
    found = [json.loads(line) for line in (await run("queues --json", dsn=dsn)).lines]
    assert [(q["name"], q["paused"], q["limit_running"], q["limit_rate"]) for q in found] == [
        ("mail", False, None, None), ("male", False, None, None), ("other", False, None, None)
    ]  # fmt: skip
    await db.execute("UPDATE notifyq.task SET withheld = true, parked = 'limit' WHERE queue = 'mail'")
    assert "scheduled  waits for limit" in (await run("tasks --queue mail", dsn=dsn)).out
    for words, why in (
        ("queue limit mail", "give --running N"),
        ("queue limit mail --none --running 3", "give --running N"),
        ("queue limit mail --rate often", "rate is 'often'; expected how many in what time"),
        ("queue limit mail --running 0", "is not a number from 1"),
        ("queue pause", "Missing argument"),
    ):
        said = await run(words, dsn=dsn)
        assert (said.code, why in said.err) == (2, True), said.err


async def test_stats_of_nothing(run: Run, dsn: str) -> None:
    said = await run("stats", dsn=dsn)
    assert (said.code, said.lines[1:]) == (0, ["", "no workers"])
    found = json.loads((await run("stats --json", dsn=dsn)).out)
    nothing: dict[str, Any] = {
        "oldest_ready_seconds": None,
        "longest_running_seconds": None,
        "unserved": [],
        "workers": [],
    }
    assert found == {"queues": [], **nothing, "findings": []}


async def test_stats_says_what_is_wrong_with_the_database(run: Run, dsn: str, db: Any) -> None:
    await db.execute("ALTER TABLE notifyq.task DISABLE TRIGGER apply_options")
    cure = "ALTER TABLE notifyq.task ENABLE TRIGGER apply_options"
    said = await run("stats", dsn=dsn)
    assert (said.code, said.lines[-1].partition(". Cure: ")[2]) == (0, cure)
    assert said.lines[-1].startswith("trigger apply_options of notifyq.task is disabled: limits, order, unique keys")
    [finding] = json.loads((await run("stats --json", dsn=dsn)).out)["findings"]
    assert (finding["about"], finding["cure"]) == ("trigger apply_options", cure)


async def test_a_terminal_gets_a_rich_table(run: Run, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same cells, whatever is in them; and it is plain text where rich isn't installed."""
    await db.execute("INSERT INTO notifyq.task (queue, type) VALUES ('[red]', E'a\\nb')")
    plain = (await run("tasks", dsn=dsn)).lines
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    for name, value in {"COLUMNS": "120", "TERM": "xterm", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    shown = (await run("tasks", dsn=dsn)).out
    assert "\x1b[" in shown
    seen = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in shown.splitlines()]
    assert seen[0] == plain[0].split()
    assert seen[1][5:] == plain[1].split()[5:] or seen[1][-3:] == ["[red]", "a\\nb", "0"]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "\x1b[" not in (await run("tasks", dsn=dsn)).out


def test_spans() -> None:
    assert [span(s) for s in (None, 0, -1, 59.6, 119, 120, 7199, 7200, 172_799, 172_800)] == [
        "", "0s", "0s", "60s", "119s", "2m", "120m", "2h", "48h", "2d",
    ]  # fmt: skip
