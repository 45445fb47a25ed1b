"""The command line. Each command is in the module of the thing that it is about. All commands share the first three.

    options   flags and their environment variables, types of values, "did you mean"
    output    tables for people, plain text for pipes
    session   a connection, and the translation of its errors
    database  migrate, dev, demo, stats: the database as a whole
    enqueue   enqueue: one task, with a flag for each option
    tasks     tasks, retry, cancel, prune
      served  why a ready task isn't started
    queues    queues, queue pause, resume, limit
    crons     cron, cron pause, resume, run, remove
    show      show: one task, and its changes
    schema    schema: the JSON Schema of payloads, and whether a change breaks queued tasks
    worker    worker: load the app, print what it serves, run it
      load    MODULE:APP, and everything that can be wrong with one
      logs    the format of log records
      supervisor  --processes: a parent process and its workers

Exit codes: 0 clean, 1 forced or failed, 2 usage, import or configuration, 3 database unreachable, 4 schema
missing or of another version (errors.py has them by class); 130 after Ctrl-C in any command but worker and dev.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

from notifyq.errors import NotifyqError

from . import crons, database, enqueue, queues, schema, show, tasks, worker
from .load import hidden_module
from .options import did_you_mean
from .output import our_version, say

COMMANDS: tuple[click.Command, ...] = (
    database.migrate, worker.worker, enqueue.enqueue, tasks.tasks, show.show, tasks.retry, tasks.cancel, tasks.prune,
    queues.queues, queues.queue, crons.cron,
    database.stats, schema.schema, database.demo, database.dev,
)  # fmt: skip


class Cli(click.Group):
    """Lists the commands in the order in which a user needs them, and suggests one for a mistyped name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            known = did_you_mean(name, self.commands) or f"; expected one of {', '.join(self.commands)}"
            raise click.UsageError(f"there is no command {name!r}{known}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Cli,
    commands=list(COMMANDS),
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(our_version(), message="notifyq %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Background tasks on PostgreSQL.

    The database is --dsn, else NOTIFYQ_DSN, else DATABASE_URL, else what libpq's PG* variables say.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, else in sys.argv, and return its exit code. Every error is a message on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = cli.main(args, prog_name="notifyq", standalone_mode=False, obj=args)
    except click.Abort:
        say("interrupted")
        return 130
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "notifyq"
        say(f"{error.format_message()}\ntry: {path} --help")
        return 2
    except click.ClickException as error:
        say(error.format_message())
        return error.exit_code
    except NotifyqError as error:
        say(str(error))
        for note in getattr(error, "__notes__", ()):  # the traceback of a failure in the user's module
            click.echo(note, err=True)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if hidden := hidden_module(error):
            say(hidden)
            return 2
        say("that is a bug in notifyq; please report it with the lines above")
        return 1
    return code if isinstance(code, int) else 0
