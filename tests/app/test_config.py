"""Settings and the DSN: what is taken, what is refused and with which words, and that no password is shown."""

from __future__ import annotations

import math
import re
import traceback
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import notifyq
from notifyq.config import WorkerConfig, default_threads, parse_queues, redact, resolve_dsn
from notifyq.database import connection
from notifyq.errors import ConfigError, DatabaseError
from notifyq.worker.backoff import LONGEST_WAIT_SECONDS, backoff_seconds, ceiling_seconds

# --- A worker's settings


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["default"], {"default": None}),
        (["mail:5", "default"], {"mail": 5, "default": None}),
        (("a:b:2",), {"a:b": 2}),
        (["a:b"], {"a:b": None}),
        ({"mail": 5, "odd:7": None}, {"mail": 5, "odd:7": None}),
        (iter(["x"]), {"x": None}),
    ],
)
def test_queues(given: Any, parsed: dict[str, int | None]) -> None:
    assert parse_queues(given) == parsed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("default", "queues is the string 'default'; expected a list of names, ['default']"),
        (["mail:"], "queue 'mail:': expected NAME or NAME:LIMIT, the limit a number from 1"),
        (["mail:-1"], "queue 'mail:-1': expected NAME or NAME:LIMIT"),
        (["mail:1.5"], "queue 'mail:1.5': expected NAME or NAME:LIMIT"),
        (["mail:999999"], "queue 'mail:999999': expected NAME or NAME:LIMIT"),
        (["a:1", "a"], "queue 'a' is named twice"),
        ([5], "queues has 5 in it; expected names"),
        ([None], "queues has None in it; expected names"),
    ],
)
def test_queues_that_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_queues(given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queues": {}}, "queues is empty; name at least one, such as 'default'"),
        ({"queues": {"": None}}, "queue '': expected 1 to 200 characters, none of them NUL"),
        ({"queues": {"x" * 201: None}}, "expected 1 to 200 characters"),
        ({"queues": {"a\x00b": None}}, "none of them NUL"),
        ({"queues": {"\ud800": None}}, "expected 1 to 200 characters"),
        ({"queues": {5: None}}, "queue is 5; expected its name, a str"),
        ({"queues": {"mail": 0}}, "queue 'mail' has limit 0; expected 1 or more, or no limit"),
        ({"queues": {"mail": "5"}}, "queue 'mail' has limit '5'; expected 1 or more"),
        ({"queues": {"mail": True}}, "queue 'mail' has limit True; expected 1 or more"),
        ({"concurrency": True}, "concurrency is True; expected 1 to 10000"),
        ({"threads": True}, "threads is True; expected 1 to 10000"),
        ({"shutdown_timeout_seconds": True}, "shutdown_timeout_seconds is True; expected seconds"),
        ({"poll_interval_seconds": False}, "poll_interval_seconds is False; expected seconds"),
        ({"history_seconds": True}, "history_seconds is True; expected seconds"),
        ({"concurrency": 0}, "concurrency is 0; expected 1 to 10000"),
        ({"concurrency": -3}, "concurrency is -3; expected 1 to 10000"),
        ({"concurrency": 10_001}, "concurrency is 10001"),
        ({"concurrency": "7"}, "concurrency is '7'; expected 1 to 10000"),
        ({"concurrency": 2.5}, "concurrency is 2.5; expected 1 to 10000"),
        ({"shutdown_timeout_seconds": -1.0}, "shutdown_timeout_seconds is -1.0; expected seconds, from 0 to a year"),
        ({"poll_interval_seconds": math.nan}, "poll_interval_seconds is nan"),
        ({"lease_seconds": 5.0}, "lease_seconds is 5.0; expected seconds, from 6 to a year"),
        ({"history_seconds": math.inf}, "history_seconds is inf"),
        ({"history_seconds": None}, "history_seconds is None"),
        ({"lease_seconds": "30"}, "lease_seconds is '30'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        WorkerConfig(**{"queues": {"default": None}, **settings})


def test_settings_at_their_ends() -> None:
    config = WorkerConfig(
        queues={"x" * 200: 1, "\U0001f600" * 200: None, "'; --": 10**6},
        concurrency=10_000,
        shutdown_timeout_seconds=0,
        poll_interval_seconds=0.0,
        lease_seconds=6,
        history_seconds=0.0,
    )
    assert config.concurrency == 10_000


def test_threads_on_a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may have a connection of its own, as Django's have."""
    for count, threads in ((1, 5), (2, 6), (28, 32), (64, 32)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=count: set(range(count)), raising=False)
        assert default_threads() == threads


async def test_run_worker_says_so_before_it_connects() -> None:
    app = notifyq.App()
    with pytest.raises(ConfigError, match=r"no handlers, .* decorate one with @app\.handler"):
        await app.run_worker()

    class Some(notifyq.Task):
        pass

    @app.handler
    async def some(task: Some) -> None: ...

    wrong: list[dict[str, Any]]
    wrong = [{"concurrency": 0}, {"queues": "default"}, {"queues": []}, {"lease": 1}, {"history": -1}]
    for options in wrong:
        with pytest.raises(ConfigError):
            await app.run_worker(dsn="postgresql://nobody@127.0.0.1:1/x", **options)


# --- The DSN


@pytest.mark.parametrize(
    ("given", "environ", "resolved"),
    [
        ("postgres://a/b", {"NOTIFYQ_DSN": "postgresql://n/"}, ("postgresql://a/b", "the given DSN")),
        (None, {"NOTIFYQ_DSN": "postgresql://n/", "DATABASE_URL": "x"}, ("postgresql://n/", "NOTIFYQ_DSN")),
        (None, {"DATABASE_URL": "postgresql+asyncpg://d/e"}, ("postgresql://d/e", "DATABASE_URL")),
        ("", {"DATABASE_URL": " postgres+psycopg2://d/e\n"}, ("postgresql://d/e", "DATABASE_URL")),
        (None, {"NOTIFYQ_DSN": "", "DATABASE_URL": ""}, (None, "the PG* environment variables")),
        ("postgresql:///db?host=/tmp/s&port=5", {}, ("postgresql:///db?host=/tmp/s&port=5", "the given DSN")),
        ("postgresql://u:p%2F%40@[::1]:5432/db", {}, ("postgresql://u:p%2F%40@[::1]:5432/db", "the given DSN")),
        ("postgresql://u:se#cret@h/db", {}, ("postgresql://u:se#cret@h/db", "the given DSN")),  # as libpq has it
        ("postgresql://u@a:1,b:2,c/db", {}, ("postgresql://u@a:1,b:2,c/db", "the given DSN")),
        ("postgresql://me@corp:pw@host/db", {}, ("postgresql://me@corp:pw@host/db", "the given DSN")),
        (
            "host=h  dbname = 'my shop' password=a\\ b",
            {},
            ("postgresql://:a%20b@/my%20shop?host=h", "the given DSN"),
        ),
    ],
)
def test_where_the_dsn_comes_from(given: str | None, environ: dict[str, str], resolved: Any) -> None:
    assert resolve_dsn(given, environ) == resolved


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        (
            "mysql://u:secret@h/db",
            "the given DSN is mysql://...; expected postgresql://user:password@host:5432/database",
        ),
        ("host=h password='secret", "the given DSN can't be used: it is not name=value name='value with spaces'"),
        ("host=h password=my secret", "the given DSN can't be used: it is not name=value name='value with spaces'"),
        ("postgresql://u:12?se@cret@h/db", "the given DSN has no number for a port"),
        ("u:secret@h://db", "the given DSN is no URL; expected postgresql://"),
        ("localhost", "the given DSN is no URL"),
        ("postgresql://u:secret/x@h/db", "the given DSN has no number for a port; in a password, write / as %2F"),
        ("postgresql://u:secret?x@h/db", "the given DSN has no number for a port"),
        ("postgresql://u:12/secret@h/db", "the given DSN has no number for a port"),
        ("postgresql://u:se[cret@h/db", "the given DSN is no URL; in a password, write / as %2F"),
        ("postgresql://u@h:port/db", "the given DSN has no number for a port"),
        ("postgresql://u@h:99999/db", "the given DSN has no number for a port"),
    ],
)
def test_a_dsn_that_cannot_be(dsn: str, message: str) -> None:
    """It is found before anything is connected, and named by its source. What may be a password isn't repeated."""
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        resolve_dsn(dsn, {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:secret@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://u:se cr@et:x@h/db", "postgresql://u:***@h/db"),
        ("postgresql://me@corp:secret@h/db", "postgresql://me@corp:***@h/db"),
        ("postgresql://:secret@h", "postgresql://:***@h"),
        ("postgresql://u@h/db?password=se%20cr@et&sslmode=require", "postgresql://u@h/db?password=***&sslmode=require"),
        ("postgresql://h/db?PassWord=x&sslpassword=y", "postgresql://h/db?PassWord=***&sslpassword=***"),
        ("host=h password=secret dbname=x", "host=h password=*** dbname=x"),
        ("postgresql://h:5432/db", "postgresql://h:5432/db"),
        ("postgresql:///db?host=/tmp/s", "postgresql:///db?host=/tmp/s"),
        ("can't reach h:5432", "can't reach h:5432"),
    ],
)  # fmt: skip
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


