"""The command line: every command, every exit code, every wrong flag, and what a person reads then.

Commands that end by themselves run in this process, in a thread; workers and `dev` in processes of their own, as
signals and exit codes are what they are about. Those are followed by what they print.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import click
import pytest

from notifyq.cli import COMMANDS, database, logs, supervisor, tasks
from notifyq.cli.load import load_app
from notifyq.cli.output import span
from notifyq.database import schema, upgrade
from notifyq.embedded import Server
from notifyq.errors import ConfigError
from notifyq.options import STATES

from ..helpers.command import Run, Said
from ..helpers.databases import Sessions, admin
from ..helpers.machine import limit
from ..helpers.waiting import eventually

NOWHERE = "postgresql://somebody:secret@127.0.0.1:1/nothing"
SCHEMA_COMMANDS = ["tasks", "show 1", "stats", "enqueue X", "retry 1", "cancel 1", "prune"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`notifyq dev` leaves a folder even if it can't start: a test that names none must not use this machine's."""
    for name in list(os.environ):
        if name.startswith(("NOTIFYQ_", "PG", "DATABASE_URL", "XDG_")) and name != "NOTIFYQ_PG_BIN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


# -------------------------------------------------------------------------------- the command line itself


def options() -> Iterator[tuple[str, click.Option]]:
    commands: list[click.Command] = list(COMMANDS)
    for command in commands:
        if isinstance(command, click.Group):
            commands += command.commands.values()
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield command.name or "", parameter


def test_only_settings_of_a_process_have_variables() -> None:
    """A variable of a worker's container must not change what another command does with one task. The DSN's variables
    are read by config.resolve_dsn."""
    settings = {("dev", "--data-dir"), ("enqueue", "--app")}
    for command, flag in options():
        name = next(opt for opt in flag.opts if opt.startswith("--"))
        assert flag.help, (command, name)
        if (command.startswith("worker") and name != "--dsn") or (command, name) in settings:
            assert flag.envvar == "NOTIFYQ_" + name[2:].replace("-", "_").upper(), (command, name)
            assert flag.show_envvar, (command, name)
        else:
            assert flag.envvar is None, (command, name)


def test_the_commands_of_the_contract() -> None:
    expected = ["migrate", "worker", "enqueue", "tasks", "show", "retry", "cancel", "prune", "queues", "queue", "cron"]
    expected += ["stats", "schema", "demo", "dev"]
    assert [command.name for command in COMMANDS] == expected


