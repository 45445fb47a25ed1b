"""A version of the schema after this one, made up: upgrades are tested with it, whether or not there is a real one.

It has labels: a column of tasks, a table, a parameter of notifyq.enqueue.

    install            gives a database the schema of this notifyq
    next_version.sql   leads from there to the made-up version, with each kind of step
    schema_sql         what an installation of the made-up version is: schema.sql, with CHANGES that do the same
    use                makes the made-up version this process's own. Processes that a test starts don't know of it: they
                       are workers of the version before

A change of schema.sql may leave one of CHANGES nothing to change: an assertion names it then.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from notifyq.database import schema, upgrade
from notifyq.database.schema import SCHEMA_VERSION

FROZEN = (
    Path(__file__).parents[1] / "schemas"
)  # N.sql is schema.sql as version N had it; none is needed for this version
EARLIER = [*sorted(int(path.stem) for path in FROZEN.glob("*.sql")), SCHEMA_VERSION]  # than the made-up one
NEXT = SCHEMA_VERSION + 1

MIGRATION = Path(__file__).with_suffix(".sql")
PRESENT = schema.schema_sql()

# What `next_version.sql` does to a schema that is there: a pattern of schema.sql, and what takes its place.
CHANGES = {
    r"\(version, serves\) VALUES \(\d+, \d+\);": f"(version, serves) VALUES ({NEXT}, {SCHEMA_VERSION});",
    # A column of two tables, with an index each; a third index takes the place of an older one.
    r"(?<=\n    crashes_alone smallint)(?=[ \n])": ",\n    label         text",
    r"(?<=    options       jsonb)(?=\n\) WITH \(autovacuum_vacuum_insert_scale_factor)": ",\n    label         text",
    r"CREATE INDEX finished_old .*;": (
        "CREATE INDEX finished_kept ON notifyq.finished (state, processed_at) WHERE state <> 'dead';\n"
        "CREATE INDEX finished_label ON notifyq.finished (label) WHERE label IS NOT NULL;\n"
        "CREATE INDEX task_label ON notifyq.task (label) WHERE label IS NOT NULL;\n"
        "COMMENT ON COLUMN notifyq.task.label IS 'For people.';"
    ),
    # A table; another default.
    r"(?=\nCREATE TABLE notifyq\.bell)": (
        "\nCREATE TABLE notifyq.label (name text NOT NULL PRIMARY KEY, uses bigint NOT NULL DEFAULT 0);\n"
        "COMMENT ON TABLE notifyq.label IS 'All labels.';\n"
    ),
    r"(?<=\n    concurrency   integer     NOT NULL)": " DEFAULT 1",
    # A function with one more parameter, and a view with one more column.
    r"(?<=priority integer DEFAULT 0, max_attempts integer DEFAULT NULL, options jsonb DEFAULT NULL)": (
        ", label text DEFAULT NULL"
    ),
    r"(INSERT INTO notifyq\.task \(.*, options)(\)\n    VALUES \(\$1, .*, \$7)(?=\))": r"\1, label\2, $8",
    r"(?<=notifyq\.enqueue\(text, jsonb, text, timestamptz, integer, integer, jsonb)(?=\))": ", text",
    r"(?<=AS waits_for, t\.progress, t\.note, t\.options)(?=\n)": ", t.label",
    r"(?<=result, worker, errors, NULL, NULL, NULL, options)(?=\n)": ", label",
    # The bell's comments are locked out by sleeping workers.
    r"(?<=COMMENT ON COLUMN notifyq\.bell\.nothing IS ').*?(?=';)": "Nothing is ever stored.",
    # Rights.
    r"(?<=GRANT INSERT \(type, payload, queue, priority, run_at, max_attempts, options)(?=\))": ", label",
    r"(?<=GRANT SELECT ON notifyq\.)(?=all_tasks, notifyq\.all_queues,)": "label, notifyq.",
}  # fmt: skip

# Of an upgraded schema alone, and why.
LEFT = {
    "index finished_old": "workers of the version before read it; the version after drops it",
}


def schema_sql() -> str:
    text = PRESENT
    for pattern, change in CHANGES.items():
        text, count = re.subn(pattern, change, text)
        assert count == 1, f"schema.sql has {count} times what the made-up version changes: {pattern}"
    return text


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up version is this process's own until the test ends."""
    real = upgrade.migrations()
    monkeypatch.setattr(upgrade, "migrations", lambda: {**real, NEXT: MIGRATION})
    monkeypatch.setattr(schema, "schema_sql", schema_sql)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", NEXT)


def installation(version: int) -> str:
    """schema.sql as that version has it."""
    return PRESENT if version == SCHEMA_VERSION else (FROZEN / f"{version}.sql").read_text(encoding="utf-8")


async def install(conn: Any, version: int = SCHEMA_VERSION) -> None:
    await conn.execute(installation(version))
