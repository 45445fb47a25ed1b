"""`notifyq enqueue`: options, payloads, and validation by an app."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..helpers.command import Run, Said
from .test_cli import NOWHERE, options


async def test_enqueue(run: Run, dsn: str, db: Any) -> None:
    """It prints nothing but the id, and the row is as asked."""
    said = await run("enqueue", "SEND MAIL", '{"to": "ü"}', dsn=dsn)
    assert (said.code, said.err) == (0, "")
    row = await db.fetchrow("SELECT * FROM notifyq.task WHERE id = $1", int(said.out))
    assert (row["type"], row["queue"], row["priority"], row["max_attempts"]) == ("SEND MAIL", "default", 0, None)
    assert json.loads(row["payload"]) == {"to": "ü"}
    said = await run("enqueue X -q mail --priority -3 --max-attempts 2 --run-at 2030-01-31T08:00:00+01:00", dsn=dsn)
    row = await db.fetchrow("SELECT * FROM notifyq.task WHERE id = $1", int(said.out))
    assert (row["queue"], row["priority"], row["max_attempts"], row["payload"]) == ("mail", -3, 2, b"{}")
    assert row["run_at"].isoformat() == "2030-01-31T07:00:00+00:00"
    for text, seconds in (("90", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("0", 0)):
        said = await run(f"enqueue X --delay {text}", dsn=dsn)
        wait = "SELECT extract(epoch FROM run_at - created_at)::float8 FROM notifyq.task WHERE id = $1"
        assert await db.fetchval(wait, int(said.out)) == pytest.approx(seconds, abs=1)


async def options_of(db: Any, said: Said) -> Any:
    return await db.fetchval("SELECT options FROM notifyq.task WHERE id = $1", int(said.out))


async def test_enqueue_in_order_and_within_limits(run: Run, dsn: str, db: Any) -> None:
    limits = {"limit_key": "k", "limit_running": 2, "limit_rate": 100, "limit_seconds": 60}
    for words, expected in (
        ("--limit-key k --limit 2 --rate 100/minute", limits),
        ("--limit-key k --rate 5/10s", {"limit_key": "k", "limit_rate": 5, "limit_seconds": 10}),
        ("--order-key o --limit-key k --limit-running 3", {"order_key": "o", "limit_key": "k", "limit_running": 3}),
        ("--order-key o", {"order_key": "o"}),
        ("--expires 15m", {"expires": 900}),
    ):
        said = await run(f"enqueue X {words}", dsn=dsn)
        assert (said.code, said.err) == (0, "")
        assert json.loads(await options_of(db, said)) == expected


async def test_the_environment_of_a_worker(run: Run, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of a worker change no other command."""
    for command, flag in options():
        name = next(opt for opt in flag.opts if opt.startswith("--"))
        if name not in ("--dsn", "--app"):
            monkeypatch.setenv("NOTIFYQ_" + name[2:].replace("-", "_").upper(), f"{command} mail:5")
    said = await run("enqueue X", dsn=dsn)
    assert (said.code, said.err) == (0, "")
    row = await db.fetchrow("SELECT queue, priority, run_at <= now() AS due, max_attempts, options FROM notifyq.task")
    assert tuple(row) == ("default", 0, True, None, None)
    listed = await run("tasks", dsn=dsn)
    assert (listed.code, len(listed.lines)) == (0, 2)
    for words in ("stats", "queues", "cron", "show 1", "queue limit default --none", "retry 1", "cancel 1", "prune"):
        said = await run(words, dsn=dsn)
        assert "NOTIFYQ_" not in said.err
        assert "mail" not in said.out + said.err, words
    assert (await run("enqueue X -q", "default mail", dsn=dsn)).code == 2


IS_THERE = "notifyq: nothing was enqueued: a task with this key is there"


async def test_enqueue_unique(run: Run, dsn: str, db: Any) -> None:
    """It prints the id of the existing task, and says on stderr what became of that task."""
    first = await run("enqueue X --unique k --delay 1h", '{"n": 1}', dsn=dsn)
    assert (first.code, first.err) == (0, "")
    for conflict, more in (
        ("keep", ""),
        ("replace", "; if it waits, its payload is this one's now"),
        ("move", "; if it waits for its time or a worker, its run_at is this one's now"),
    ):
        words = f"enqueue X --unique k --run-at 2030-01-31T08:00:00Z --on-conflict {conflict}"
        said = await run(words, json.dumps({"by": conflict}), dsn=dsn)
        assert (said.code, said.out, said.err) == (0, first.out, f"{IS_THERE}{more}\n")
        row = await db.fetchrow("SELECT payload, run_at FROM notifyq.task")
        assert json.loads(row["payload"]) == ({"n": 1} if conflict == "keep" else {"by": "replace"})
        assert (row["run_at"].isoformat() == "2030-01-31T08:00:00+00:00") is (conflict == "move")
    # It is scheduled, which doesn't prevent an enqueue that asks for the ready and the done ones.
    wanted = {"unique_key": "k", "unique_states": ["ready", "done"], "unique_for": 3600, "on_conflict": "keep"}
    said = await run("enqueue X --unique k --unique-for 1h --unique-states ready --unique-states DONE", dsn=dsn)
    assert (said.code, said.err) == (0, "")
    assert json.loads(await options_of(db, said)) == wanted
    said = await run(
        "enqueue X --unique k --unique-states scheduled --unique-states running --on-conflict move", dsn=dsn
    )
    assert json.loads(await options_of(db, said)) == {
        "unique_key": "k", "unique_states": ["scheduled", "running"], "on_conflict": "move",
    }  # fmt: skip