async def test_help_and_version(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command is a mistake, but one that is answered with help."""
    nothing, asked, short = await run(""), await run("--help"), await run("-h")
    assert (nothing.code, nothing.out) == (2, "")
    assert (asked.code, asked.err) == (0, "")
    assert asked.out == short.out == nothing.err
    for command in COMMANDS:
        said = await run(f"{command.name} --help")
        assert said.code == 0
    monkeypatch.setenv("COLUMNS", "80")
    listed = (await run("--help")).out.partition("Commands:")[2]
    assert listed.count("\n") == len(COMMANDS) + 1
    assert "..." not in listed, "a summary that is cut off"
    assert re.fullmatch(r"notifyq \d\S+\n", (await run("--version")).out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("wroker tasks:app", "there is no command 'wroker'; did you mean 'worker'?"),
        ("xyzzy", "there is no command 'xyzzy'; expected one of migrate, worker, enqueue"),
        ("--nonsense", "--nonsense"),
        ("worker", "MODULE:APP"),
        ("worker a:b c:d", "c:d"),
        ("worker a:b --concurency 5", "--concurrency"),
        ("worker a:b -c 0", "'-c' / '--concurrency' (env var: 'NOTIFYQ_CONCURRENCY'): '0' is not a number from 1"),
        ("worker a:b -c many", "'many' is not a number from 1 to 10000"),
        ("worker a:b --processes -1", "'-1' is not a number from 1 to 1000"),
        ("worker a:b -q mail:0", "queue 'mail' has limit 0"),
        ("worker a:b -q mail:1.5", "queue 'mail:1.5': expected NAME or NAME:LIMIT"),
        ("worker a:b -q mail:x", "queue 'mail:x': a name has no spaces, commas or colons"),
        ("worker a:b -q default,mail:5", "queue 'default,mail': a name has no"),
        ("worker a:b --lease 1s", "lease_seconds is 1.0; expected seconds, from 6 to a year"),
        ("enqueue X -q mail:5", "queue 'mail:5': a name has no"),
        ("enqueue X -q default,mail", "queue 'default,mail': a name has no"),
        ("worker a:b -q mail -q mail:5", "queue 'mail' is named twice"),
        ("worker a:b --shutdown-timeout soon", "'soon' is not a duration; expected seconds, or 90s, 15m, 12h, 1d"),
        ("worker a:b --shutdown-timeout 9999d", "shutdown_timeout_seconds is"),
        ("worker a:b --poll-interval -1", "'-1' is not a duration"),
        ("worker a:b --history nan", "'nan' is not a duration"),
        ("worker a:b --log-level loud", "'loud' is not one of debug, info, warning, error"),
        ("worker a:b --log-format jsn", "did you mean 'json'?"),
        ("worker a:b --drain=x", "--drain"),
        ("enqueue", "TYPE"),
        ("enqueue X {} more", "more"),
        ("enqueue X --delay tomorrow", "'tomorrow' is not a duration"),
        ("enqueue X --delay 1e9", "'1e9' is not a duration"),
        ("enqueue X --delay 99999999d", "'99999999d' is not a duration"),
        ("enqueue X --run-at tomorrow", "'tomorrow' is not a time; expected ISO 8601 with a zone: 2030-"),
        ("enqueue X --run-at 2030-01-31T08:00:00", "has no zone; expected ISO 8601 with a zone"),
        ("enqueue X --run-at 2030-01-31T08:00:00Z --delay 5", "--delay and --run-at are both given"),
        ("enqueue X --priority 32768", "'32768' is not a number from -32768 to 32767"),
        ("enqueue X --priority high", "'high' is not a number"),
        ("enqueue X --max-attempts 0", "'0' is not a number from 1 to 32767"),
        (f"enqueue {'X' * 201}", "expected 1 to 200 characters"),
        (f"enqueue X -q {'q' * 201}", "expected 1 to 200 characters"),
        ("enqueue X --order-key=", "--order-key '': expected 1 to 200 characters"),
        ("enqueue X --limit-key limit_key", "--limit-key is 'limit_key', and no limit; add --limit 3, --rate \"1"),
        ("enqueue X --rate 5/s", '--limit and --rate are of tasks with the same --limit-key; add --limit-key "..."'),
        ("enqueue X --limit-key k --limit 0", "'0' is not a number from 1 to"),
        ("enqueue X --limit-key k --rate often", "rate is 'often'; expected how many in"),
        ("enqueue X --on-dead run", "--on-dead is 'run'; expected 'cancel' or 'run', beside --after"),
        ("enqueue X --unique-for 1h", "--unique-for, --unique-states and --on-conflict go with --unique KEY, or with"),
        ("enqueue X --on-conflict move", "go with --unique KEY, or with --app"),
        ("enqueue X --unique k --unique-for 0", "--unique-for is 0.0; expected seconds above 0"),
        ("enqueue X --unique k --unique-states redy", "'redy' is not one of scheduled, ready, running, done, dead"),
        ("enqueue X --unique k --unique-states dead", "says for how long; add --unique-for 3600"),
        ("enqueue X --unique k --on-conflict drop", "'drop' is not one of 'keep', 'replace', 'move'"),
        ("tasks --state redy", "'redy' is not one of scheduled, ready, running, done, dead, cancelled; did you"),
        ("tasks --limit 0", "'0' is not a number from 1"),
        ("tasks 5", "5"),
        ("retry", "ID..."),
        ("retry five", "'five' is not a number"),
        ("cancel", "ID..."),
        ("cancel 9223372036854775808", "is not a number from 1"),
        ("prune --history old", "'old' is not a duration"),
        ("prune --dead 1w", "'1w' is not a duration"),
        ("stats --jsn", "--json"),
        ("migrate --sgl", "--sgl"),
        ("schema", "MODULE:APP"),
        ("schema a:b c:d", "c:d"),
        ("demo --seconds long", "'long' is not a valid float"),
        ("demo --seconds 1", "expected 5 to 3600"),
        ("dev --port 0", "'0' is not a number from 1 to 65535"),
        ("dev --port http", "'http' is not a number"),
    ],
)  # fmt: skip
async def test_wrong_usage(run: Run, words: str, says: str) -> None:
    """Exit code 2 before anything is done, and a message with what was expected."""
    said = await run(words)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert all(line.startswith("notifyq: ") for line in said.err.splitlines())


async def test_a_wrong_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that nobody typed has to say where its value came from."""
    monkeypatch.setenv("NOTIFYQ_CONCURRENCY", "lots")
    said = await run("worker a:b")
    assert said.code == 2
    assert "'--concurrency' (env var: 'NOTIFYQ_CONCURRENCY'): 'lots' is not a number" in said.err


@pytest.mark.parametrize("queue", ["default,mail", "mail:x", "tenant:acme:5", ","])
async def test_a_queue_that_is_a_slip_in_a_variable(run: Run, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFYQ_QUEUE", queue)
    said = await run("worker a:b")
    assert said.code == 2
    assert "a name has no spaces, commas or colons" in said.err


async def test_what_is_not_foreseen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is 130, without a traceback. A bug is 1, with one and a request."""

    def fail(with_what: BaseException) -> None:
        def schema_sql() -> str:
            raise with_what

        monkeypatch.setattr(schema, "schema_sql", schema_sql)

    fail(KeyboardInterrupt())
    said = await run("migrate --sql")
    assert (said.code, said.err.strip()) == (130, "notifyq: interrupted")
    fail(ZeroDivisionError("oh"))
    said = await run("migrate --sql")
    assert said.code == 1
    assert "ZeroDivisionError: oh" in said.err
    assert "a bug in notifyq; please report it" in said.err


# -------------------------------------------------------------------------------- the database


@pytest.mark.parametrize("command", ["migrate", *SCHEMA_COMMANDS])
async def test_no_server(run: Run, command: str) -> None:
    """Exit code 3; the message says where it looked and who told it to, and keeps the password to itself."""
    said = await run(command, dsn=NOWHERE)
    assert (said.code, said.out) == (3, "")
    assert "--dsn: postgresql://somebody:***@127.0.0.1:1/nothing" in said.err
    assert "secret" not in said.err
    assert len(said.err.splitlines()) == 1


async def test_where_a_dsn_comes_from(run: Run, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dsn before NOTIFYQ_DSN before DATABASE_URL, whose +driver is ignored, before PG*."""
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", "1")
    said = await run("stats")
    assert said.code == 3
    assert "name a server with --dsn, NOTIFYQ_DSN or DATABASE_URL (to try one: notifyq dev)" in said.err
    monkeypatch.setenv("DATABASE_URL", dsn.replace("postgresql://", "postgresql+asyncpg://"))
    assert (await run("stats")).code == 0
    monkeypatch.setenv("NOTIFYQ_DSN", NOWHERE)
    said = await run("stats")
    assert said.code == 3
    assert "(NOTIFYQ_DSN: postgresql://somebody:***@" in said.err
    assert (await run("stats", dsn=dsn)).code == 0
    for wrong in ("mysql://root:secret@localhost/x", "localhost"):
        monkeypatch.setenv("NOTIFYQ_DSN", wrong)
        said = await run("stats")
        assert said.code == 2
        assert "expected postgresql://user:password@host:5432/database" in said.err
        assert "secret" not in said.err


async def test_no_schema(run: Run, empty_dsn: str) -> None:
    """Exit code 4, and the cure."""
    for command in SCHEMA_COMMANDS:
        said = await run(command, dsn=empty_dsn)
        assert (said.code, said.out) == (4, "")
        assert "has no schema notifyq; install it: notifyq migrate" in said.err


async def test_migrate(run: Run, empty_dsn: str, connect: Sessions) -> None:
    """Installs, then has nothing to do; a newer schema, or somebody else's of that name, is refused with 4."""
    said = await run("migrate", dsn=empty_dsn)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"installed schema notifyq, version {schema.SCHEMA_VERSION}, in database ")
    said = await run("migrate", dsn=empty_dsn)
    assert (said.code, said.out.endswith(f"version {schema.SCHEMA_VERSION}, already\n")) == (0, True)
    conn = await connect(empty_dsn)
    await conn.execute("INSERT INTO notifyq.schema_version (version, serves) VALUES (99, 99)")
    for command in ("migrate", *SCHEMA_COMMANDS):
        said = await run(command, dsn=empty_dsn)
        assert (said.code, said.out) == (4, "")
        assert "version 99, newer than this notifyq" in said.err
    await conn.execute("DROP SCHEMA notifyq CASCADE; CREATE SCHEMA notifyq")
    for command in ("migrate", "stats"):
        said = await run(command, dsn=empty_dsn)
        assert said.code == 4
        assert "that notifyq didn't make" in said.err


async def test_migrate_sql_needs_no_database(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFYQ_DSN", NOWHERE)
    said = await run("migrate --sql")
    assert (said.code, said.out, said.err) == (0, schema.schema_sql(), "")


@pytest.mark.skip("until there is a made-up version to upgrade to")
async def test_migrate_an_older_schema(run: Run, empty_dsn: str, connect: Sessions) -> None:
    """Until then the other commands ask for it. What has to be waited for is said, on stderr."""
    conn = await connect(empty_dsn)
    await conn.execute((Path(__file__).parents[1] / "schemas" / "1.sql").read_text())
    said = await run("stats", dsn=empty_dsn)
    assert (
        said.code,
        f"is version 1, this notifyq needs {schema.SCHEMA_VERSION}; run: notifyq migrate" in said.err,
    ) == (
        4,
        True,
    )
    said = await run("migrate", dsn=empty_dsn)
    assert said.code == 0
    assert re.fullmatch(
        rf"upgraded schema notifyq in database \w+ from version 1 to {schema.SCHEMA_VERSION}\n", said.out
    )
    assert said.err.startswith("notifyq: DROP INDEX CONCURRENTLY")
    assert (await run("stats", dsn=empty_dsn)).code == 0


@pytest.mark.skip("until there is a made-up version to upgrade to")
async def test_migrate_sql_from(run: Run) -> None:
    said = await run("migrate --sql --from 1", dsn=NOWHERE)
    assert (said.code, said.out, said.err) == (0, upgrade.script(1, schema.schema_sql()), "")
    said = await run("migrate --from 1", dsn=NOWHERE)
    assert (said.code, "--from is for --sql" in said.err) == (2, True)
    for wrong in ("0", str(schema.SCHEMA_VERSION), "one"):
        said = await run(f"migrate --sql --from {wrong}", dsn=NOWHERE)
        assert said.code == 2
        assert "is not a number from 1 to" in said.err


async def test_roles(run: Run, server: Server, dsn: str, db: Any) -> None:
    """What schema.sql grants is enough for the commands it is meant for; the others say what is missing."""
    await admin(server, "CREATE ROLE cli_reads LOGIN", "CREATE ROLE cli_enqueues LOGIN")
    try:
        grants = schema.schema_sql().split("-- Roles.")[1]
        for role, heading in (("cli_reads", "may read"), ("cli_enqueues", "may enqueue")):
            block = grants.split(heading)[1].split("   may ")[0].split("   worker ")[0]
            for grant in re.findall(r"GRANT [^;]+;", block.replace("\n--", "")):
                await db.execute(re.sub(r" TO r;", f" TO {role};", grant))
        reads, enqueues = (dsn.replace("notifyq@", f"{role}@") for role in ("cli_reads", "cli_enqueues"))
        assert (await run("enqueue X", dsn=enqueues)).code == 0
        for command in ("stats", "tasks", "stats --json", "tasks --json", "tasks --type Y"):
            assert (await run(command, dsn=reads)).code == 0
        for command, as_whom in (("enqueue X", reads), ("prune", reads), ("cancel 1", reads), ("stats", enqueues)):
            said = await run(command, dsn=as_whom)
            assert said.code == 3
            assert "schema.sql ends with the GRANTs" in said.err
    finally:
        await db.execute("DROP OWNED BY cli_reads, cli_enqueues")
        await admin(server, "DROP ROLE cli_reads", "DROP ROLE cli_enqueues")


async def test_a_standby_is_refused(run: Run, dsn: str) -> None:
    said = await run("enqueue X", dsn=f"{dsn}&options=-c%20default_transaction_read_only%3Don")
    assert said.code == 3
    assert "read-only" in said.err


# -------------------------------------------------------------------------------- enqueue


async def test_enqueue(run: Run, dsn: str, db: Any) -> None:
    """The id is all that it prints, and the row is as asked."""
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
    ):
        said = await run(f"enqueue X {words}", dsn=dsn)
        assert (said.code, said.err) == (0, "")
        assert json.loads(await options_of(db, said)) == expected


async def test_the_environment_of_a_worker(run: Run, dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands there, for whichever command: other commands do what they do without it."""
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
    """The id of the one that is there is printed, and on stderr what became of that one."""
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
    # It is scheduled, which isn't in the way of who asks for the ready and the done ones.
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
    """With or without the mark that some editors put in front of UTF-8."""
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
    """Exit code 2, and where it is wrong."""
    for payload, stdin, says in BAD_PAYLOADS:
        said = await run("enqueue X", payload, dsn=dsn, stdin=stdin)
        assert (said.code, said.out) == (2, "")
        assert says in said.err
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an app in it."""
    (tmp_path / "mailer.py").write_text(MAILER)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


MAILER = """
import asyncio, signal, subprocess, time
import notifyq

app = notifyq.App()

class Mail(notifyq.Task, tag="SEND_MAIL"):
    to: str

class Sleep(notifyq.Task, tag="SLEEP"):
    how: str = "well"

class Thread(notifyq.Task, tag="THREAD"):
    pass

@app.handler
async def mail(task: Mail, ctx: notifyq.Context) -> str:
    print("mail", task.to, flush=True)  # first: what it enqueues may run before its enqueue returns
    if task.to == "again":
        await app.enqueue(Mail(to="me"))
    return "sent"

@app.handler
async def sleep(task: Sleep, ctx: notifyq.Context) -> None:
    if task.how == "takes signals":
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)
    if task.how == "child":
        child = subprocess.Popen(["sleep", "60"])
        child.terminate()
        print("child ended with", child.wait(), flush=True)
    print("sleeps", task.how, flush=True)
    if task.how == "blocks":
        time.sleep(60)
    await asyncio.sleep(60)

@app.handler
def thread(task: Thread) -> None:
    print("sleeps in a thread", flush=True)
    time.sleep(60)
"""


async def test_enqueue_validates_against_an_app(run: Run, dsn: str, folder: Path) -> None:
    """A type or a payload that the app doesn't take is refused before it is sent."""
    assert (await run("enqueue SEND_MAIL --app mailer:app", '{"to": "a@b.c"}', dsn=dsn)).code == 0
    for words, payload, says in (
        ("SEND_MIAL --app mailer:app", "{}", "no handler takes type 'SEND_MIAL'; did you mean SEND_MAIL?"),
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
    """What the class says of its tasks holds, and any of it can be said otherwise. Without --app nobody knows of it."""
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


# -------------------------------------------------------------------------------- schema


async def test_schema(run: Run, folder: Path) -> None:
    """Printed whole to a pipe; what was printed is compatible with itself."""
    printed = await run("schema mailer:app")
    assert (printed.code, printed.err) == (0, "")
    assert json.loads(printed.out)["properties"]["SEND_MAIL"]["required"] == ["to"]
    (folder / "old.json").write_text(printed.out)
    same = await run("schema mailer:app --check old.json")
    assert (same.code, same.out, same.err) == (0, "", "notifyq: nothing that is queued breaks\n")
    document = json.loads(printed.out)
    document["properties"]["GONE"] = {"type": "object", "properties": {}}
    (folder / "old.json").write_text(json.dumps(document))
    gone = await run("schema mailer:app --check old.json")
    assert (gone.code, gone.err) == (1, "")
    assert gone.lines == [
        "GONE $: no handler takes this type any more; keep its handler until no such task is left, or cancel those"
    ]


async def test_schema_with_no_document(run: Run, folder: Path) -> None:
    said = await run("schema mailer:app --check nowhere.json")
    assert (said.code, said.out) == (2, "")
    assert "--check can't read nowhere.json: No such file or directory; make it: notifyq schema" in said.err
    (folder / "old.json").write_text('{"a": 1}')
    said = await run("schema mailer:app --check old.json")
    assert (said.code, said.out) == (2, "")
    assert "--check old.json is nothing that `notifyq schema` printed" in said.err


async def test_schema_queued(run: Run, dsn: str, db: Any, folder: Path) -> None:
    """Each kind of trouble is a line, and what has ended is nobody's."""
    await run("enqueue SEND_MAIL", '{"to": "a@b.c"}', dsn=dsn)
    fine = await run("schema mailer:app --queued", dsn=dsn)
    assert (fine.code, fine.out) == (0, "")
    await db.execute("INSERT INTO notifyq.task (type) SELECT 'SEND_MAIL' FROM generate_series(1, 3)")
    await db.execute("INSERT INTO notifyq.task (type) VALUES ('SEND_MIAL')")
    said = await run("schema mailer:app --queued", dsn=dsn)
    assert said.code == 1
    assert said.lines == [
        "the payload doesn't fit SEND_MAIL: Object missing required field `to`: task 2, and 2 more, to 4",
        "no handler takes type 'SEND_MIAL'; did you mean SEND_MAIL?: task 5",
    ]
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task WHERE id > 1")
    assert (await run("schema mailer:app --queued", dsn=dsn)).code == 0
    assert (await run("schema mailer:app --queued", dsn=NOWHERE)).code == 3


# -------------------------------------------------------------------------------- MODULE:APP


def unloadable(spec: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load_app(spec)
    return raised.value


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mailer", "'mailer' names no app; expected MODULE:APP, such as myproject.tasks:app"),
        ("mailer:", "names no app"),
        (":app", "names no app"),
        ("mailer.py:app", "names no app; expected MODULE:APP, such as myproject.tasks:app; for this file: mailer:app"),
        ("./mailer.py", "for this file: mailer:app"),
        ("a b:c", "names no app"),
        ("maler:app", "there is no module 'maler' for maler:app (in "),
        ("maler:app", "); did you mean 'mailer'?"),
        ("xyzzy:app", "expected MODULE:APP, such as myproject.tasks:app, from this folder or installed"),
        ("package.taks:app", "there is no module 'package.taks'"),
        ("package.taks:app", "did you mean 'package.tasks'?"),
        ("mailer.tasks:app", "there is no module 'mailer.tasks'"),
        ("mailer:ap", "mailer has no 'ap'; did you mean 'app'?"),
        ("mailer:xyzzy", "mailer has no 'xyzzy'; its apps: mailer:app"),
        ("mailer:app.inner", "mailer:app has no 'inner'; its apps: mailer:app"),
        ("mailer:Mail", "mailer:Mail is of type StructMeta; expected a notifyq.App; its apps: mailer:app"),
        ("nothing:app", "nothing has no 'app'; make one there: app = notifyq.App()"),
        ("empty:app", "empty:app has no handlers, so there is nothing to run; decorate one with @app.handler"),
        ("untyped:app", "untyped.py, line 3: handler untyped.f: its first parameter has no type"),
        ("twice:app", "twice.py, line 6: "),
    ],
)  # fmt: skip
def test_an_app_that_cannot_be_loaded(folder: Path, spec: str, says: str) -> None:
    """What is wrong, what was expected, and what it may have meant."""
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "tasks.py").touch()
    (folder / "nothing.py").touch()
    (folder / "empty.py").write_text("import notifyq\napp = notifyq.App()")
    (folder / "untyped.py").write_text("import notifyq\napp = notifyq.App()\n@app.handler\nasync def f(task): ...")
    two = "import notifyq\nclass A(notifyq.Task): ...\napp = notifyq.App()\n@app.handler\ndef f(t: A): ...\n"
    (folder / "twice.py").write_text(two + "@app.handler\ndef g(t: A): ...")
    error = unloadable(spec)
    assert says in str(error)
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize("app", ["await app.run_worker()", "async with app.connect(): ..."])
def test_a_script_without_its_guard(folder: Path, app: str) -> None:
    """It would run in place of the command, without banner and signals."""
    code = "import asyncio, notifyq\napp = notifyq.App()\nclass A(notifyq.Task): ...\n@app.handler\ndef f(t: A): ...\n"
    (folder / "bare.py").write_text(f"{code}async def main():\n    {app}\nasyncio.run(main())\n")
    error = unloadable("bare:app")
    assert str(error).startswith("bare.py, line 7: app.")
    assert str(error).endswith('put what calls it under `if __name__ == "__main__":`')


def test_modules_that_import_each_other(folder: Path) -> None:
    (folder / "one.py").write_text("import two\nimport notifyq\napp = notifyq.App()\n")
    (folder / "two.py").write_text("from one import app\n")
    error = unloadable("one:app")
    assert "put `app = notifyq.App()` in a module of its own that imports none of them" in str(error)


async def test_a_file_that_hides_a_module_of_pythons(run: Run, start: Start, folder: Path) -> None:
    """It isn't a bug in notifyq: by its name, by what imports it later, as a package."""
    shutil.copy(folder / "mailer.py", folder / "queue.py")
    program = start("worker queue:app", first="sys.path.remove('')")  # as the installed script has it
    assert await program.end() == 2
    assert "queue.py has the name of Python's own module 'queue'" in program.said
    assert "rename queue.py" in program.said
    (folder / "shop.py").write_text("import colorsys\ncolorsys.rgb_to_hsv\n")
    (folder / "colorsys.py").write_text("")
    (folder / "shop2.py").write_text("from sched import scheduler\n")
    (folder / "sched").mkdir()
    (folder / "sched" / "__init__.py").write_text("")
    for module, file in (("shop", "colorsys.py"), ("shop2", "sched/__init__.py")):
        program = start(f"worker {module}:app")
        assert await program.end() == 2
        assert f"notifyq: {file} has the name of Python's own module" in program.said
        assert "a bug in notifyq" not in program.said
    # What notifyq itself imports later.
    later = "lambda _: (sys.path.insert(0, '.'), __import__('colorsys').rgb_to_hsv)"
    program = start("worker mailer:app", first=f"import notifyq.cli.worker as w; w.load_app = {later}")
    assert await program.end() == 2
    assert "notifyq: colorsys.py has the name of Python's own module 'colorsys', which others need" in program.said
    assert "a bug in notifyq" not in program.said


async def test_an_app_without_handlers_validates(run: Run, dsn: str, db: Any, folder: Path) -> None:
    """A process that only enqueues declares tasks, and has none to run them."""
    (folder / "shop.py").write_text(
        "import notifyq\napp = notifyq.App()\nclass Buy(notifyq.Task, tag='BUY'):\n    unique = True\n    what: str\n"
    )
    first = await run("enqueue BUY --app shop:app", '{"what": "tea"}', dsn=dsn)
    assert (first.code, first.err) == (0, "")
    assert (await run("enqueue BUY --app shop:app", '{"what": "tea"}', dsn=dsn)).out == first.out
    said = await run("enqueue BUY --app shop:app", '{"what": 5}', dsn=dsn)
    assert (said.code, said.out) == (2, "")
    assert "the payload doesn't fit BUY: Expected `str`, got `int`" in said.err
    said = await run("enqueue BYU --app shop:app", '{"what": "tea"}', dsn=dsn)
    assert "no handler takes type 'BYU'; did you mean BUY?" in said.err


async def test_a_type_that_no_worker_takes(run: Run, dsn: str, db: Any) -> None:
    """A note beside the id, if workers are up; the task is enqueued all the same."""
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


@pytest.mark.parametrize(
    ("code", "what", "where"),
    [
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero", "broken.py, line 2"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'", "broken.py, line 1"),
        ("import mailer.nowhere", "No module named 'mailer.nowhere'", "broken.py, line 1"),
        ("x = = 1", "SyntaxError: invalid syntax", "broken.py, line 1"),
        ("import sys\nsys.exit(7)", "SystemExit: 7", "broken.py, line 2"),
        ("raise ValueError('a\\nb')", "ValueError: a", "broken.py, line 1"),
    ],
)
def test_an_app_that_fails(folder: Path, code: str, what: str, where: str) -> None:
    """Three lines of ours: what was imported, what failed and where, what to do. Then their traceback, and no more."""
    (folder / "broken.py").write_text(code)
    error = unloadable("broken:app")
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert lines[0] == f"can't import broken (looked for in {folder} first)"
    assert lines[1].startswith(f"it failed at {where}: ")
    assert what in lines[1]
    assert "python -c 'import broken'" in lines[2]
    (trace,) = error.__notes__
    assert 'broken.py", line' in trace
    assert "importlib" not in trace
    assert "load.py" not in trace


