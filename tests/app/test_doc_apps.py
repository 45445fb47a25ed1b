"""The example apps of docs/ run as their pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import notifyq
from notifyq.testing import drain

from ..helpers.rows import ended, state


async def test_the_example_of_handlers(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("handlers.md")
    app: notifyq.App = space["app"]
    async with app.connect(dsn):
        await app.enqueue(space["SendMail"](to="a@b.c"))
        await app.run_worker(drain=True)
    sent, timed, closed = capsys.readouterr().out.splitlines()
    assert (sent, closed) == ("sent to a@b.c", "closed")
    assert re.fullmatch(r"SendMail 1 took 0\.\d\d\d s", timed)


async def test_the_example_of_batches(dsn: str, db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("handlers.md")
    app: notifyq.App = space["app"]
    async with app.connect(dsn):
        await app.enqueue_many([space["Index"](document=n, text="x" * (n % 2)) for n in range(4)], max_attempts=1)
        await app.run_worker(drain=True)
    assert capsys.readouterr().out.splitlines()[0] == "indexing 4"
    rows = await db.fetch("SELECT coalesce(result #>> '{}', error) FROM notifyq.all_tasks ORDER BY id")
    assert [row[0] for row in rows] == ["ValueError: no text", "document 1", "ValueError: no text", "document 3"]


async def test_the_example_of_after(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("after.md")
    app: notifyq.App = space["app"]
    async with app.connect(dsn):
        await space["publish"]("Atlas")
        await drain(app)
    assert capsys.readouterr().out.splitlines() == ["Atlas: page 1, page 2, page 3", "Atlas is there, with 3 pages"]


async def test_the_example_of_transactions(dsn: str, db: Any, capsys: pytest.CaptureFixture[str]) -> None:
    space = example("transactions.md")
    app: notifyq.App = space["app"]
    await db.execute("CREATE TABLE account (name text, cents bigint CHECK (cents >= 0))")
    await db.execute("INSERT INTO account VALUES ('me', 100), ('you', 0)")
    async with app.connect(dsn):
        good = await app.enqueue(space["Transfer"](source="me", target="you", cents=70))
        bad = await app.enqueue(space["Transfer"](source="me", target="you", cents=70), max_attempts=1)
        await app.run_worker(drain=True, concurrency=1)
    assert [await state(db, ref.id) for ref in (good, bad)] == ["done", "dead"]
    assert [tuple(row) for row in await db.fetch("SELECT * FROM account ORDER BY name")] == [("me", 30), ("you", 70)]
    assert capsys.readouterr().out == "you has more\n"


async def test_the_example_of_a_web_application(dsn: str, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("NOTIFYQ_DSN", dsn)
    web = example("web.md")["web"]
    async with (
        web.router.lifespan_context(web),
        httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://test") as client,
    ):
        answer = await client.post("/signup?to=a@b.c")
        assert answer.status_code == 202
        row = await ended(db, answer.json()["task"], "done")
        assert row["result"] == b'"sent to a@b.c"'
        late = (await client.post("/signup?to=d@e.f")).json()["task"]
    assert await state(db, late) in ("ready", "done"), "stopped gracefully: nothing is left running"
    assert not await db.fetchval("SELECT count(*) FROM notifyq.worker")


def example(name: str) -> dict[str, Any]:
    """The example of a page of docs/, run."""
    text = (Path(__file__).parents[2] / "docs" / name).read_text()
    space: dict[str, Any] = {"__name__": name}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, name, "exec", dont_inherit=True), space)
    return space
