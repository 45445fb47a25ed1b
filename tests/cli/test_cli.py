"""The command line: its commands, wrong flags, exit codes, and the commands for the schema.

Commands that end by themselves run in this process, in a thread. Workers and `dev` run in processes of their own, since
their tests are about signals and exit codes; a test follows what they print.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
import pytest

from notifyq.cli import COMMANDS
from notifyq.database import schema, upgrade
from notifyq.embedded import Server

from ..helpers import next_version
from ..helpers.command import Run
from ..helpers.databases import Sessions, admin

NOWHERE = "postgresql://somebody:secret@127.0.0.1:1/nothing"
SCHEMA_COMMANDS = ["tasks", "show 1", "stats", "enqueue X", "retry 1", "cancel 1", "prune"]


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
    """A call without a command is a mistake, but one that is answered with help."""
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
    """A value that doesn't come from the command line needs its source in the message."""
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


@pytest.mark.parametrize("command", ["migrate", *SCHEMA_COMMANDS])
async def test_no_server(run: Run, command: str) -> None:
    """Exit code 3. The message says where it looked and which setting said so, and doesn't show the password."""
    said = await run(command, dsn=NOWHERE)
    assert (said.code, said.out) == (3, "")
    assert "the given DSN: postgresql://somebody:***@127.0.0.1:1/nothing" in said.err
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
    """It installs, then has nothing to do. A newer schema, or another one of that name, is refused with 4."""
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


async def test_migrate_an_older_schema(
    run: Run, empty_dsn: str, connect: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the other commands ask for it. What the upgrade waits for is said on stderr."""
    next_version.use(monkeypatch)
    await next_version.install(await connect(empty_dsn))
    said = await run("stats", dsn=empty_dsn)
    present, after = schema.SCHEMA_VERSION - 1, schema.SCHEMA_VERSION
    says = f"is version {present}, this notifyq needs {after}; run: notifyq migrate"
    assert (said.code, says in said.err) == (4, True)
    said = await run("migrate", dsn=empty_dsn)
    assert said.code == 0
    assert re.fullmatch(rf"upgraded schema notifyq in database \w+ from version {present} to {after}\n", said.out)
    assert said.err.startswith("notifyq: DROP INDEX CONCURRENTLY")
    assert (await run("stats", dsn=empty_dsn)).code == 0


async def test_migrate_sql_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    present = schema.SCHEMA_VERSION
    said = await run(f"migrate --sql --from {present}", dsn=NOWHERE)
    assert (said.code, f"--from {present} is this notifyq's own version" in said.err) == (2, True)
    for wrong in ("0", str(present + 1), "one"):
        said = await run(f"migrate --sql --from {wrong}", dsn=NOWHERE)
        assert (said.code, "is not a number from 1 to" in said.err) == (2, True)
    next_version.use(monkeypatch)
    said = await run(f"migrate --sql --from {present}", dsn=NOWHERE)
    assert (said.code, said.out, said.err) == (0, upgrade.script(present, schema.schema_sql()), "")
    said = await run(f"migrate --from {present}", dsn=NOWHERE)
    assert (said.code, "--from goes with --sql" in said.err) == (2, True)


async def test_roles(run: Run, server: Server, dsn: str, db: Any) -> None:
    """The grants in schema.sql are enough for the commands that they are meant for. The other commands say what is
    missing."""
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