async def test_the_traceback_of_a_failing_app_is_shown(run: Run, folder: Path) -> None:
    """After our lines, as it is."""
    (folder / "broken.py").write_text("1 / 0")
    said = await run("enqueue X --app broken:app")
    lines = said.err.splitlines()
    assert said.code == 2
    assert [line.startswith("notifyq: ") for line in lines[:4]] == [True, True, True, False]
    assert lines[3] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"


# -------------------------------------------------------------------------------- tasks, retry, cancel, prune


async def fill(db: Any) -> dict[str, int]:
    """A task in each state, the newest last; its id by its state."""
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
    """Newest first, with the time that matters in each state, and the error's first characters, harmless ones."""
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
    """It is compared, and is no part of the statement."""
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
    """A line each with all that the view has, whole."""
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
    """Nothing on stdout; on stderr what may have been meant."""
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
    """All of one task, for people and as JSON; its errors attempt by attempt."""
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
    """Each change until the end, and then the whole; 1 if that isn't done."""
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
    """What can be retried is; for the others it says why not; 1 if there was one."""
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
    """A task that hasn't ended ends so; 1 if one had, or isn't there."""
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
    """By default what workers do; by age; and all, in batches."""
    await fill(db)
    assert (await run("prune", dsn=dsn)).out == "pruned 1 task\n"  # the one cancelled 3 days ago
    assert (await run("prune --history 2h --dead 4d", dsn=dsn)).out == "pruned 0 tasks\n"
    assert (await run("prune --history 30m --dead 4d", dsn=dsn)).out == "pruned 1 task\n"
    monkeypatch.setattr(tasks, "PRUNE_AT_ONCE", 2)
    await db.execute("INSERT INTO notifyq.task (type) SELECT 'X' FROM generate_series(1, 5)")
    await db.execute("SELECT notifyq.cancel(id) FROM notifyq.task WHERE type = 'X'")
    assert (await run("prune --history 0 --dead 0", dsn=dsn)).out == "pruned 6 tasks\n"
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 3


