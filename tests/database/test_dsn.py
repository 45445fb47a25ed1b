"""A DSN of any form leads to the database that psql reaches with it, or to a message that says why not."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import notifyq
from notifyq.config import resolve_dsn
from notifyq.database import connection, hosts
from notifyq.database import dsn as dsns
from notifyq.embedded import Server, find_binaries
from notifyq.errors import ConfigError, DatabaseError
from notifyq.testing import Databases

WHO = "SELECT current_database(), current_user, current_setting('statement_timeout'), inet_server_port() IS NULL"
HBA = "host all locked all scram-sha-256\nlocal all locked scram-sha-256\nlocal all all trust\nhost all all all trust\n"


class There:
    """A server with databases and roles of several names, on a unix socket, 127.0.0.1 and ::1 (where there is one)."""

    def __init__(self, server: Server, port: int, folder: Path) -> None:
        self.port = port
        self.folder = folder
        self.sock = str(server.socket_dir)
        self.dsn = server.dsn("postgres")

    def __call__(self, text: str) -> str:
        known = {"port": self.port, "sock": self.sock, "folder": self.folder, "quoted": self.sock.replace("/", "%2F")}
        return re.sub(r"\{(\w+)\}", lambda found: str(known[found[1]]), text)


@pytest.fixture(scope="module")
def there() -> Iterator[There]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="nq-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "hba").write_text(HBA)
        settings = {"hba_file": str(folder / "hba"), "listen_addresses": "127.0.0.1,::1"}
        with Server(port=port, settings=settings) as server:
            found = There(server, port, folder)
            with psycopg.connect(found.dsn, autocommit=True) as conn:
                for statement in (
                    b"CREATE ROLE shop LOGIN", b"CREATE DATABASE shop", b'CREATE DATABASE "my shop"',
                    b"CREATE ROLE locked LOGIN PASSWORD 'p+:w% \\'", b'CREATE ROLE "me@corp" LOGIN',
                ):  # fmt: skip
                    conn.execute(statement)
            (folder / "services").write_text(
                found("# ours\n[other]\nhost=nowhere.invalid\n\n[shop]\nhost=127.0.0.1\nport={port}\nuser=shop\n")
                + "dbname=shop\noptions=-c statement_timeout=5s\n"
            )
            (folder / "pass").write_text(found("# x\nh:1:d:u:no\n127.0.0.1:{port}:*:locked:p+\\:w% \\\\\n"))
            (folder / "pass").chmod(0o600)
            yield found


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("NOTIFYQ_", "PG", "DATABASE_URL")) and name != "NOTIFYQ_PG_BIN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def find_psql() -> str:
    """Debian's psql, or another one of the system; the embedded server's if there is none."""
    psql = shutil.which("psql") or str(find_binaries().bin_dir / "psql")
    if not Path(psql).exists():
        pytest.skip("no psql here")
    return psql


def by_psql(dsn: str | None) -> tuple[str, ...] | str:
    """What psql reaches, or its message."""
    argv = [find_psql(), "-XAtc", WHO, *([] if dsn is None else ["-d", dsn])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return tuple(done.stdout.strip().split("|")) if done.returncode == 0 else done.stderr


def answer(row: Any) -> tuple[str, ...]:
    return tuple({True: "t", False: "f"}.get(value, value) for value in row)


async def by_asyncpg(dsn: str | None) -> tuple[str, ...]:
    conn = await connection.connect(dsn, role="test")
    try:
        return answer(await conn.fetchrow(WHO))
    finally:
        await conn.close()


async def by_app(dsn: str | None) -> tuple[str, ...]:
    app = notifyq.App()
    async with app.connect(dsn):
        assert app._pool is not None  # pyright: ignore[reportPrivateUsage]
        return answer(await app._pool.fetchrow(WHO))  # pyright: ignore[reportPrivateUsage]


def by_psycopg(dsn: str | None) -> tuple[str, ...]:
    client = notifyq.SyncClient(notifyq.App())
    with client.connect(dsn), client._opened().connection() as conn:  # pyright: ignore[reportPrivateUsage]
        row: Any = conn.execute(WHO.encode()).fetchone()
        return answer(row)


async def everywhere(dsn: str | None) -> tuple[str, ...]:
    """What each driver of notifyq reaches. All must agree."""
    found = {await by_asyncpg(dsn), await by_app(dsn), await asyncio.to_thread(by_psycopg, dsn)}
    assert len(found) == 1
    return found.pop()


TCP = "postgresql://shop@127.0.0.1:{port}/shop"
FORMS: list[tuple[str, dict[str, str]]] = [
    (TCP, {}),
    ("postgres://shop@localhost:{port}/my%20shop", {}),
    # Which database.
    ("postgresql://notifyq@127.0.0.1:{port}/?dbname=shop", {}),
    ("postgresql://notifyq@127.0.0.1:{port}/postgres?dbname=shop", {}),
    ("postgresql://notifyq@127.0.0.1:{port}?dbname=shop", {}),
    ("postgresql://shop@127.0.0.1:{port}", {}),
    ("postgresql://shop@127.0.0.1:{port}/", {"PGDATABASE": "postgres"}),
    ("postgresql://shop@127.0.0.1:{port}/?dbname=", {"PGDATABASE": "postgres"}),
    # Which host and user; a parameter after the ? wins.
    ("postgresql://nobody@nowhere.invalid:1/shop?host=127.0.0.1&port={port}&user=shop", {}),
    ("postgresql://shop@nowhere.invalid:{port}/shop?hostaddr=127.0.0.1", {}),
    ("postgresql://127.0.0.1:{port}/shop?user=me%40corp", {}),
    ("postgresql://me%40corp@127.0.0.1/shop", {"PGPORT": "{port}"}),
    ("postgresql://shop@/shop?host={sock}&port={port}", {}),
    ("postgresql://shop@{quoted}:{port}/shop", {}),
    ("postgresql:///shop?user=shop&port={port}", {"PGHOST": "{sock}"}),
    ("postgresql:///shop?user=shop", {"PGHOST": "127.0.0.1:1", "PGHOSTADDR": "127.0.0.1", "PGPORT": "{port}"}),
    ("postgresql://shop@127.0.0.1:1,127.0.0.1:{port}/shop?target_session_attrs=read-write", {}),
    ("postgresql://shop@127.0.0.1:1,127.0.0.1:{port}/shop", {"PGTARGETSESSIONATTRS": "prefer-standby"}),
    ("postgresql://shop@/shop?host=127.0.0.1,{sock}&port=1,{port}", {}),
    # Settings of the connection.
    (TCP + "?options=-c%20statement_timeout%3D5s", {}),
    (TCP + "?connect_timeout=10&keepalives=1&keepalives_idle=30&tcp_user_timeout=9", {}),
    (TCP + "?application_name=a&fallback_application_name=b&client_encoding=latin1", {}),
    (TCP + "?sslmode=disable&gssencmode=disable&channel_binding=disable", {}),
    (TCP + "?sslmode=prefer&channel_binding=prefer&sslcompression=0&sslsni=1", {}),
    (TCP + "?sslmode=allow&krbsrvname=postgres", {}),
    (TCP, {"PGOPTIONS": "-c statement_timeout=7s", "PGAPPNAME": "x", "PGCLIENTENCODING": "LATIN1"}),
    (TCP, {"PGSSLMODE": "disable", "PGCONNECT_TIMEOUT": "5", "PGGSSENCMODE": "disable", "PGCHANNELBINDING": "prefer"}),
    # Passwords.
    ("postgresql://locked:p+%3Aw%25%20%5C@127.0.0.1:{port}/shop", {}),
    ("postgresql://locked@127.0.0.1:{port}/shop?password=p+%3Aw%25%20%5C", {}),
    ("postgresql://locked@127.0.0.1:{port}/shop", {"PGPASSWORD": "p+:w% \\"}),
    ("postgresql://locked@127.0.0.1:{port}/shop", {"PGPASSFILE": "{folder}/pass"}),
    ("postgresql://locked@127.0.0.1:{port}/shop?passfile={folder}/pass", {}),
    ("postgresql://locked@127.0.0.1:1,127.0.0.1:{port}/shop?passfile={folder}/pass", {}),
    # Services.
    ("postgresql:///?service=shop", {"PGSERVICEFILE": "{folder}/services"}),
    ("postgresql:///postgres?service=shop", {"PGSERVICEFILE": "{folder}/services", "PGUSER": "notifyq"}),
    ("service=shop dbname=postgres", {"PGSERVICEFILE": "{folder}/services"}),
    # key=value.
    ("host=127.0.0.1 port={port} dbname=shop user=shop", {}),
    ("host = '127.0.0.1' port={port} dbname='my shop' user=me@corp", {}),
    ("user=locked password='p+:w% \\\\' host=127.0.0.1 port={port} dbname=my\\ shop", {}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "environ"), FORMS)
async def test_the_database_that_psql_reaches(
    there: There, form: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, there(value))
    expected = await asyncio.to_thread(by_psql, there(form))
    assert isinstance(expected, tuple), expected
    assert await everywhere(there(form)) == expected


@pytest.mark.parametrize(
    "environ",
    [
        {"PGHOST": "127.0.0.1", "PGPORT": "{port}", "PGUSER": "shop"},
        {"PGHOST": "{sock}", "PGPORT": "{port}", "PGUSER": "notifyq", "PGDATABASE": "my shop"},
        {"PGHOST": "127.0.0.1,127.0.0.1", "PGPORT": "1,{port}", "PGUSER": "shop"},
        {"PGSERVICE": "shop", "PGSERVICEFILE": "{folder}/services"},
        {"PGSERVICE": "shop", "PGSERVICEFILE": "{folder}/services", "PGDATABASE": "postgres", "PGHOST": "elsewhere"},
    ],
)
async def test_without_a_dsn(there: There, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, there(value))
    expected = await asyncio.to_thread(by_psql, None)
    assert isinstance(expected, tuple), expected
    assert await everywhere(None) == expected


async def test_what_only_sqlalchemy_says(there: There) -> None:
    """psql refuses these parameters; here such a URL leads where the rest of it says."""
    expected = await asyncio.to_thread(by_psql, there(TCP))
    for form in (
        TCP.replace("://", "+asyncpg://") + "?ssl=prefer&prepared_statement_cache_size=0",
        TCP.replace("://", "+psycopg://") + "?prepare_threshold=0",
        TCP.replace("://", "+psycopg2://") + "?ssl=false",
        " " + TCP + "\n",
        "postgresql+psycopg2://shop@/shop?host=127.0.0.1:{port}",
        "postgresql+asyncpg://shop@/shop?host=127.0.0.1:1&host=127.0.0.1:{port}",
    ):
        assert await everywhere(there(form)) == expected


async def test_in_tests_and_by_the_command_line(there: There) -> None:
    """The database is in the query: each test still gets a database of its own, and commands find the same one."""
    dsn = there("postgresql+asyncpg://notifyq@/?host={sock}&port={port}&dbname=postgres&ssl=disable")
    async with Databases(dsn) as databases, databases.new() as new:
        assert (await by_asyncpg(new))[0].startswith("notifyq_test_")
        argv = [sys.executable, "-m", "notifyq", "enqueue", "X"]
        done = await asyncio.to_thread(
            subprocess.run, argv, env={**os.environ, "DATABASE_URL": new}, capture_output=True, text=True, check=True
        )
        assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (
            TCP + "?channel_binding=require",
            "channel_binding=require is demanded, which asyncpg, the driver here, can't",
        ),
        (TCP + "?gssencmode=require", "take gssencmode or PGGSSENCMODE out"),
        (TCP + "?require_auth=scram-sha-256", "require_auth=scram-sha-256 is demanded"),
        (TCP + "?sslmode=on", "sslmode is 'on'; expected one of disable, allow, prefer, require"),
        (TCP + "?sslmode=require&sslrootcert=system", "sslrootcert=system goes with sslmode=verify-full only"),
        (TCP + "?schema=public", "it has the parameter 'schema', which PostgreSQL's clients don't know; take it out"),
        (TCP + "?statement_timeout=5s", "options=-c%20name%3Dvalue"),
        (TCP + "?ssl_mode=require", "did you mean 'sslmode'?"),
        (TCP + "?sslmode", "what follows its ? is not name=value"),
        (TCP + "?options=-c a=b", "what follows its ? is not name=value"),
        (TCP + "?connect_timeout=soon", "connect_timeout is 'soon'; expected whole seconds"),
        (TCP + "?target_session_attrs=primry", "target_session_attrs is 'primry'; expected one of any"),
        (TCP + "?load_balance_hosts=yes", "load_balance_hosts is 'yes'; expected disable, random"),
        (TCP + "?port=1,2", "it has 2 ports for 1 host"),
        (TCP + "?port=x", "a port of it is no number"),
        (TCP + "?hostaddr=1.1.1.1,1.1.1.2", "it has 1 hosts and 2 hostaddrs"),
        ("postgresql://shop:100%@127.0.0.1:{port}/shop", "a % that isn't followed by two hexadecimal digits"),
        ("postgresql:///?service=shop", "the service 'shop' is defined nowhere; looked in "),
        ("postgresql:///?service=none&servicefile={folder}/services", "the service 'none' is defined nowhere"),
        ("host=@abstract dbname=x", "it names an abstract unix socket, which asyncpg"),
        ("dbnam=x host=y", "it has the parameter 'dbnam'"),
    ],
)
async def test_what_asyncpg_cannot_do_is_said(there: There, form: str, says: str) -> None:
    """The message comes before any connection is tried."""
    with pytest.raises(ConfigError, match=f"^the given DSN can't be used: .*{re.escape(says)}"):
        await by_asyncpg(there(form))
    with pytest.raises(ConfigError, match=f"^the given DSN can't be used: .*{re.escape(says)}"):
        await by_app(there(form))


def test_what_psycopg_cannot_do_is_said(there: There) -> None:
    for form in ("?schema=public", "?sslmode=on", "?options=-c a=b", "?connect_timeout=soon"):
        with pytest.raises((ConfigError, DatabaseError)):
            by_psycopg(there(TCP + form))


def test_random_order_and_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host is tried once, with a connect_timeout of its own, at least 2 s, and the password for it."""
    url = "postgresql://u@a,b,c/d?load_balance_hosts=random&connect_timeout=1"
    for _ in range(5):
        found = hosts.attempts(url, {})
        assert sorted(attempt.arguments["host"] for attempt in found) == ["a", "b", "c"]
        assert {attempt.timeout for attempt in found} == {2.0}
    orders = {tuple(attempt.arguments["host"] for attempt in hosts.attempts(url, {})) for _ in range(200)}
    assert len(orders) > 1
    assert hosts.attempts("postgresql://u@a/d?connect_timeout=0", {})[0].timeout is None
    kinds = [
        attempt.arguments["target_session_attrs"]
        for attempt in hosts.attempts(url, {"PGTARGETSESSIONATTRS": "prefer-standby"})
    ]
    assert kinds == ["standby"] * 3 + ["any"] * 3


