"""The demo: its parts by themselves, its checks with something wrong each, and a short run of the whole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiosmtplib
import anyio
import asyncpg
import httpx
import msgspec
import pytest

from notifyq.demo import app as demo_app
from notifyq.demo import check, main, web
from notifyq.demo.check import Facts, Row, Stopped
from notifyq.demo.screen import notifyq_command
from notifyq.demo.smtp import MailServer
from notifyq.demo.stage import exported
from notifyq.demo.story import USERS
from notifyq.demo.traffic import MALFORMED, Plan
from notifyq.errors import ConfigError

from ..helpers.machine import limit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_the_command_that_comes_next_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after `make demo` alone, which puts no `notifyq` on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run(f"{notifyq_command()} dev --help", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Ctrl-C" in done.stdout
    (tmp_path / "notifyq").touch(mode=0o755)
    assert notifyq_command() == "notifyq"


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def mail(id: int, key: str, attempts: int = 1, *, wait: float = 0.002, user: str | None = None) -> Row:
    return Row(
        id=id,
        type="SEND_VERIFICATION_EMAIL",
        state="done",
        attempts=attempts,
        created_at=at(id),
        run_at=at(id),
        processing_at=at(id + wait),
        key=key,
        user=user,
    )


@pytest.fixture
def facts() -> Facts:
    """A run in which all is as it should be: a mail, and one that was refused once; a malformed row; a task that was
    scheduled; and a mail that had been sent already when its worker was killed."""
    dead = mail(3, "none")._replace(type="EXPIRE_KEY", state="dead", key=None, error="Expected str")
    scheduled = mail(4, "none")._replace(type="EXPIRE_KEY", key=None, run_at=at(8), processing_at=at(8.001))
    made = Facts()
    made.enqueued.update(SEND_VERIFICATION_EMAIL=3, EXPIRE_KEY=2)
    made.received.update({"a": 1, "b": 1, "killed": 2})
    made.refused.update({"b": 1})
    made.malformed, made.scheduled = {3}, {4}
    made.signed_up, made.users = {"u"}, {"u"}
    made.killed = Stopped("worker 1", at(5.5), held={5: 1}, exit_code=-9)
    made.drained = Stopped("worker 2", at(30), held={}, exit_code=0)
    made.rows = [mail(1, "a", user="u"), mail(2, "b", 2), dead, scheduled, mail(5, "killed", 2, wait=2.5)]
    return made


def failed(facts: Facts) -> set[object]:
    """The checks that fail."""
    return {one for one in check.CHECKS if one(facts).wrong}


def test_all_checks_hold_when_all_is_well(facts: Facts) -> None:
    assert len(check.CHECKS) == 10
    assert failed(facts) == set()
    assert facts.totals() == [("EXPIRE_KEY", 2, 1, 1, 0), ("SEND_VERIFICATION_EMAIL", 3, 3, 0, 2)]


def row(index: int, **fields: Any) -> Callable[[Facts], None]:
    """Change a row."""

    def change(facts: Facts) -> None:
        facts.rows[index] = facts.rows[index]._replace(**fields)

    return change


def drained(code: int | None) -> Callable[[Facts], None]:
    """The worker that got SIGTERM ends with this exit code; None: it doesn't end."""
    return lambda facts: setattr(facts, "drained", Stopped("worker 2", at(30), held={}, exit_code=code))


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        pytest.param(lambda facts: facts.enqueued.update(EXPIRE_KEY=1), check.every_task_ended, id="lost task"),
        pytest.param(row(3, state="ready"), check.every_task_ended, id="task that has not ended"),
        pytest.param(row(2, state="done"), check.only_malformed_rows_are_dead, id="malformed row that is done"),
        pytest.param(row(3, state="dead", error="no"), check.only_malformed_rows_are_dead, id="good task that is dead"),
        pytest.param(row(2, error=None), check.only_malformed_rows_are_dead, id="death without a reason"),
        pytest.param(row(2, attempts=2), check.only_malformed_rows_are_dead, id="malformed row that was tried again"),
        pytest.param(row(0, user=None), check.users_commit_with_their_tasks, id="user without a task"),
        pytest.param(row(1, user="other"), check.users_commit_with_their_tasks, id="task of a user rolled back"),
        pytest.param(lambda facts: facts.users.add("v"), check.users_commit_with_their_tasks, id="user not signed up"),
        pytest.param(lambda facts: facts.received.pop("a"), check.each_mail_has_its_task, id="lost mail"),
        pytest.param(lambda facts: facts.received.update("z"), check.each_mail_has_its_task, id="mail without a task"),
        pytest.param(lambda facts: facts.received.update("a"), check.only_the_kill_doubles_mails, id="mail sent twice"),
        pytest.param(
            lambda facts: facts.received.update(killed=1),
            check.only_the_kill_doubles_mails,
            id="mail thrice for a kill",
        ),
        pytest.param(row(3, attempts=2), check.every_attempt_is_explained, id="attempt that nothing explains"),
        pytest.param(lambda facts: facts.refused.update("b"), check.every_attempt_is_explained, id="refusal for free"),
        pytest.param(row(0, processing_at=at(1 + 2.5)), check.tasks_start_at_once, id="slow wake-up"),
        pytest.param(row(3, processing_at=at(7.9)), check.scheduled_tasks_start_on_time, id="early task"),
        pytest.param(row(3, processing_at=at(9)), check.scheduled_tasks_start_on_time, id="late task"),
        pytest.param(row(4, processing_at=at(5.5 + 5.1)), check.killed_tasks_run_again, id="late rescue"),
        *[
            pytest.param(drained(code), check.a_stopped_worker_finishes_its_tasks, id=f"exit code {code}")
            for code in (1, -9, None)
        ],
    ],
)
def test_each_fault_fails_its_check_alone(
    facts: Facts, change: Callable[[Facts], object], fails: Callable[[Facts], check.Finding]
) -> None:
    change(facts)
    assert failed(facts) == {fails}


