"""Each fenced block of README and docs/ is run, or checked as far as it can be; those that aren't say why."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread
import asyncpg
import click
import pytest

import notifyq
from notifyq.cli import cli

from .test_docs_examples import prints_what_it_shows

ROOT = Path(__file__).parents[2]
# By their names; docs/README.md has no blocks.
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "README.md"})]

# By page, the tests that run its python and its console blocks, and look at what they do.
RUN = {
    "README.md": ("test_docs_snippets", "test_the_readme"),
    "after.md": ("test_doc_apps", "test_the_example_of_after"),
    "connections.md": ("test_django", "test_the_examples_of_the_page"),
    "cron.md": ("test_docs_examples", "test_cron"),
    "handlers.md": ("test_doc_apps", "test_the_example_of_handlers"),
    "limits.md": ("test_docs_examples", "test_limits"),
    "logging.md": ("test_logging", "test_the_examples_of_the_page"),
    "modules.md": ("test_docs_snippets", "test_modules"),
    "payloads.md": ("test_docs_snippets", "test_payloads"),
    "processes.md": ("test_docs_snippets", "test_pages_that_only_declare"),
    "results.md": ("test_docs_examples", "test_results"),
    "schema.md": ("test_docs_examples", "test_schema"),
    "testing.md": ("test_docs_examples", "test_testing"),
    "transactions.md": ("test_doc_apps", "test_the_example_of_transactions"),
    "unique.md": ("test_docs_examples", "test_unique"),
    "upgrades.md": (
        "test_migrations",
        "test_no_statement_waits_for_an_upgrade_that_waits",
    ),  # its lines, with other names
    "web.md": ("test_doc_apps", "test_the_example_of_a_web_application"),
}

# Words of commands in the pages that stand for something.
STANDS_FOR = {"ID": "1", "FILE": "file", "NAME": "name", "FOLDER": "folder", "VERSION": "1", "...": "", "ID...": "1"}


# Not commands: how connections are called.
CONNECTIONS = {
    "app", "bell", "claims", "cli", "client", "handler", "heartbeat", "payloads", "reclaim", "results", "settle",
}  # fmt: skip


class Block(NamedTuple):
    page: str
    number: int
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found: list[Block] = []
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found += [Block(page.name, number, *fence) for number, fence in enumerate(fences)]
    return [block for block in found if not languages or block.language in languages]


def named(block: Block) -> str:
    return f"{block.page}-{block.number}"


def test_each_block_is_seen_to() -> None:
    """No block is forgotten. `text` is a drawing, or what a program prints."""
    for block in blocks():
        assert block.language in ("python", "sql", "sh", "console", "text"), named(block)
        if block.language in ("python", "console"):
            file, test = RUN[block.page]
            [path] = (ROOT / "tests").rglob(f"{file}.py")
            assert f"def {test}" in path.read_text(encoding="utf-8"), named(block)


@pytest.mark.parametrize("block", [it for it in blocks("sql") if "PREPARE TRANSACTION" not in it.text], ids=named)
async def test_sql(block: Block, db: Any) -> None:
    """Each statement runs, in the order of the page, and is rolled back. That of two-phase commit can't be in another
    transaction: test_two_phase runs it."""
    transaction = db.transaction()
    await transaction.start()
    try:
        await db.execute(block.text)
    finally:
        await transaction.rollback()


def commands() -> Iterator[tuple[str, str]]:
    """All lines of shell, and all commands of notifyq in the midst of a sentence."""
    for block in blocks("sh", "console"):
        text = block.text.replace("\\\n", " ")
        lines = text.splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from ((named(block), line) for line in lines if line.strip())
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", prose):
            if re.match(r"(\w+=\S+ )*notifyq ", code) and code.split()[1] not in CONNECTIONS:
                yield page.name, " ".join(code.split())


def parse(command: click.Command, args: list[str], parent: click.Context | None = None) -> None:
    """As click does it before a command is run: names, flags and values. Raises ClickException."""
    with command.make_context(command.name, args, parent=parent) as ctx:
        rest = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        if isinstance(command, click.Group) and rest:
            _, below, rest = command.resolve_command(ctx, rest)
            assert below is not None
            parse(below, rest, ctx)


@pytest.mark.parametrize(("where", "line"), sorted(set(commands())))
def test_commands(where: str, line: str) -> None:
    """Those of notifyq are parsed, those of make have a target; of others, their names are known."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if words[:1] == ["notifyq"]:
        given = [word for word in (STANDS_FOR.get(word, word) for word in words[1:]) if word]
        if given[-1:] == ["--dsn"]:
            given.append("postgresql://h/d")
        try:
            parse(cli, given)
        except (click.MissingParameter, click.exceptions.Exit):
            pass  # in a sentence, a command may stand without what it is about; and --help ends by itself
        except click.BadOptionUsage as error:
            if "requires an argument" not in error.format_message():
                raise
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert not words or words[0] in ("pip", "export", "python", "cat", "uvicorn", "psql", "pg_dump", "pg_restore")