PASSWORDS = st.text(min_size=1, max_size=20).map(lambda text: f"qZ{text}Zq")
USERS = st.sampled_from(["", "u", "me@corp", "some.body"])
AFTER = st.sampled_from(["/db", ":1/db", ":1,127.0.0.1:2/db", ":1/db?sslmode=disable", ""])


@given(PASSWORDS, USERS, AFTER, st.booleans())
@example("qZ@/Zq", "u", "/db", False)
@example("qZ?password=Zq", "u", "/db", False)
@example("qZ://x:y@Zq", "u", "/db", False)
@example("qZ://x:y@Zq", "u", "/db", True)
@example("qZ\n@Zq", "u", "/db", False)
@example("qZ0@:1#Zq", "", ":1/db", False)
def test_no_password_in_any_message(password: str, user: str, after: str, encoded: bool) -> None:
    """Whether it is written right or wrong, no message shows it: neither what resolve_dsn says, nor what redact
    leaves."""
    raw = quote(password, safe="") if encoded else password
    try:
        url, _ = resolve_dsn(f"postgresql://{user}:{raw}@127.0.0.1{after}", {})
    except ConfigError as error:
        said = str(error)
    else:
        assert url is not None
        said = redact(url) + redact(f"no answer from {url}, sorry, mail me@example.com")
    assert "qZ" not in said
    assert "Zq" not in said