def test_a_failed_check_says_what_contradicts_it(facts: Facts) -> None:
    row(3, state="dead", error="RuntimeError: no")(facts)
    assert str(check.only_malformed_rows_are_dead(facts)).endswith(
        "; task 4 is dead after 1 attempts, error: RuntimeError: no"
    )
    facts.rows = [facts.rows[3]._replace(id=id) for id in range(10, 14)]
    assert str(check.only_malformed_rows_are_dead(facts)).endswith("; ...")


def test_a_task_in_line_behind_the_copy_is_not_measured(facts: Facts) -> None:
    """The line ends with the last good row of the COPY: a malformed row of its type came by itself."""
    copied = facts.rows[0]._replace(id=10, type=check.COPIED, key=None, user=None, processing_at=at(1.5))
    dead = copied._replace(id=11, state="dead", error="Expected str", processing_at=at(30))
    facts.rows[0], facts.copied_at = mail(1, "a", wait=3, user="u"), at(0.5)
    facts.rows += [copied, dead, mail(20, "c")]
    facts.malformed.add(11)
    facts.enqueued.update({check.COPIED: 2, "SEND_VERIFICATION_EMAIL": 1})
    facts.received["c"] = 1
    assert failed(facts) == set()
    assert "of 1 enqueued singly" in str(check.tasks_start_at_once(facts))


def test_a_task_that_was_lost_with_its_worker(facts: Facts) -> None:
    del facts.rows[4]
    expected = {check.every_task_ended, check.each_mail_has_its_task, check.killed_tasks_run_again}
    assert failed(facts) == expected | {check.only_the_kill_doubles_mails}


def test_an_outcome_that_was_on_its_way_when_its_worker_was_killed(facts: Facts) -> None:
    assert facts.killed
    facts.killed.held[1] = 1
    assert failed(facts) == set()
    assert "with 1 tasks" in str(check.killed_tasks_run_again(facts))


def test_no_worker_killed_and_none_drained(facts: Facts) -> None:
    facts.killed = facts.drained = None
    expected = {check.killed_tasks_run_again, check.a_stopped_worker_finishes_its_tasks}
    assert failed(facts) == expected | {check.every_attempt_is_explained, check.only_the_kill_doubles_mails}


def test_wake_ups_that_nothing_measures(facts: Facts) -> None:
    row(0, attempts=2)(facts)
    assert failed(facts) == {check.every_attempt_is_explained, check.tasks_start_at_once}


def test_percentiles() -> None:
    assert check.percentiles(float(value) for value in range(1, 101)) == (50.0, 99.0)
    assert check.percentiles([7.0]) == (7.0, 7.0)


def test_plan_adds_up() -> None:
    plan = Plan(20, 5000)
    assert plan.requests + plan.by_psql + plan.scheduled + plan.copied == 5000
    assert min(vars(Plan(5, 200)).values()) > 0


def test_each_malformed_row_is_malformed() -> None:
    for type, payload in MALFORMED:
        with pytest.raises(ConfigError, match="doesn't fit"):
            demo_app.app.registry.check(type, msgspec.json.encode(payload))


def test_processes_find_the_database_by_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """They don't by arguments, which all users of a machine can see. Variables of other programs are removed
    meanwhile."""
    for name in ("PGSERVICE", "DATABASE_URL", "NOTIFYQ_CONCURRENCY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PGSERVICE", "")
    before = dict(os.environ)
    expected = {"PGUSER": "u", "PGPASSWORD": "s:e", "PGHOST": "h", "PGPORT": "1", "PGDATABASE": "d"}
    with exported("postgresql://u:s%3Ae@h:1/d?sslmode=require", 25):
        assert os.environ.items() >= {**expected, "PGSSLMODE": "require", "DEMO_SMTP_PORT": "25"}.items()
        assert not {"PGSERVICE", "DATABASE_URL", "NOTIFYQ_CONCURRENCY"} & os.environ.keys()
    assert os.environ == before


@pytest.mark.parametrize("arguments", [(4.0, 5000), (float("nan"), 5000), (20.0, 0), (20.0, 10**9)])
def test_what_it_cannot_do_is_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        main(*arguments)


