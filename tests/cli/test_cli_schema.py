"""`notifyq schema`: the JSON Schema of an app's tasks, and what is queued against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..helpers.command import Run
from .test_cli import NOWHERE


async def test_schema(run: Run, folder: Path) -> None:
    """It is printed whole to a pipe, and is compatible with itself."""
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
    assert "--check old.json isn't an output of `notifyq schema`" in said.err


async def test_schema_queued(run: Run, dsn: str, db: Any, folder: Path) -> None:
    """Each kind of trouble is a line. Finished tasks don't count."""
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