# -------------------------------------------------------------------------------- stats, tables


async def test_stats(run: Run, dsn: str, db: Any) -> None:
    """Counts by queue and state, how long the oldest waits, what nobody takes, and the workers."""
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
    """Paused, resumed and limited; and a note about a queue that no worker serves, since a name may be mistyped."""
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
        ("queue limit mail", "say --running N"),
        ("queue limit mail --none --running 3", "say --running N"),
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
    """The same cells, whatever is in them; and plain text where rich isn't installed."""
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


# -------------------------------------------------------------------------------- worker


class Program:
    """`notifyq ...` in a process of its own. `line` and `end` read what it prints, stderr in between."""

    def __init__(self, words: str, folder: Path, dsn: str, first: str = "", **environment: str) -> None:
        code = f"import sys; {first}\nfrom notifyq.cli import main\nsys.exit(main(sys.argv[1:]))"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *words.split()],
            cwd=folder,
            env={**os.environ, "NOTIFYQ_DSN": dsn, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""

    async def line(self, text: str) -> str:
        """The next line with this text."""
        assert self.popen.stdout is not None
        with anyio.fail_after(limit()):
            while read := await anyio.to_thread.run_sync(self.popen.stdout.readline, abandon_on_cancel=True):
                self.said += read
                if text in read:
                    return read
        raise AssertionError(f"it ended with {self.popen.wait()} before {text!r}:\n{self.said}")

    async def end(self, *signals: int) -> int:
        """Send it these; its exit code. Whoever else writes to the same place, a child, has ended too."""
        for number in signals:
            self.popen.send_signal(number)
        with anyio.fail_after(limit()):
            rest, _ = await anyio.to_thread.run_sync(self.popen.communicate, abandon_on_cancel=True)
        self.said += rest
        return self.popen.returncode


@pytest.fixture
def start(folder: Path, dsn: str) -> Iterator[Callable[..., Program]]:
    """`start("worker mailer:app")`: killed at the end of the test, if it still runs."""
    programs: list[Program] = []

    def program(words: str, *, at: str = dsn, first: str = "", **environment: str) -> Program:
        programs.append(Program(words, folder, at, first, **environment))
        return programs[-1]

    yield program
    for running in programs:
        if running.popen.poll() is None:
            running.popen.kill()
            running.popen.communicate()
        assert running.popen.stdout
        running.popen.stdout.close()


Start = Callable[..., Program]
LOOPS = {"uvloop": "", "asyncio": "sys.modules['uvloop'] = None"}
INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2) RETURNING id"
STATE = "SELECT state, attempts::integer FROM notifyq.all_tasks WHERE id = $1"


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_worker(start: Start, db: Any, loop: str) -> None:
    """Says what it is, runs tasks, lets handlers enqueue through the app, and ends clean; logs have no payloads."""
    worker = start("worker mailer:app -q default -q mail:5 -c 7 --threads 3", first=LOOPS[loop])
    banner = await worker.line("notifyq 0")
    assert re.fullmatch(r"notifyq \S+: worker \d+ \(\S+:\d+\) on PostgreSQL [\d.]+, schema \d+\n", banner)
    assert await worker.line("queues") == "  queues   default, mail (5 at once); 7 tasks at once, 3 in threads\n"
    assert await worker.line("types") == "  types    SEND_MAIL, SLEEP, THREAD\n"
    assert re.search(r"proven, \d+\.\d ms there and back", await worker.line("bell"))
    await db.fetchval(INSERT, "SEND_MAIL", b'{"to": "again"}')
    await worker.line("mail again")
    await worker.line("mail me")
    bad = await db.fetchval(INSERT, "SEND_MAIL", b'{"to": 5, "password": "secret"}')
    line = await worker.line("task dead")
    assert re.match(r"\d{4}-\d\d-\d\dT\S+ ERROR notifyq\.run: task dead id=\d+ type=SEND_MAIL queue=default ", line)
    assert f"id={bad} " in line
    assert await worker.end(signal.SIGTERM) == 0
    assert "secret" not in worker.said
    assert await db.fetchval("SELECT count(*) FROM notifyq.worker") == 0


