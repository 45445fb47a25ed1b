"""Upgrades of the schema, while workers work and producers enqueue: migrations/N.sql.

Such a file leads from version N - 1 to version N, in steps. A comment above each step says how it is run:

    -- step                       in a transaction
    -- step: locks task           in a transaction that locks these tables against others, for milliseconds
    -- step: concurrently         one statement outside a transaction, while other sessions go on, however long it takes
    -- step: with the functions   in the last transaction of all, see below

While a step waits for a table, other sessions that need the table wait behind the step. So a step waits for a tenth of
a second, then lets those sessions go on, and tries again until it succeeds: some transaction may stay open for an hour.
Indexes are made CONCURRENTLY.

The files change the tables and indexes that exist, which schema.sql can't. Functions, triggers and views are taken
from schema.sql, and all are replaced in the last transaction, together with the row of schema_version. Until that
commits, the schema has the old version, with columns and indexes that no code uses yet. An upgrade that was interrupted
is run again from its beginning.
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

LOCK_MS = 100  # how long a step waits for a lock, and so how long an enqueue may wait behind it
PAUSE_SECONDS = 0.5  # how long the sessions behind it then go on; drawn from half to one and a half times that
LONG_SECONDS = 7 * 86400.0  # in place of no timeout: asyncpg needs one

MARKER = re.compile(r"^-- step(?:: (locks [a-z_ ]+|concurrently|with the functions))?$\n", re.MULTILINE)
COMMENT = re.compile(r"^COMMENT ON (?!(?:TABLE|COLUMN) notifyq\.bell\b).*?;$", re.MULTILINE | re.DOTALL)
REPLACED = re.compile(
    r"^CREATE (?:FUNCTION .*?^END(?: \$\$)?;|(?:TRIGGER|VIEW) .*?;)$",
    re.MULTILINE | re.DOTALL,
)

HEAD = """\
-- An upgrade of the schema notifyq, beside running workers and producers; run it as the schema's owner. It stops at a
-- table that another transaction has locked: then run it again, from its beginning, until it reaches its end.
\\set ON_ERROR_STOP on
SET search_path = pg_catalog, pg_temp;
SET statement_timeout = 0;"""


class Step(NamedTuple):
    """`locks` are the tables that the step locks; None: it is run outside a transaction."""

    locks: list[str] | None
    sql: str


def steps(version: int, schema_sql: str) -> list[Step]:
    """The steps that a schema of this version needs."""
    found: list[Step] = []
    last: list[str] = []
    files = migrations()
    for number in sorted(number for number in files if number > version):
        # The text before the first marker is a comment.
        kinds_and_texts = iter(MARKER.split(files[number].read_text(encoding="utf-8"))[1:])
        for kind, text in zip(kinds_and_texts, kinds_and_texts, strict=True):
            sql = text.strip()
            if kind == "with the functions":
                last.append(sql)
            else:
                found.append(Step(None if kind == "concurrently" else (kind or "").split()[1:], sql))
    views = re.findall(r"^CREATE VIEW notifyq\.(\w+)", schema_sql, re.MULTILINE)
    return [*found, Step([*views, "task"], "\n\n".join([*last, *replaced(schema_sql)]))]


def replaced(schema_sql: str) -> list[str]:
    """schema.sql's functions and views, then its comments, then its triggers, which lock the table. Each replaces the
    one that exists. The bell's comments are left out: they wait for sleeping workers, so they need a step of their
    own."""
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
    """The same steps for psql. The script stops where it can't lock a table, and is then run again."""
    parts = [HEAD]
    for step in steps(version, schema_sql):
        if step.locks is None:
            parts.append(f"SET lock_timeout = 0;\n{step.sql}")
        else:
            parts.append(f"SET lock_timeout = {LOCK_MS};\nBEGIN;\n{step.sql}\nCOMMIT;")
    return "\n\n".join(parts) + "\n"


def migrations() -> dict[int, Path]:
    """The file that leads to each version from the one before it. Version 1 has none."""
    return {int(path.stem): path for path in (Path(__file__).parent / "migrations").glob("*.sql")}


async def run(conn: Connection, version: int, schema_sql: str, say: Callable[[str], None]) -> None:
    """Run the steps. schema.py makes sure that the connection has no pooler in between, and that no other upgrade runs.

    say  gets a line for a step that may take long
    """
    # New objects belong to the owner of the schema.
    await conn.execute(
        "SELECT pg_catalog.set_config('role', owner, false)"
        " FROM pg_catalog.pg_namespace CROSS JOIN LATERAL pg_catalog.pg_get_userbyid(nspowner) AS owner"
        " WHERE nspname = 'notifyq' AND owner <> current_user;"
        " SET search_path = pg_catalog, pg_temp; SET statement_timeout = 0; SET lock_timeout = 0"
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
    """Run a step in a transaction, and try again until it has got its locks."""
    told = False
    while True:
        try:
            async with conn.transaction(isolation="read_committed"):
                await conn.execute("SELECT pg_catalog.set_config('lock_timeout', $1, true)", str(LOCK_MS))
                await conn.execute(sql, timeout=LONG_SECONDS)
            return
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if not told:
                told = True
                tables = " or ".join(f"notifyq.{name}" for name in locks)
                holder: str | None = await conn.fetchval(SQL["find_lock_holder"], locks)
                say(f"waiting for {tables}{f', which is in use by {holder}' if holder else ''}")
        await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_SECONDS)
