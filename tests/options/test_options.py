"""Column options of notifyq.task: what is refused, and what is taken from it. test_unique, test_limits, test_order and
test_after have what each option does."""

from __future__ import annotations

import json
import re
from typing import Any

import asyncpg
import pytest

import notifyq
from notifyq.database import schema
from notifyq.options import OPTIONS
from notifyq.unique import Unique

from ..helpers import verbs
from ..helpers.running import working
from ..helpers.waiting import Seen


class Known(notifyq.Task):
    pass


# Wrong values of each option, as JSON.
NO_STRING = (
    "is not a string of 1 to 200 characters",
    ['""', f'"{"x" * 201}"', f'"{"ä" * 201}"', "7", "true", '["k"]', "{}"],
)
NO_COUNT = (
    "is not a whole number from 1 to 2147483647",
    ["0", "-1", "2.5", "0.99", "2147483648", "1e400", '"3"', "true", "[3]", "{}"],
)
NO_SECONDS = (
    "is not a number of seconds, above 0 and up to 1e9",
    ["0", "-1", "1e-400", "1000000001", "1e9000", '"60"', '"NaN"', '"Infinity"', '"1 hour"', "true", "[60]", "{}"],
)
WRONG: dict[str, list[tuple[str, list[str]]]] = {
    "unique_key": [NO_STRING],
    "order_key": [NO_STRING],
    "limit_key": [NO_STRING],
    "limit_running": [NO_COUNT],
    "limit_rate": [NO_COUNT],
    "limit_seconds": [NO_SECONDS],
    "unique_for": [NO_SECONDS],
    "expires": [NO_SECONDS],
    "unique_states": [
        (
            "is not an array of scheduled, ready, running, done, dead, cancelled",
            [
                *("[]", "{}", '{"ready": true}', '"ready"', '"{ready}"', "1", "true"),
                *('["redy"]', '["ready", "READY"]', '["ready", null]', '["ready", 1]', '[["ready"]]'),
            ],
        )
    ],
    "on_conflict": [
        ("is not keep, replace or move", ['"drop"', '""', '"KEEP"', "1", "false", '["keep"]', '{"keep": 1}'])
    ],
    "on_dead": [("is not cancel or run", ['"keep"', '""', "1", "true", '["run"]', "{}"])],
    "after": [
        ("is not an array of ids", ["7", '"7"', '"{7}"', "true", "{}", '{"7": 7}']),
        ("has more than 10000 ids", [str([1] * 10001)]),
        (
            "contains something other than an id",
            ['["7"]', "[0]", "[-1]", "[1.5]", "[9223372036854775808]", "[null]", "[true]", "[[7]]", "[{}]"],
        ),
    ],
}
OTHERWISE = {"unique": "unique_key", "limit": "limit_running", "rate": "limit_rate, limit_seconds"}
COLUMNS = ("queue", "delay", "run_at", "priority", "max_attempts")
NONE_OF_THEM = "is none of the options, which are " + ", ".join(
    OTHERWISE.get(name, name) for name in OPTIONS if name not in COLUMNS
)
ASK_FOR_KEY = "unique_states, unique_for and on_conflict need a unique_key"
ASK_FOR_LONG = "unique_states with done, dead or cancelled needs a unique_for"
PAIR = "limit_rate and limit_seconds go together: at most limit_rate starts in any limit_seconds"
WITH_LIMIT = "limit_key goes with limit_running, or with limit_rate and limit_seconds, or with all three"
TOO_LATE = "expires needs a run_at before year 294244"  # test_expires.py has it
FUTURE = "after has an id that no task has yet"
REFUSED: list[tuple[str, str]] = [
    *(
        (text, "options is not an object")
        for text in ("[]", '["limit_key"]', '[{"order_key": "k"}]', '"k"', '"{}"', "7", "true")
    ),
    *(
        (f'{{"{name}": {value}}}', f"{name} {message}")
        for name, cases in WRONG.items()
        for message, values in cases
        for value in values
    ),
    *(
        (f'{{"{name}": 1}}', f"{name} {NONE_OF_THEM}")
        for name in ("uniqe_key", "Unique_key", "unique_key ", "", "Limit")
    ),
    ('{"unique": "k"}', "unique is written unique_key in SQL"),
    ('{"limit_key": "k", "limit": 3}', "limit is written limit_running in SQL"),
    ('{"limit_key": "k", "rate": "3/s"}', "rate is written limit_rate and limit_seconds in SQL"),
    ('{"payload": {"x": null}}', f"payload {NONE_OF_THEM}"),
    # The first by its name, whatever the order in which they were written.
    ('{"unique_key": 7, "on_dead": 7, "after": 7}', "after is not an array of ids"),
    # What is right by itself, and not without another.
    ('{"unique_for": 60}', ASK_FOR_KEY),
    ('{"unique_states": ["ready"]}', ASK_FOR_KEY),
    ('{"on_conflict": "move"}', ASK_FOR_KEY),
    ('{"on_conflict": "keep", "unique_key": null}', ASK_FOR_KEY),
    ('{"unique_key": "k", "unique_states": ["ready", "done"]}', ASK_FOR_LONG),
    ('{"unique_key": "k", "unique_states": ["dead"], "unique_for": null}', ASK_FOR_LONG),
    ('{"unique_key": "k", "unique_states": ["cancelled"]}', ASK_FOR_LONG),
    ('{"limit_key": "k", "limit_rate": 1}', PAIR),
    ('{"limit_key": "k", "limit_running": 1, "limit_seconds": 1}', PAIR),
    ('{"limit_key": "k"}', WITH_LIMIT),
    ('{"limit_key": "k", "limit_running": null}', WITH_LIMIT),
    ('{"limit_running": 1}', WITH_LIMIT),
    ('{"limit_rate": 1, "limit_seconds": 1}', WITH_LIMIT),
    ('{"on_dead": "run"}', "on_dead needs after"),
    ('{"on_dead": "cancel", "after": null}', "on_dead needs after"),
    ('{"after": [1000000]}', FUTURE),
    ('{"after": [1, 9223372036854775807]}', FUTURE),
]
INSERT = "INSERT INTO notifyq.task (type, options) VALUES ('Known', $1::text::jsonb) RETURNING id"


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda text: text[:40])
async def test_what_sql_refuses(db: Any, options: str, message: str) -> None:
    """Whichever way it comes, with an error that says which option it is, and nothing of it stays."""

    async def by_copy(text: str) -> None:
        records = [("Known", b"{}"), ("Known", text.encode())]
        await db.copy_records_to_table("task", schema_name="notifyq", columns=["type", "options"], records=records)

    for send in (
        lambda text: db.fetchval(INSERT, text),
        lambda text: db.fetchval("SELECT notifyq.enqueue('Known', options => $1::text::jsonb)", text),
        by_copy,
    ):
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await send(options)
        assert (caught.value.sqlstate, str(caught.value)) == ("23514", f"notifyq.task: {message}")
    assert [await db.fetchval(f"SELECT count(*) FROM notifyq.{table}") for table in ("task", "unique_key")] == [0, 0]