async def test_drain_and_json_logs(start: Start, db: Any) -> None:
    """The app and the flags may come from variables. Every line of the log is an object."""
    await db.execute(
        "INSERT INTO notifyq.task (type, payload) SELECT 'SEND_MAIL', '{\"to\": \"x\"}' FROM generate_series(1, 20)"
    )
    flags = {"APP": "mailer:app", "DRAIN": "1", "LOG_FORMAT": "json", "HISTORY": "0", "QUEUE": "default:2 mail"}
    worker = start("worker", **{f"NOTIFYQ_{name}": value for name, value in flags.items()})
    assert await worker.end() == 0
    lines = worker.said.splitlines()
    assert lines.count("mail x") == 20
    first = json.loads(lines[0])
    assert (first["message"], first["level"], first["logger"]) == ("worker started", "info", "notifyq.cli")
    assert (first["queues"], first["types"]) == (["default (2 at once)", "mail"], ["SEND_MAIL", "SLEEP", "THREAD"])
    assert (first["pid"], first["schema"], first["bell"][-3:]) == (worker.popen.pid, schema.SCHEMA_VERSION, " ms")
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 0, "no history was asked for"


async def test_a_worker_that_cannot_start(start: Start, empty_dsn: str) -> None:
    """3 without a server, 4 without a schema, 2 without an app; a line each."""
    for program, code, says in [
        (start("worker mailer:app", at=NOWHERE), 3, "(NOTIFYQ_DSN: postgresql://somebody:***@127.0.0.1:1/nothing)"),
        (start("worker mailer:app", at=empty_dsn), 4, "install it: notifyq migrate"),
        (start("worker mailer:app --processes 2", at=empty_dsn), 4, "install it: notifyq migrate"),
        (start("worker mailr:app"), 2, "there is no module 'mailr' for mailr:app"),
        (start("worker mailr:app --processes 3"), 2, "there is no module 'mailr' for mailr:app"),
    ]:
        assert await program.end() == code
        assert says in program.said
        assert len(program.said.splitlines()) == 1, program.said
        assert "secret" not in program.said


