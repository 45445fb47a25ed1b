"""Connections and statements: the only module that speaks SQL, beside schema.py. The statements are in sql/*.sql.

A statement is text, run with parameters; asyncpg keeps it prepared. Nothing is ever glued into one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import asyncpg
import asyncpg.exceptions

from .. import forked
from ..config import resolve_dsn
from .dsn import Attempt, attempts
from .errors import translate_connect_errors

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
else:
    Connection = Any

SQL: Final[Mapping[str, str]] = {
    path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "sql").glob("*/*.sql")
}

# A statement that carries large values carries this many bytes of them, or one value if that is larger.
STATEMENT_BYTES = 4 * 1024 * 1024
SLOWEST = 512 * 1024  # bytes a second: a statement that carries many bytes is given the time they take at this rate

COMMAND_TIMEOUT_SECONDS = 30.0  # and asyncpg bounds with it how long it waits for a cancelled statement
# A worker's statements take milliseconds, or 5 s where they wait for the turn. One that isn't answered for longer went
# where bytes vanish though some kernel on the way acknowledges them: no keepalive tells.
WORKER_TIMEOUT_SECONDS = 8.0
HOST_SECONDS = 3.0  # for each of several hosts to answer in, but the last
PROOF_SECONDS = 3.0  # for a statement that is sent to see whether somebody is there

# A backend whose worker is gone must go soon too, with its locks.
GONE_SETTINGS: Final[Mapping[str, str]] = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}

# A queue's statistics are always of another moment, so its statements don't ask the planner: the index that each
# names in its comment is the way, and the plan is made once.
WORKER_SETTINGS: Final[Mapping[str, str]] = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    **GONE_SETTINGS,
    # The sleeper keeps a transaction open, without a snapshot; limits meant for people's sessions would end it.
    "idle_in_transaction_session_timeout": "0",
    "statement_timeout": "0",
    "lock_timeout": "0",
    # Whatever is the default there: in a stricter transaction a sleeper would hold a snapshot, and with it vacuum.
    "default_transaction_isolation": "read committed",
    "search_path": "pg_catalog",
}


def seconds_for(size: int) -> float:
    """The timeout of a worker's statement that carries `size` bytes, one way or the other."""
    return WORKER_TIMEOUT_SECONDS + size / SLOWEST


async def connect(
    dsn: str | None = None,
    *,
    role: str = "client",
    timeout: float = 10.0,
    command_timeout: float = COMMAND_TIMEOUT_SECONDS,
    settings: Mapping[str, str] | None = None,
) -> asyncpg.Connection[asyncpg.Record]:
    """A connection to `dsn`, or to where the environment says. jsonb is bytes on it, both ways.

    Raises ConfigError for a DSN that can't be one, DatabaseError for a server that can't be reached or refuses.
    """
    url, source = resolve_dsn(dsn)
    with translate_connect_errors(url, source):
        conn = await open(url, role, settings or {}, timeout=timeout, command_timeout=command_timeout)
    try:
        keep_alive(conn)
        await set_codecs(conn)
    except BaseException:
        conn.terminate()
        raise
    return conn


class Pooled(asyncpg.Connection):
    """Through a pooler in transaction mode: each transaction may be another backend's. What outlives one is in vain
    there or in somebody else's way: LISTEN, locks and settings of a session, statements that stay prepared."""


def is_pooled(conn: Connection) -> bool:
    """Not isinstance, which asyncpg answers with yes for every connection."""
    return type(conn) is Pooled