def execute(block: Block, space: dict[str, Any]) -> Any:
    """A block may await; then what it returns is awaited."""
    code = compile(block.text, named(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    run = types.FunctionType(code, space)
    return run() if inspect.iscoroutinefunction(run) else _nothing(run)


async def _nothing(run: Any) -> None:
    run()


def program(words: str, folder: Path, dsn: str) -> str:
    """What it prints."""
    name, *args = shlex.split(words)
    argv = [sys.executable, *(["-m", "notifyq"] if name == "notifyq" else []), *args]
    where: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "NOTIFYQ_DSN": dsn}}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **where)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


async def test_the_readme(tmp_path: Path, dsn: str, db: Any) -> None:
    """The first task, by Python and by SQL; then what its other parts show, with what they take for granted."""
    found = [block for block in blocks("python", "sql") if block.page == "README.md"]
    mails, insert, *others = found
    assert 'SendVerificationEmail(notifyq.Task, tag="SEND_VERIFICATION_EMAIL")' in mails.text
    (tmp_path / "mails.py").write_text(mails.text)
    program("python mails.py", tmp_path, dsn)
    await db.execute(insert.text)
    assert program("notifyq worker mails:app --drain", tmp_path, dsn) == "sending k to a@b.c\n" * 2
    [own] = [block for block in others if "signals=True" in block.text]
    others.remove(own)
    (tmp_path / "own.py").write_text(own.text)
    program("python mails.py", tmp_path, dsn)
    environ = {**os.environ, "NOTIFYQ_DSN": dsn, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "own.py"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert await anyio.to_thread.run_sync(running.stdout.readline) == b"sending k to a@b.c\n"
        running.terminate()
        assert await anyio.to_thread.run_sync(running.wait) == 0

    app = notifyq.App()

    async def no() -> bool:
        return False

    class Mine(notifyq.Task):
        pass

    @app.handler
    async def mine(task: Mine) -> None: ...

    connection: Any = await asyncpg.connect(dsn)
    space: dict[str, Any] = {
        "__name__": "readme", "notifyq": notifyq, "app": app, "task": Mine(), "tasks": [Mine(), Mine()],
        "connection": connection, "busy": no, "refused": no,
    }  # fmt: skip
    async with app.connect(dsn):
        for block in others:
            await execute(block, space)
        ref = await app.enqueue(space["Charge"]())
        await app.run_worker(queues=["default", "mail"], drain=True)
        assert await ref.result() == "receipt 17"
    await connection.close()
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks WHERE type = 'Mine'") == 5


FILE = re.compile(r"`([\w/]+\.py)`[^\n`]*:\n\n```python\n(.*?)```", re.DOTALL)


def test_modules(tmp_path: Path, dsn: str) -> None:
    """Its files, and what its commands print; the worker of a module that all import knows no handlers."""
    page = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    for name, text in FILE.findall(page):
        (tmp_path / name).write_text(text)
    [shown] = [block for block in blocks("console") if block.page == "modules.md"]
    for part in re.split(r"^\$ ", shown.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        assert program(command, tmp_path, dsn) == output
    with pytest.raises(AssertionError, match="has no handlers"):
        program("notifyq worker shop.app:app --drain", tmp_path, dsn)


def test_payloads(tmp_path: Path, dsn: str) -> None:
    prints_what_it_shows((ROOT / "docs" / "payloads.md").read_text(encoding="utf-8"), tmp_path, dsn)


def test_the_index_has_every_page() -> None:
    """And each link of a page leads to a file that is there."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} - {"README.md"} <= set(re.findall(r"\]\((\w+\.md)\)", index))
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["processes.md", "results.md"])
async def test_pages_that_only_declare(page: str) -> None:
    """Handlers that are shown, and registered as they stand. The programs on these pages have tests of their own."""

    class Resize(notifyq.Task):
        paths: list[str]

    space: dict[str, Any] = {"__name__": "page", "notifyq": notifyq, "Resize": Resize}
    with redirect_stdout(StringIO()):
        for block in (block for block in blocks("python") if block.page == page):
            if "asyncio.run(" in block.text:
                continue  # a program, which its own test runs
            space["app"] = notifyq.App()
            await execute(block, space)
    assert space["app"].registry.types
