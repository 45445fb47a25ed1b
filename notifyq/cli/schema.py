"""`notifyq schema`: the JSON Schema of payloads, for other languages; and whether a change breaks queued tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from notifyq.database.connection import SQL
from notifyq.errors import ConfigError
from notifyq.payloads import document
from notifyq.payloads.compatible import breaks
from notifyq.registry import Registry

from .load import load_app
from .options import dsn_option, option
from .output import say
from .session import LONG_SECONDS, session


@click.command()
@click.argument("app", metavar="MODULE:APP", envvar="NOTIFYQ_APP")
@option(
    "--check",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="compare with this earlier output; exit 1 if tasks queued under it would not decode",
)
@option("--queued", is_flag=True, help="decode every task that hasn't ended; exit 1 if one can't be")
@dsn_option
def schema(*, app: str, check: Path | None, queued: bool, dsn: str | None) -> int:
    """Print the JSON Schema of an app's payloads.

    MODULE:APP is for example myproject.tasks:app. It may come from NOTIFYQ_APP too. --dsn is for --queued.
    """
    registry = load_app(app).registry
    present = document.document(registry)
    if check is None and not queued:
        click.echo(document.render(present), nl=False)
        return 0
    findings: list[str] = []
    if check is not None:
        findings += map(str, breaks(_read(check), present))
    if queued:
        findings += asyncio.run(_undecodable(registry, dsn))
    for finding in findings:
        click.echo(finding)
    if not findings:
        say("nothing that is queued breaks")
    return 1 if findings else 0


def _read(file: Path) -> document.Schema:
    try:
        return document.parse(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"--check can't read {file}: {error.strerror}; make it: notifyq schema ... > {file}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--check {file} isn't an output of `notifyq schema`: {error}") from error


async def _undecodable(registry: Registry, dsn: str | None) -> list[str]:
    """A line for each kind of error, with the ids of tasks that have it."""
    found: dict[str, list[int]] = {}
    async with session(dsn) as conn, conn.transaction(readonly=True):
        async for id, type, payload in conn.cursor(SQL["list_unfinished"], prefetch=500, timeout=LONG_SECONDS):
            try:
                registry.check(type, payload)
            except ConfigError as error:
                found.setdefault(str(error), []).append(id)
    return [
        f"{what}: task {ids[0]}" + (f", and {len(ids) - 1} more, to {ids[-1]}" if len(ids) > 1 else "")
        for what, ids in found.items()
    ]