WATCH = "import notifyq.worker.signals as w; w.LATE_SECONDS = w.FORCED_SECONDS = {}; "


HANDED_BACK, ENDED = "handing their tasks back", "handlers don't end: ending the process"
ONE, TWO = [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(
    ("loop", "how", "timeout", "signals", "code", "after", "says"),
    [
        ("uvloop", "well", 0, ONE, 0, ("ready", 0), HANDED_BACK),
        ("asyncio", "well", 20, TWO, 1, ("ready", 0), HANDED_BACK),
        ("uvloop", "child", 0, ONE, 0, ("ready", 0), "child ended with -15"),
        *((loop, "takes signals", 0, ONE, 0, ("ready", 0), HANDED_BACK) for loop in LOOPS),
        *((loop, "takes signals", 20, TWO, 1, ("ready", 0), HANDED_BACK) for loop in LOOPS),
        *((loop, "blocks", 0, ONE, 1, ("running", 1), ENDED) for loop in LOOPS),
        *((loop, "blocks", 20, TWO, 1, ("running", 1), ENDED) for loop in LOOPS),
    ],
)
async def test_signals(
    start: Start, db: Any, loop: str, how: str, timeout: int, signals: list[int], code: int, after: Any, says: str
) -> None:
    """The first stops with the timeout, the second now; whatever a handler does to the loop, or to signals."""
    more = 0.3 if how == "blocks" else limit()  # for what ends by itself, if only it has the time
    worker = start(f"worker mailer:app --shutdown-timeout {timeout}", first=WATCH.format(more) + LOOPS[loop])
    id = await db.fetchval(INSERT, "SLEEP", json.dumps({"how": how}).encode())
    await worker.line(f"sleeps {how}")
    assert await worker.end(*signals) == code
    assert says in worker.said
    assert "Traceback" not in worker.said
    assert tuple(await db.fetchrow(STATE, id)) == after


async def test_a_thread_keeps_nobody(start: Start, db: Any) -> None:
    """A plain handler can't be cancelled. Its task is handed back, and the process ends without waiting for it."""
    worker = start("worker mailer:app --shutdown-timeout 0", first=WATCH.format(limit()))
    id = await db.fetchval(INSERT, "THREAD", b"{}")
    await worker.line("sleeps in a thread")
    assert await worker.end(signal.SIGTERM) == 0
    assert tuple(await db.fetchrow(STATE, id)) == ("ready", 0)


async def test_the_schema_goes_away(start: Start, db: Any) -> None:
    """Nothing to wait for: exit code 4."""
    worker = start("worker mailer:app")
    await worker.line("stop it")
    while True:
        try:
            await db.execute("DROP SCHEMA notifyq CASCADE")
            break
        except asyncpg.DeadlockDetectedError:
            pass  # with a statement of the worker's, which has some of the tables and wants others
    assert await worker.end() == 4
    assert "notifyq migrate" in worker.said


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("notifyq.run", logging.INFO, "", 1, message, None, None)
    made.fields = fields
    return made


def test_log_lines() -> None:
    """key=value, in quotes where a reader would lose the thread; one line a record, and a traceback after it."""
    text = logs.TextLines(pid=False).format(
        record("a\r\nb", id=5, types=["A", "B"], error='he said "no"', empty="", x="\x1b")
    )
    assert text.split("notifyq.run: ")[1] == 'a\\r\\nb id=5 types=A,B error="he said \\"no\\"" empty="" x="\\u001b"'
    assert f" INFO notifyq.run[{os.getpid()}]: hello" in logs.TextLines(pid=True).format(record("hello"))
    try:
        raise ValueError("oh")
    except ValueError:
        failed = record("failed", id=5)
        failed.exc_info = sys.exc_info()
    assert logs.TextLines(pid=False).format(failed).splitlines()[-1] == "ValueError: oh"
    line = json.loads(logs.JsonLines().format(failed))
    assert (line["message"], line["id"], line["pid"]) == ("failed", 5, os.getpid())
    assert line["traceback"].endswith("ValueError: oh")


# -------------------------------------------------------------------------------- --processes


async def pids(supervisor: Program, count: int) -> list[int]:
    """Of so many workers, as they start."""
    started = [await supervisor.line("worker started") for _ in range(count)]
    return [int(line.split("[")[1].split("]")[0]) for line in started]


async def test_a_family(start: Start, db: Any) -> None:
    """Each is a worker. One that dies is replaced; Ctrl-C is for the parent, which ends them all."""
    supervisor = start(
        "worker mailer:app --processes 2", first="import notifyq.cli.supervisor as f; f.BACKOFF_SECONDS = 0.01, 1"
    )
    one, two = await pids(supervisor, 2)
    assert len({one, two, supervisor.popen.pid}) == 3
    assert os.getsid(one) == one, "a terminal's Ctrl-C would reach the children"
    os.kill(two, signal.SIGKILL)
    line = await supervisor.line("ended by itself, starting another")
    assert f"notifyq.cli[{supervisor.popen.pid}]" in line
    assert "ended=SIGKILL" in line
    (three,) = await pids(supervisor, 1)
    assert three not in {one, two}
    for _ in range(2):
        await db.fetchval(INSERT, "SEND_MAIL", b'{"to": "x"}')
        await supervisor.line("mail x")
    assert await supervisor.end(signal.SIGINT) == 0


FAKE_CHILD = """
import os, signal, sys
os.write(int(os.environ["_NOTIFYQ_PARENT"]), b"+")
with open(sys.argv[1], "a+") as runs:
    first = not (runs.seek(0), runs.read())[1]
    print("run", file=runs, flush=True)
if first:
    sys.exit(3)
signal.pause()
"""


async def test_a_child_that_loses_its_database_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3 ends all processes only at the start, where another try would go no better."""
    runs = tmp_path / "runs"
    monkeypatch.setattr(supervisor, "CHILD", (sys.executable, "-I", "-S", "-c", FAKE_CHILD))
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.0, 1.0))
    parent = supervisor.Supervisor([str(runs)], 1, 5.0, False)

    async def count() -> int:
        return len(runs.read_text().splitlines()) if runs.exists() else 0

    async with anyio.create_task_group() as group:
        group.start_soon(parent._keep_child_running)
        await eventually(count, 2)
        assert not parent._stop.is_set()
        parent._shut_down()
    assert parent._code == 0


async def test_a_family_whose_parent_is_killed(start: Start, db: Any) -> None:
    """The children notice, and drain. (That `end` returns says that they are gone.)"""
    supervisor = start("worker mailer:app --processes 2")
    await pids(supervisor, 2)
    assert await supervisor.end(signal.SIGKILL) == -signal.SIGKILL
    assert supervisor.said.count("the parent process is gone: stopping") == 2
    # By themselves they are gone from the database too, but for one that had no time to say so.
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.worker"), 0)


async def test_a_family_drains(start: Start, db: Any) -> None:
    await db.execute(
        "INSERT INTO notifyq.task (type, payload) SELECT 'SEND_MAIL', '{\"to\": \"x\"}' FROM generate_series(1, 20)"
    )
    supervisor = start("worker mailer:app --processes 2 --drain")
    assert await supervisor.end() == 0
    assert supervisor.said.count("mail x") == 20


async def test_a_family_that_is_stuck(start: Start, db: Any) -> None:
    """Two signals reach a child that blocks, and don't help; the parent ends it then, and its own exit code is 1."""
    quick = "import notifyq.cli.supervisor as f; f.FORCED_SECONDS = f.PATIENCE_SECONDS = 0.2"
    supervisor = start("worker mailer:app --processes 2", first=quick)
    await pids(supervisor, 2)
    await db.fetchval(INSERT, "SLEEP", b'{"how": "blocks"}')
    await supervisor.line("sleeps blocks")
    assert await supervisor.end(signal.SIGTERM, signal.SIGINT) == 1
    assert "a worker process doesn't end: killing it" in supervisor.said


# -------------------------------------------------------------------------------- dev, demo


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the account which runs PostgreSQL for root may pass; pytest's are closed."""
    with tempfile.TemporaryDirectory(prefix="nq-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow
async def test_dev(start: Start, open_folder: Path, folder: Path, run: Run) -> None:
    """Its first line is a DSN to a migrated database. A second one attaches, says whose the server is, and leaves it as
    it was. If the server dies, so does dev; a signal ends both. The next one has the same DSN and the same data."""
    state = {"XDG_STATE_HOME": str(open_folder)}
    first = start("dev", **state)
    dsn = (await first.line("")).strip()
    assert dsn.startswith("postgresql://notifyq@")
    assert f"data in {open_folder}/notifyq/dev/{database.project_name(folder)}" in await first.line("PostgreSQL ")
    assert f"export NOTIFYQ_DSN='{dsn}'; end it" in await first.line("use it")
    assert (await run("enqueue X", dsn=dsn)).out == "1\n"
    second = start("dev", **state)
    assert (await second.line("postgresql://")).strip() == dsn
    assert f"shares the one that process {first.popen.pid} runs: it ends when" in await second.line("PostgreSQL ")
    assert await second.end(signal.SIGTERM) == 0
    assert (await run("tasks", dsn=dsn)).code == 0
    server = int(re.search(r"process (\d+), data", first.said)[1])  # type: ignore[index]
    os.kill(server, signal.SIGKILL)
    assert await first.end() == 1
    assert "PostgreSQL has ended by itself;" in first.said
    third, fourth = start("dev", **state), None
    assert (await third.line("postgresql://")).strip() == dsn
    assert (await run("tasks", dsn=dsn)).lines[1].split()[0] == "1", "its data are kept"
    fourth = start("dev", **state)
    await fourth.line("use it")
    assert await third.end(signal.SIGINT) == 0
    assert await fourth.end() == 1
    assert f"PostgreSQL has ended; it was the one that process {third.popen.pid} runs" in fourth.said
    assert (await run("tasks", dsn=dsn)).code == 3


@pytest.mark.slow
async def test_dev_keeps_projects_apart(start: Start, open_folder: Path, folder: Path, run: Run) -> None:
    """By folder, by name, by --data-dir; from wherever in a project it is started."""
    state = {"XDG_STATE_HOME": str(open_folder)}
    one, two, three = start("dev", **state), start("dev shop", **state), start(f"dev --data-dir {open_folder}/d")
    dsns = [(await each.line("postgresql://")).strip() for each in (one, two, three)]
    assert len(set(dsns)) == 3
    assert f"{open_folder}/notifyq/dev/shop/sock" in dsns[1]
    assert f"{open_folder}/d/sock" in dsns[2]
    await run("enqueue X", dsn=dsns[0])
    assert "no such tasks" in (await run("tasks", dsn=dsns[1])).err
    for each in (one, two, three):
        assert await each.end(signal.SIGTERM) == 0
    (folder / "project" / "src" / "deep").mkdir(parents=True)
    (folder / "project" / "pyproject.toml").touch()
    (folder / "other" / "project").mkdir(parents=True)
    names = [database.project_name(folder / name) for name in ("project", "project/src/deep", "other/project")]
    assert names[0] == names[1] != names[2]
    assert all(re.fullmatch(r"project-[0-9a-f]{6}", name) for name in names)
    for words, says in (
        ("dev ../x", "NAME is '../x'; expected up to 40 letters"),
        ("dev x --data-dir y", "NAME 'x' and --data-dir y both say where the data are"),
    ):
        said = await run(words)
        assert (said.code, said.out) == (2, "")
        assert says in said.err


@pytest.mark.slow
async def test_dev_that_cannot_start(start: Start, open_folder: Path, folder: Path) -> None:
    """Exit code 2, and a way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start(f"dev --port {port} --data-dir {open_folder}/data")
        assert await program.end() == 2
        assert f"notifyq: port {port} of 127.0.0.1 is taken; choose another" in program.said
    (open_folder / "file").touch()
    program = start(f"dev --data-dir {open_folder}/file")
    assert await program.end() == 2
    assert "choose a folder that this user may write to (--data-dir)" in program.said
    program = start("dev", NOTIFYQ_PG_BIN="/nowhere", XDG_STATE_HOME=str(open_folder))
    assert await program.end() == 2
    assert "NOTIFYQ_PG_BIN" in program.said
    left = list((open_folder / "notifyq" / "dev").iterdir())
    assert [kept.name for kept in left] == [database.project_name(folder)], "in the test's own folder"


def test_where_dev_keeps_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XDG says; root has a place that others may pass."""
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, says XDG
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert database.state_folder() == Path("/home/somebody/.local/state/notifyq/dev")
    monkeypatch.delenv("HOME")
    no_names: dict[int, str] = {}
    monkeypatch.setattr("pwd.getpwuid", lambda id: no_names[id])
    with pytest.raises(ConfigError, match="no home folder to keep data in; say where: --data-dir FOLDER"):
        database.state_folder()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert database.state_folder() == Path("/var/lib/notifyq/dev")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert database.state_folder() == Path("/state/notifyq/dev")


async def test_demo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed its flags, and its exit code is ours. Where NOTIFYQ_DSN points is none of its business."""
    asked: list[Any] = []

    def demo(seconds: float, tasks: int, dsn: str | None) -> int:
        asked.append((seconds, tasks, dsn))
        return 1

    monkeypatch.setattr("notifyq.demo.main", demo)
    monkeypatch.setenv("NOTIFYQ_DSN", NOWHERE)
    assert (await run("demo --seconds 7")).code == 1
    assert (await run("demo --seconds 6.5 --tasks 300", dsn="postgresql://x/y")).code == 1
    assert asked == [(7.0, 5000, None), (6.5, 300, "postgresql://x/y")]
