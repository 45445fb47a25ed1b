"""Connections, and the text of the statements that run on them: sql/WING/NAME.sql is SQL["NAME"].

A statement is constant text with parameters, and asyncpg keeps it prepared. No statement is ever glued together.

    connect            goes to where the DSN leads (hosts.py), reads jsonb as bytes, and notices dead peers
    connect_worker     the same with a worker's settings, and with the lock that proves that the worker lives
    open               makes a bare connection, and finds out whether it leads through a pooler
    dial_for_pool      makes the connections of a pool
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
from .errors import translate_connect_errors
from .hosts import Attempt, attempts

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
else:
    Connection = Any

SQL: Final[Mapping[str, str]] = {
    path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "sql").glob("*/*.sql")
}

# A statement carries at most this many bytes of large values, or one value if that is larger.
STATEMENT_BYTES = 4 * 1024 * 1024
SLOWEST = 512 * 1024  # bytes a second: a statement that carries many bytes is given the time they take at this rate

COMMAND_TIMEOUT_SECONDS = 30.0  # asyncpg then waits as long again for the cancelled statement to end
# A worker's statements take milliseconds, or 5 s where they wait for the turn. If there is no answer for longer, the
# connection is half-open, and keepalives can't detect it: bytes vanish, though some kernel on the way acknowledges
# them.
WORKER_TIMEOUT_SECONDS = 8.0
HOST_SECONDS = 3.0  # how long each of several hosts may take to answer; the last one has the whole timeout
PROOF_SECONDS = 3.0  # for a statement that only proves that the server answers

# The backend of a worker that is gone must end soon too, and release its locks.
GONE_SETTINGS: Final[Mapping[str, str]] = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}

# A queue changes faster than its statistics, so the planner can't choose by them: these settings leave it only the
# index that each statement names in its comment, and the plan is made once.
WORKER_SETTINGS: Final[Mapping[str, str]] = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    **GONE_SETTINGS,
    # A worker that sleeps at the bell keeps a transaction open, without a snapshot. Limits that are meant for people's
    # sessions would end it.
    "idle_in_transaction_session_timeout": "0",
    "statement_timeout": "0",
    "lock_timeout": "0",
    # Whatever the database's default is: in a stricter transaction a sleeper would hold a snapshot, and hold up vacuum.
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
    """Connect to `dsn`, or to where the environment says. jsonb is bytes on the connection, both ways.

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
    """A connection through a pooler in transaction mode: each transaction may run on another backend. So what belongs
    to a session (LISTEN, advisory locks, settings, prepared statements) is lost, or hinders another client."""


def is_pooled(conn: Connection) -> bool:
    """Whether a connection leads through a pooler. Its type says so: isinstance is true for every asyncpg
    connection."""
    return type(conn) is Pooled


async def dial(url: str | None, *, timeout: float = 10.0, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
    """Call asyncpg.connect for one host of the DSN after the other (hosts.py), until one accepts.

    asyncpg's own timeout is for all hosts together: if a host gave no answer, the hosts after it would not be tried.
    """
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
    """A bare connection; behind a pooler, a Pooled one. A pooler makes up the process id of the backend, so a statement
    that asks for the id gets another one."""
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
        pass  # pgbouncer refuses settings that it doesn't know
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
    """`connect`, with the settings of a worker.

    worker        while the connection lasts, it proves that this worker lives
    relaxed       its commits don't wait for the disk. If the server crashes, a claim may be lost: its tasks are ready
                  again
    lock_seconds  how long its statements wait for each lock; 0: as long as for anything else
    """
    settings = {**WORKER_SETTINGS, "lock_timeout": f"{lock_seconds * 1000:.0f}"}
    if relaxed:
        settings["synchronous_commit"] = "off"
    conn = await connect(dsn, role=role, command_timeout=WORKER_TIMEOUT_SECONDS, settings=settings)
    if is_pooled(conn):
        return conn
    try:
        await conn.execute(
            # Not every version of PostgreSQL has these, and a connection that starts with an unknown setting fails.
            "SELECT set_config(name, value, false) FROM (VALUES ('client_connection_check_interval', '1s'),"
            " ('transaction_timeout', '0'), ('idle_session_timeout', '0')) AS s (name, value)"
            " WHERE pg_catalog.current_setting(name, true) IS NOT NULL"
        )
    except asyncpg.PostgresError:
        pass  # some systems refuse client_connection_check_interval; keepalives notice a dead client there, later
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
    """Share the advisory lock of `worker`, which keeps rescuers away while the worker has a session left.

    Returns False if another session has the lock: a rescuer that has found no session left, or a stranger.
    """
    return bool(await conn.fetchval("SELECT pg_try_advisory_lock_shared(1852990827, $1::integer)", worker))


async def set_codecs(conn: Connection) -> None:
    """Read and write jsonb as bytes of JSON: its binary form is a version byte and that text.

    A database with the encoding SQL_ASCII holds any bytes, and refuses to send what isn't UTF-8 to a client that
    expects UTF-8: one odd name would fail each claim that meets it. To a client that expects LATIN1, in which every
    byte is valid, it sends all bytes as they are. What isn't UTF-8 then reads as U+FFFD. (Statements, which are sent in
    LATIN1 too, are plain ASCII.)
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
    """Let this process notice within 15 s that the server vanished: asyncpg sets only TCP_NODELAY (its issue 519).

    And let the server notice that this process is gone, even if a child that it forked lives on: the child gives up the
    socket.
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
    """The id in a notification's payload; None for anything else, since any role can send any payload."""
    text = str(payload)
    return int(text) if len(text) <= 19 and text.isascii() and text.isdigit() else None


async def server_version(conn: Connection) -> str:
    """Such as "18.6"."""
    return str(await conn.fetchval("SHOW server_version")).split()[0]