async def dial(url: str | None, *, timeout: float = 10.0, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
    """asyncpg.connect, host after host, to where the DSN leads (dsn.py). Its own timeout is for all hosts together: one
    that has vanished without a word would be the only one that is ever tried."""
    *others, last = attempts(url)
    for attempt in others:
        try:
            return await _connect(attempt, min(timeout, HOST_SECONDS), options)
        except (
            OSError,
            TimeoutError,
            asyncpg.CannotConnectNowError,
            asyncpg.exceptions.TargetServerAttributeNotMatched,
        ):
            pass
    return await _connect(last, timeout, options)


async def dial_for_pool(url: str | None, *, loop: object, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
    """`dial`, for asyncpg.create_pool(url, connect=...)."""
    return await dial(url, **options)


async def _connect(attempt: Attempt, timeout: float, options: Mapping[str, Any]) -> asyncpg.Connection[asyncpg.Record]:
    settings = {**({"options": attempt.options} if attempt.options else {}), **options.get("server_settings", {})}
    given: dict[str, Any] = {**options, **attempt.arguments, "server_settings": settings}
    given["timeout"] = attempt.timeout or timeout
    return await asyncpg.connect(**given)


async def open(
    url: str | None, role: str, settings: Mapping[str, str], *, timeout: float, command_timeout: float
) -> asyncpg.Connection[asyncpg.Record]:
    """A bare connection, Pooled where it is one. Its backend's process id tells: a pooler makes up one of its own."""
    name = {"application_name": f"notifyq {role}"}
    try:
        conn = await dial(
            url,
            timeout=timeout,
            command_timeout=command_timeout,
            max_cached_statement_lifetime=0,
            server_settings={**name, **settings},
        )
    except asyncpg.ProtocolViolationError:
        pass  # pgbouncer, of settings that it doesn't know
    else:
        try:
            async with conn.transaction():
                backend = await (await conn.prepare("SELECT pg_backend_pid()", name="")).fetchval()
            if backend == conn.get_server_pid():
                return conn
        except BaseException:
            conn.terminate()
            raise
        await conn.close(timeout=timeout)
    return await dial(
        url,
        timeout=timeout,
        command_timeout=command_timeout,
        statement_cache_size=0,
        server_settings=name,
        connection_class=Pooled,
    )


async def connect_worker(
    dsn: str | None, role: str, *, worker: int | None = None, relaxed: bool = False, lock_seconds: float = 0.0
) -> asyncpg.Connection[asyncpg.Record]:
    """`connect`, with the settings of a worker. While the connection lasts, it proves that `worker` lives.

    relaxed: its commits don't wait for the disk. That is for claims alone: if the server crashes, one that is lost is
    a task still ready. lock_seconds: how long its statements wait for a lock; 0: as long as for anything.
    """
    settings = {**WORKER_SETTINGS, "lock_timeout": f"{lock_seconds * 1000:.0f}"}
    if relaxed:
        settings["synchronous_commit"] = "off"
    conn = await connect(dsn, role=role, command_timeout=WORKER_TIMEOUT_SECONDS, settings=settings)
    if is_pooled(conn):
        return conn
    try:
        await conn.execute(
            # Not every version has them, and at the start of a session an unknown name is fatal.
            "SELECT set_config(name, value, false) FROM (VALUES ('client_connection_check_interval', '1s'),"
            " ('transaction_timeout', '0'), ('idle_session_timeout', '0')) AS s (name, value)"
            " WHERE name IN (SELECT name FROM pg_catalog.pg_settings)"
        )
    except asyncpg.PostgresError:
        pass  # some systems refuse client_connection_check_interval; then keepalives do it, later
    except BaseException:
        conn.terminate()
        raise
    if worker is not None:
        try:
            await prove_alive(conn, worker)
        except BaseException:
            conn.terminate()
            raise
    return conn


async def prove_alive(conn: Connection, worker: int) -> bool:
    """Take, shared, the advisory lock of `worker`, which keeps rescuers away as long as one session of it is left.

    False if the lock is with somebody: with a rescuer, who has found that no session was left, or with a stranger.
    """
    return bool(await conn.fetchval("SELECT pg_try_advisory_lock_shared(1852990827, $1::integer)", worker))


async def set_codecs(conn: Connection) -> None:
    """jsonb as bytes of JSON. Its binary form is that text after one version byte; no str in between.

    A database with the encoding SQL_ASCII holds any bytes, and refuses to send what isn't UTF-8 to a client that
    expects UTF-8: one odd name would fail each claim that meets it. To a client that expects LATIN1, in which every
    byte is valid, it sends all as it is. What isn't UTF-8 then reads as U+FFFD. (Statements, which are sent in LATIN1
    too, are plain ASCII.)
    """
    if conn.get_settings().server_encoding == "SQL_ASCII":
        await conn.execute("SET client_encoding = 'LATIN1'")
        for name in ("text", "varchar"):
            await conn.set_type_codec(
                name, schema="pg_catalog", encoder=_text_encode, decoder=_text_decode, format="binary"
            )
    await conn.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=_jsonb_encode, decoder=_jsonb_decode, format="binary"
    )


def _text_encode(text: str) -> bytes:
    return text.encode()


def _text_decode(binary: bytes) -> str:
    return binary.decode(errors="replace")  # in JSON too, where a backslash would be wrong


def _jsonb_encode(text: bytes) -> bytes:
    return b"\x01" + text


def _jsonb_decode(binary: bytes) -> bytes:
    return binary[1:]


def keep_alive(conn: asyncpg.Connection[asyncpg.Record]) -> None:
    """A peer that vanished is noticed within 15 s. asyncpg sets only TCP_NODELAY (its issue 519).

    And the server notices that this process is gone, even if a child that it has forked lives on.
    """
    transport = cast("asyncio.Transport | None", getattr(conn, "_transport", None))
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is not None:
        forked.keep_from_children(sock.fileno())
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 5),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 2),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        # For unacknowledged data, which keepalive doesn't cover.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 12_000),
    ):
        if hasattr(socket, name):
            sock.setsockopt(level, getattr(socket, name), value)


def notified_id(payload: object) -> int | None:
    """The id that a notification tells of; None for anything else, since any role can send what it likes."""
    text = str(payload)
    return int(text) if len(text) <= 19 and text.isascii() and text.isdigit() else None


async def server_version(conn: Connection) -> str:
    """Such as "18.6"."""
    return str(await conn.fetchval("SHOW server_version")).split()[0]