def test_the_table_of_options_has_each_of_them() -> None:
    """The keywords that type checkers know, in the order of the flags; the JSON that schema.sql knows."""
    assert list(OPTIONS) == list(notifyq.EnqueueOptions.__annotations__)
    written = {"limit_seconds", *(option.json for option in OPTIONS.values() if option.json)}
    written |= Unique("k", None, None, "keep").options().keys()
    assert written == WRONG.keys()


def test_each_message_has_a_case() -> None:
    """Those of notifyq.apply_options(), as schema.sql has them."""
    _, _, text = schema.schema_sql().partition("CREATE FUNCTION notifyq.apply_options()")
    text = re.sub(r"'\s*\n\s*'", "", text.partition("CREATE TRIGGER apply_options")[0])
    said = re.findall(r"(?:THEN|ELSE)\s+'([^']* [^']*)'", text)
    assert len(said) == 21
    assert [words for words in said if not any(message.endswith(words) for _, message in REFUSED)] == [TOO_LATE]
    named = re.findall(r"'(\w+)'", " ".join(re.findall(r"WHEN key (?:=|IN) (.*) THEN", text)))
    assert sorted(named) == sorted(WRONG)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("null", None),
        ("{}", None),
        ('{"order_key": null, "after": null, "unique_key": null, "anything": null}', None),
        ('{"limit_key": null, "limit_running": null, "order_key": "o"}', {"order_key": "o"}),
        ('{"unique_key": "k", "unique_for": null, "unique_states": null, "on_conflict": null}', {"unique_key": "k"}),
        ('{"unique_key": "k", "on_dead": null}', {"unique_key": "k"}),
        (json.dumps({"order_key": "\U0001f600" * 200}), {"order_key": "\U0001f600" * 200}),
        ('{"after": []}', {"after": []}),
        ('{"after": [], "on_dead": "run"}', {"after": [], "on_dead": "run"}),
        (
            '{"limit_key": "l", "limit_running": 2147483647, "limit_rate": 2147483647, "limit_seconds": 1e9}',
            {"limit_key": "l", "limit_running": 2147483647, "limit_rate": 2147483647, "limit_seconds": 1e9},
        ),
        (
            '{"limit_key": "l", "limit_rate": 1, "limit_seconds": 1e-300}',
            {"limit_key": "l", "limit_rate": 1, "limit_seconds": 1e-300},
        ),
    ],
    ids=lambda text: str(text)[:40],
)
async def test_what_sql_takes(db: Any, options: str, kept: Any) -> None:
    """JSON's null and {} are nothing, and a null value isn't given; what is taken from options says the same."""
    row = await db.fetchrow(f"{INSERT}, options::text, order_key, limit_key, after, watched", options)
    assert (None if row["options"] is None else json.loads(row["options"])) == kept
    keys = {name: (kept or {}).get(name) for name in ("order_key", "limit_key")}
    assert {name: row[name] for name in keys} == keys
    assert row["after"] is None
    assert row["watched"] is any(keys.values())


async def test_ten_thousand_to_wait_for(db: Any) -> None:
    ids = await verbs.insert(db, 10_000)
    id = await db.fetchval(INSERT, json.dumps({"after": ids}))
    assert await db.fetchval("SELECT after FROM notifyq.task WHERE id = $1", id) == ids


async def test_numbers_as_some_clients_write_them(app: notifyq.App, dsn: str, db: Any) -> None:
    """2.0 is a whole number: to the INSERT, to who admits and frees by it, and to who reads results."""
    ran = Seen()

    @app.handler
    async def known(task: Known, ctx: notifyq.Context) -> int:
        ran.add((ctx.id, await ctx.results()))
        return ctx.id

    first = await app.enqueue(Known())
    text = '{"after": [%d.0], "limit_key": "l", "limit_running": 1.0, "limit_rate": 1e2, "limit_seconds": 60.50}'
    ids = [await db.fetchval(INSERT, text % first.id) for _ in range(5)]
    async with working(app, dsn, concurrency=3):
        await ran.reach(6)
    assert sorted(ran.items) == [(first.id, []), *((id, [first.id]) for id in ids)]