@given(PASSWORDS, st.sampled_from(["password", "sslpassword", "Password"]))
def test_no_password_of_a_query(password: str, name: str) -> None:
    url, _ = resolve_dsn(f"postgresql://u@h:5432/db?sslmode=disable&{name}={quote(password)}&x=1", {})
    assert url is not None
    assert redact(url) == f"postgresql://u@h:5432/db?sslmode=disable&{name}=***&x=1"


@pytest.mark.parametrize("password", ["qZsecret", "qZ%20s@e:cr%2Fet", "qZ s", "qZ%zz"])
@pytest.mark.parametrize("after", [":1/db", ":1/db?sslmode=oh", ":1/db?target_session_attrs=oh", "x.invalid/db"])
async def test_no_password_when_connecting_fails(password: str, after: str) -> None:
    """The error contains asyncpg's own messages."""
    app = notifyq.App()
    dsn = f"postgresql://u:{password}@127.0.0.1{after}"
    with pytest.raises((ConfigError, DatabaseError)) as caught:
        await connection.connect(dsn, timeout=2)
    with pytest.raises((ConfigError, DatabaseError)) as again:
        async with app.connect(dsn):
            pass
    for error in (caught.value, again.value):
        assert "qZ" not in str(error)
        assert "qZ" not in "".join(traceback.format_exception(error)), "nor in what it was raised from"
        assert "the given DSN" in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dsn: "postgresql://u:qZ@127.0.0.1:1/db", "is the server running there"),
        (lambda dsn: dsn.replace("?", "nope?"), "create it with createdb, or name another"),
        (lambda dsn: dsn.replace("://notifyq@", "://nobody:qZ@"), "check the user and the password"),
    ],
)
async def test_a_server_that_refuses(dsn: str, change: Any, message: str) -> None:
    """There are three ways: no server, no such database, no such user. Each has its cure."""
    with pytest.raises(DatabaseError, match=f"can't connect to the database .*{message}") as caught:
        await connection.connect(change(dsn))
    assert "qZ" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError | asyncpg.PostgresError)


# --- When to try again


@given(st.integers(1, 32767), st.floats(0, 1e6))
def test_backoff_is_between_nothing_and_an_hour(attempt: int, base: float) -> None:
    ceiling = ceiling_seconds(attempt, base)
    assert 0 <= backoff_seconds(attempt, base) <= ceiling <= LONGEST_WAIT_SECONDS


def test_backoff_doubles() -> None:
    """These are the figures in the documentation."""
    assert [ceiling_seconds(n, 2.0) for n in range(1, 6)] == [2, 4, 8, 16, 32]
    assert ceiling_seconds(32767, 2.0) == LONGEST_WAIT_SECONDS
    assert sum(ceiling_seconds(n, 2.0) for n in range(1, 10)) / 2 == pytest.approx(511)
