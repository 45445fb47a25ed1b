"""show: everything about one task; with --follow, each of its changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import click

from notifyq.client.ref import check_same
from notifyq.database.connection import SQL
from notifyq.errors import NotifyqError
from notifyq.options import ENDED

from .options import dsn_option, option, task_id
from .output import percent, plain, say
from .served import why_not_started
from .session import session
from .tasks import NO_TASK

LOOK_SECONDS = 0.5  # between two looks of --follow


@click.command()
@click.argument("id", metavar="ID", type=task_id)
@option("--json", "as_json", is_flag=True, help="as a JSON object")
@option("--follow", is_flag=True, help="print each change until it ends; exit code 1 if it isn't done then")
@dsn_option
def show(*, id: int, as_json: bool, follow: bool, dsn: str | None) -> int:
    """Show everything about one task, with the error of each attempt."""

    async def run() -> int:
        task: dict[str, Any] = {}
        async for text, note in _changes(dsn, id, follow):
            before, task = task, json.loads(text)
            if as_json:
                click.echo(text)
            elif not before or task["state"] in ENDED:
                _print(task)
            else:
                click.echo(f"{task['state']} {plain(percent(task))}".rstrip())
            if note:
                say(f"{id} isn't started: {note}")
        return 1 if follow and task["state"] != "done" else 0

    return asyncio.run(run())


async def _changes(dsn: str | None, id: int, follow: bool) -> AsyncIterator[tuple[str, str]]:
    """Yields the task as JSON, and why it isn't started ("" if it may be), each time that one of the two has
    changed."""
    async with session(dsn) as conn:
        told = created = None
        while True:
            text: str | None = await conn.fetchval(SQL["show_task"], id)
            if text is None:
                raise NotifyqError(f"{id}: {NO_TASK}")
            task = json.loads(text)
            check_same(id, created, task["created_at"])
            created = task["created_at"]
            ready = task["state"] == "ready" and not task["waits_for"]
            note = await why_not_started(conn, task["type"], task["queue"]) if ready else ""
            if (text, note) != told:
                told = text, note
                yield told
            if not follow or task["state"] in ENDED:
                return
            await asyncio.sleep(LOOK_SECONDS)


def _print(task: dict[str, Any]) -> None:
    """Print a line for each column that has a value, and each failed attempt with its traceback."""
    hidden = {"progress": percent(task) or None, "note": None, "error": None, "errors": None}
    for name, value in {**task, **hidden}.items():
        if value is not None:
            text = json.dumps(value, ensure_ascii=False) if name in ("payload", "result", "options") else str(value)
            click.echo(f"{name.replace('_', ' ') + ':':<15}{plain(text)}")
    errors: list[dict[str, Any]] = task["errors"] or []
    for error in errors:
        if "left_out" in error:
            click.echo(plain(error.get("error")))
            continue
        attempt = error.get("attempt", "?")
        when = "before the first attempt," if attempt == 0 else f"attempt {plain(attempt)}"
        click.echo(f"{when} at {plain(error.get('at', '?'))}:")
        for line in str(error.get("traceback") or error.get("error")).splitlines():
            click.echo(f"    {plain(line)}")