async def test_enqueue_from_stdin(run: Run, dsn: str, db: Any) -> None:
    """The text may have the mark that some editors put in front of UTF-8."""
    said = await run("enqueue X -", dsn=dsn, stdin=b'\xef\xbb\xbf{"n":\n 1}\n')
    payload = await db.fetchval("SELECT payload FROM notifyq.task WHERE id = $1", int(said.out))
    assert json.loads(payload) == {"n": 1}


BAD_PAYLOADS = [
    (
        "{to:a@b}",
        b"",
        "the payload is not JSON: Expecting property name enclosed in double quotes, line 1 column 2, at ",
    ),
    ("", b"", 'line 1 column 1, at its end; expected an object such as \'{"to": '),
    ('{"a": 1', b"", "line 1 column 8, at its end"),
    ("-", b'{\n "a": tru }', "the payload on stdin is not JSON: Expecting value, line 2 column 7, at 'tru }'"),
    ("-", b"\xff\xfe", "the payload on stdin is not UTF-8"),
    ("[1, 2]", b"", "the payload is [1, 2], not an object"),
    ("null", b"", "the payload is null, not an object"),
    ('{"a": NaN}', b"", "it has no NaN"),
    ('{"a": "\\u0000"}', b"", "PostgreSQL can't store this"),
    ('{"a": "\\ud800"}', b"", "PostgreSQL can't store this"),
    ("[" * 100_000, b"", "is not JSON that PostgreSQL can store: "),
    ("-", b'{"a": "' + b"x" * 17_000_000 + b'"}', "is 17,000,009 bytes, the limit is 16,777,216"),
]


async def test_bad_payloads(run: Run, dsn: str, db: Any) -> None:
    """Exit code 2, and the place that is wrong."""
    for payload, stdin, says in BAD_PAYLOADS:
        said = await run("enqueue X", payload, dsn=dsn, stdin=stdin)
        assert (said.code, said.out) == (2, "")
        assert says in said.err
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0


async def test_enqueue_validates_against_an_app(run: Run, dsn: str, folder: Path) -> None:
    """A type or a payload that the app doesn't take is refused before it is sent."""
    assert (await run("enqueue SEND_MAIL --app mailer:app", '{"to": "a@b.c"}', dsn=dsn)).code == 0
    for words, payload, says in (
        ("SEND_MIAL --app mailer:app", "{}", "no handler takes type 'SEND_MIAL'; did you mean SEND_MAIL"),
        ("SEND_MAIL --app mailer:app", '{"to": 5}', "doesn't fit SEND_MAIL: Expected `str`, got `int` - at `$.to`"),
        ("SEND_MAIL --app mailer:ap", "{}", "mailer has no 'ap'; did you mean 'app'?"),
    ):  # fmt: skip
        said = await run(f"enqueue {words}", payload, dsn=NOWHERE)
        assert (said.code, said.out) == (2, "")
        assert says in said.err


INDEXER = """
import notifyq

app = notifyq.App()

class Index(notifyq.Task, tag="INDEX"):
    unique = ("document",)
    on_conflict = "replace"
    document: int
    text: str = ""

@app.handler
async def index(task: Index) -> None: ...
"""


async def test_enqueue_by_the_rules_of_an_app(run: Run, dsn: str, db: Any, folder: Path) -> None:
    """What the class says of its tasks holds, and a flag overrides any of it. Without --app the command doesn't know of
    it."""
    (folder / "indexer.py").write_text(INDEXER)
    index = "enqueue INDEX --app indexer:app"
    first = await run(index, '{"document": 1, "text": "draft"}', dsn=dsn)
    assert (first.code, first.err) == (0, "")
    key = json.loads(await options_of(db, first))["unique_key"]
    assert key.startswith("INDEX:")
    again = await run(index, '{"document": 1, "text": "final"}', dsn=dsn)
    assert (again.code, again.out) == (0, first.out)
    assert again.err == f"{IS_THERE}; if it waits, its payload is this one's now\n"
    kept = await run(f"{index} --on-conflict keep", '{"document": 1, "text": "late"}', dsn=dsn)
    assert (kept.out, kept.err) == (first.out, f"{IS_THERE}\n")
    assert json.loads(await db.fetchval("SELECT payload FROM notifyq.task")) == {"document": 1, "text": "final"}
    for words in (f"{index} --unique k", "enqueue INDEX"):
        assert (await run(words, '{"document": 1}', dsn=dsn)).err == ""
    assert (await run(index, '{"document": 2}', dsn=dsn)).err == ""
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 4
    said = await run("enqueue THREAD --app mailer:app --unique-states ready", dsn=NOWHERE)
    assert (said.code, said.out) == (2, "")
    assert "--unique-for, --unique-states and --on-conflict go with a key, and Thread has no rule for one" in said.err