def test_missing_libraries_have_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notifyq.demo.NEEDED", ("starlette", "no_such_library"))
    with pytest.raises(ConfigError, match=r"needs no_such_library; run: pip install 'notifyq\[demo\]'"):
        main()


async def test_mail_is_counted_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused mail raises in the handler, so that notifyq tries again."""
    async with MailServer(refuse=0.0, seconds=(0, 0)).serve() as server:
        monkeypatch.setattr(demo_app, "SMTP_PORT", server.port)
        await demo_app.send("a@example.org", "k1", "subject")
        server.refuse = 1.0
        with pytest.raises(aiosmtplib.SMTPDataError, match="come back later"):
            await demo_app.send("a@example.org", "k2", "subject")
    assert (dict(server.received), dict(server.refused)) == ({"k1": 1}, {"k2": 1})


@pytest.fixture
async def http(dsn: str, db: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the web application, without a socket in between."""
    await db.execute(USERS)
    transport = httpx.ASGITransport(web.web)
    with exported(dsn, 25):
        async with web.lifespan(web.web), httpx.AsyncClient(transport=transport, base_url="http://web") as client:
            yield client


async def types(db: asyncpg.Connection[asyncpg.Record]) -> list[str]:
    return [row["type"] for row in await db.fetch("SELECT type FROM notifyq.all_tasks ORDER BY id")]


async def test_signing_up_enqueues_with_the_user(http: httpx.AsyncClient, db: Any) -> None:
    answer = await http.post("/signup", json={"email": "a@example.org"})
    assert answer.status_code == 201
    assert await types(db) == ["SEND_VERIFICATION_EMAIL"]
    assert await db.fetchval("SELECT payload #>> '{user,id}' FROM notifyq.all_tasks") == answer.json()["id"]


async def test_signing_up_twice_rolls_the_task_back(http: httpx.AsyncClient, db: Any) -> None:
    codes = [(await http.post("/signup", json={"email": "a@example.org"})).status_code for _ in range(2)]
    assert codes == [201, 409]
    assert len(await types(db)) == 1


async def test_a_forgotten_password_of_an_unknown_user(http: httpx.AsyncClient, db: Any) -> None:
    await http.post("/signup", json={"email": "a@example.org"})
    for email in ("a@example.org", "unknown@example.org"):
        assert (await http.post("/forgot-password", json={"email": email})).status_code == 202
    assert await types(db) == ["SEND_VERIFICATION_EMAIL", "SEND_FORGOT_PASSWORD_EMAIL"]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"email": "nobody"}', b"[]"])
async def test_a_bad_form(http: httpx.AsyncClient, db: Any, body: bytes) -> None:
    assert (await http.post("/signup", content=body)).status_code == 422
    assert await types(db) == []


class Demo:
    """`notifyq demo` in a process of its own."""

    def __init__(self, dsn: str) -> None:
        argv = [sys.executable, "-m", "notifyq", "demo", "--dsn", dsn, "--seconds", "5", "--tasks", "300"]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    async def output(self) -> str:
        """All that it printed, once the demo has ended."""
        output, _ = await anyio.to_thread.run_sync(lambda: self.process.communicate(timeout=limit()))
        return output

    def workers(self) -> list[int]:
        """The processes of its workers, once they work."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if found := re.search(r"worker 1 is process (\d+), worker 2 is process (\d+)", line):
                return [int(pid) for pid in found.groups()]
        raise AssertionError("".join(lines))


async def traces(db: Any) -> set[Any]:
    """What a demo could leave on a server: databases, and in the one that it was given, schemas and tasks."""
    found = "SELECT datname FROM pg_database UNION ALL SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'"
    return {*await db.fetch(found), *await db.fetch("SELECT id FROM notifyq.all_tasks")}


@pytest.fixture
async def before(db: Any) -> set[Any]:
    return await traces(db)


@pytest.fixture
def demo(dsn: str) -> Iterator[Demo]:
    running = Demo(dsn)
    yield running
    running.process.kill()
    running.process.communicate()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A zombie is dead, and stays where no process waits for orphans (a container without an init).
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


async def test_the_whole(before: set[Any], demo: Demo, db: Any) -> None:
    """All its checks hold, and it leaves nothing on a server that isn't its own."""
    output = await demo.output()
    assert demo.process.returncode == 0, output
    assert output.count("\nok  ") == 10
    assert "all 10 checks hold" in output
    assert await traces(db) == before


async def test_an_interrupt_ends_all_of_it(before: set[Any], demo: Demo, db: Any) -> None:
    workers = demo.workers()
    began = time.monotonic()
    demo.process.send_signal(signal.SIGINT)
    output = await demo.output()
    assert demo.process.returncode == 1, output
    assert "interrupted" in output
    assert time.monotonic() - began < limit(5)
    assert not any(map(alive, workers))
    assert await traces(db) == before


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
async def test_no_child_outlives_a_demo_that_is_killed(demo: Demo) -> None:
    workers = demo.workers()
    demo.process.kill()
    with anyio.fail_after(limit()):
        while any(map(alive, workers)):
            await anyio.sleep(0.01)