def test_the_user_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user is the system's, as for psql, and not the variable USER."""
    import pwd

    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody")
    assert dsns.read("postgresql://h/d", {})["user"] == pwd.getpwuid(os.geteuid()).pw_name


async def test_a_user_id_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a random user id: a message, unless the DSN names a user."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234567)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 1234567)
    with pytest.raises(ConfigError, match=r"user id 1234567 has no name here; name one: PGUSER, or postgresql://USER"):
        await by_asyncpg("postgresql://127.0.0.1:1/x")
    with pytest.raises(ConfigError, match="the user id 1234567 has no name here"):
        by_psycopg("postgresql://127.0.0.1:1/x")
    with pytest.raises(DatabaseError, match="is the server running there"):
        await by_asyncpg("postgresql://u@127.0.0.1:1/x")


async def test_where_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGUSER", "me")
    with pytest.raises(DatabaseError, match=r"nothing names one; .*: 127\.0\.0\.1:1, database me, user me\)"):
        await by_asyncpg(None)


async def test_a_server_that_is_there_and_refuses(there: There) -> None:
    """The message doesn't ask whether the server runs."""
    with psycopg.connect(there.dsn, autocommit=True) as conn:
        conn.execute(b"ALTER ROLE shop CONNECTION LIMIT 0")
        try:
            with pytest.raises(
                DatabaseError, match=r"too many connections for role .*; the server is there, and its con"
            ):
                await by_asyncpg(there(TCP))
        finally:
            conn.execute(b"ALTER ROLE shop CONNECTION LIMIT -1")
    with pytest.raises(DatabaseError, match="the server is there, and refuses this connection"):
        await by_asyncpg(there(TCP) + "?options=-c%20nonsense%3D1")


def test_what_is_shown_of_pairs() -> None:
    """A quoted password with spaces is one value, and isn't shown."""
    from notifyq.config import redact

    url, _ = resolve_dsn("host=h password='top secret & more' user=u", {})
    assert url is not None
    assert "secret" not in redact(url)
    assert redact(url) == "postgresql://u:***@/?host=h"


async def test_the_message_isnt_buried() -> None:
    """No traceback of the driver, seventy lines long, comes before it."""
    with pytest.raises(DatabaseError) as caught:
        await by_asyncpg("postgresql://u@127.0.0.1:1/x")
    lines = traceback.format_exception(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert "/asyncpg/" not in "".join(lines)
