"""The way from an older schema to this one, while workers work and producers enqueue: migrations/N.sql.

Such a file leads from version N - 1 to N, in steps, each under a comment that says how it is run:

    -- step                       a transaction
    -- step: locks task           a transaction, which locks these tables against others, for milliseconds
    -- step: concurrently         one statement, outside of a transaction, beside all others, for as long as it takes
    -- step: with the functions   in the last transaction of all, see below

A table that is locked for milliseconds must be waited for, and whoever comes later queues up behind the one who waits.
So a step waits for a tenth of a second, then lets the queue go, and tries again, for as long as it takes: somebody's
transaction may be open for an hour. Indexes are made CONCURRENTLY.

Files have only what schema.sql can't say: what becomes of tables and indexes that are there. Functions, triggers and
views are schema.sql's own, all replaced in the last transaction, together with the row of schema_version. So until that
commits the schema is of the old version, with columns and indexes that nobody knows of yet; and an upgrade that was
interrupted is run again from its beginning.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from .connection import SQL

if TYPE_CHECKING:
    from .connection import Connection

LOCK_MS = 100  # and so long an enqueue waits for a step that waits
PAUSE_SECONDS = 0.5  # for the queue behind to go on, half to one and a half times that
LONG_SECONDS = 7 * 86400.0  # asyncpg wants a limit

MARKER = re.compile(r"^-- step(?:: (locks [a-z_ ]+|concurrently|with the functions))?$\n", re.MULTILINE)
COMMENT = re.compile(r"^COMMENT ON (?!(?:TABLE|COLUMN) notifyq\.bell\b).*?;$", re.MULTILINE | re.DOTALL)
REPLACED = re.compile(
    r"^CREATE (?:FUNCTION .*?^END(?: \$\$)?;|(?:TRIGGER|VIEW) .*?;)$",
    re.MULTILINE | re.DOTALL,
)

HEAD = """\
-- An upgrade of the schema notifyq, beside running workers and producers; to be run as its owner. It ends at a table
-- that somebody else's transaction has locked: then run it again, from its beginning, until it comes to its end.
\\set ON_ERROR_STOP on
SET search_path = pg_catalog;
SET statement_timeout = 0;"""


class Step(NamedTuple):
    """`locks` are the tables that it locks; None: it is run outside of a transaction."""

    locks: list[str] | None
    sql: str


def steps(version: int, schema_sql: str) -> list[Step]:
    """All that is missing in a schema of this version."""
    found: list[Step] = []
    last: list[str] = []
    for file in _files(version):
        # What stands before the first marker is a comment.
        kinds_and_texts = iter(MARKER.split(file.read_text(encoding="utf-8"))[1:])
        for kind, text in zip(kinds_and_texts, kinds_and_texts, strict=True):
            sql = text.strip()
            if kind == "with the functions":
                last.append(sql)
            else:
                found.append(Step(None if kind == "concurrently" else (kind or "").split()[1:], sql))
    return [*found, Step(["all_tasks", "task"], "\n\n".join([*last, *replaced(schema_sql)]))]


def replaced(schema_sql: str) -> list[str]:
    """schema.sql's functions and views, then its comments, then its triggers, which lock the table; each to replace the
    one that is. Not the bell's comments, which wait for sleeping workers: they are a step of their own."""
    statements = [text.replace("CREATE", "CREATE OR REPLACE", 1) for text in REPLACED.findall(schema_sql)]
    rights = schema_sql[schema_sql.index("\nREVOKE ALL ON ALL FUNCTIONS") :].strip()
    triggers = [text for text in statements if text.startswith("CREATE OR REPLACE TRIGGER")]
    return [
        *(text for text in statements if text not in triggers),
        *COMMENT.findall(schema_sql),
        *triggers,
        rights,
    ]


def script(version: int, schema_sql: str) -> str:
    """The same, to be run by hand with psql: it stops where a table can't be had, and is then run again."""
    parts = [HEAD]
    for step in steps(version, schema_sql):
        if step.locks is None:
            parts.append(f"SET lock_timeout = 0;\n{step.sql}")
        else:
            parts.append(f"SET lock_timeout = {LOCK_MS};\nBEGIN;\n{step.sql}\nCOMMIT;")
    return "\n\n".join(parts) + "\n"


def _files(version: int) -> list[Path]:
    numbered = {int(path.stem): path for path in (Path(__file__).parent / "migrations").glob("*.sql")}
    return [numbered[number] for number in sorted(numbered) if number > version]


async def run(conn: Connection, version: int, schema_sql: str, say: Callable[[str], None]) -> None:
    """Run them. The connection is the server's own, and nobody else upgrades: schema.py sees to both.

    say  gets a line for what may take its time
    """
    # What is made belongs to whom the rest belongs to.
    await conn.execute(
        "SELECT pg_catalog.set_config('role', owner, false)"
        " FROM pg_catalog.pg_namespace CROSS JOIN LATERAL pg_catalog.pg_get_userbyid(nspowner) AS owner"
        " WHERE nspname = 'notifyq' AND owner <> current_user;"
        " SET search_path = pg_catalog; SET statement_timeout = 0; SET lock_timeout = 0"
    )
    try:
        for step in steps(version, schema_sql):
            if step.locks is None:
                statement = next(line for line in step.sql.splitlines() if not line.startswith("--"))
                say(f"{statement} ...: waits for the transactions that are open now")
                await conn.execute(step.sql, timeout=LONG_SECONDS)
            else:
                await _patiently(conn, step.locks, step.sql, say)
    finally:
        if not conn.is_closed():
            await conn.execute("RESET role; RESET search_path; RESET statement_timeout; RESET lock_timeout")


async def _patiently(conn: Connection, locks: list[str], sql: str, say: Callable[[str], None]) -> None:
    told = False
    while True:
        try:
            async with conn.transaction(isolation="read_committed"):
                await conn.execute("SELECT set_config('lock_timeout', $1::text, true)", str(LOCK_MS))
                await conn.execute(sql, timeout=LONG_SECONDS)
            return
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if not told:
                told = True
                tables = " or ".join(f"notifyq.{name}" for name in locks)
                holder: str | None = await conn.fetchval(SQL["find_lock_holder"], locks)
                say(f"waiting for {tables}{f', which is in use by {holder}' if holder else ''}")
        await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_SECONDS)
