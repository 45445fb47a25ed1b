"""PostgreSQL's errors as notifyq's own; and how a connection is made anew after one of them."""

from __future__ import annotations

import ssl
from typing import Any

import asyncpg
import psycopg
import pytest

from notifyq.database.connection import connect
from notifyq.database.errors import (
    ACCESS,
    RULES_FOR_ALL,
    RULES_TO_READ,
    is_answer,
    is_refusal,
    schema_gone,
    translate,
    translate_connect_errors,
)
from notifyq.database.reconnect import reconnecting
from notifyq.errors import ConfigError, DatabaseError, NotifyqError, SchemaError
from notifyq.pause import Pause


def wrapped(cause: Exception) -> Exception:
    """As SQLAlchemy raises its own exception from the driver's."""
    error = RuntimeError("(driver) failed")
    error.__cause__ = cause
    return error


DENIED = asyncpg.InsufficientPrivilegeError("permission denied for table task")
EVERY = RULES_FOR_ALL
MISSING = asyncpg.UndefinedTableError('relation "notifyq.task" does not exist')


@pytest.mark.parametrize(
    ("error", "rules", "kind", "message"),
    [
        (DENIED, ACCESS, DatabaseError, "this user may not dance: permission denied for table task; schema.sql"),
        (wrapped(DENIED), ACCESS, DatabaseError, "this user may not dance: permission denied for table task;"),
        (psycopg.errors.InsufficientPrivilege("no"), ACCESS, DatabaseError, "this user may not dance: no; "),
        (psycopg.errors.ReadOnlySqlTransaction("no"), ACCESS, DatabaseError, "this server, or this transaction, is"),
        (MISSING, EVERY, SchemaError, "this database has no schema notifyq; install it: notifyq migrate"),
        (asyncpg.UndefinedColumnError("no x"), RULES_TO_READ, SchemaError, "the schema notifyq of this"),
        (asyncpg.DataError("\\u0000"), EVERY, ConfigError, r"task A: PostgreSQL can't store this payload: \u0000"),
        (asyncpg.CheckViolationError("notifyq.task: delay"), EVERY, ConfigError, "task A: delay"),
        (asyncpg.CheckViolationError("stranger's"), EVERY, ConfigError, "PostgreSQL can't store this: stranger's"),
        (TimeoutError(), EVERY, NotifyqError, "the database took too long over it"),
        (asyncpg.AdminShutdownError("bye"), EVERY, DatabaseError, "lost the database in the middle: bye"),
        (asyncpg.InterfaceError("closed"), EVERY, DatabaseError, "lost the database in the middle: closed"),
        (ConnectionResetError("reset"), EVERY, DatabaseError, "lost the database in the middle: reset"),
        (asyncpg.DivisionByZeroError("1 / 0"), EVERY, ConfigError, "PostgreSQL can't store this: 1 / 0"),
        (asyncpg.RaiseError("own"), EVERY, NotifyqError, "the database refused: own"),
    ],
)  # fmt: skip
def test_each_has_its_class_and_cure(error: Exception, rules: Any, kind: type[NotifyqError], message: str) -> None:
    task = "A" if "task A" in message else ""
    found = translate(error, "dance", task=task, rules=rules)
    assert type(found) is kind
    assert str(found).startswith(message)


@pytest.mark.parametrize("error", [MISSING, asyncpg.UniqueViolationError("theirs"), TimeoutError(), ValueError("x")])
def test_what_has_no_rule_stays_as_it_is(error: Exception) -> None:
    assert translate(error, "dance", rules=ACCESS) is None


UNTRUSTED = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] no")  # an OSError and a ValueError


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UNTRUSTED, DatabaseError, "no; check sslmode and sslrootcert"),
        (ConnectionRefusedError("refused"), DatabaseError, "refused; is the server running there?"),
        (asyncpg.InvalidPasswordError("no"), DatabaseError, "no; check the user and the password"),
        (asyncpg.ClientConfigurationError("no such host"), ConfigError, "--dsn can't be used: no such host"),
        (UnicodeError("label too long"), ConfigError, "--dsn can't be used: label too long"),
    ],
)
def test_what_fails_while_connecting(error: Exception, kind: type[NotifyqError], message: str) -> None:
    with pytest.raises(kind) as raised, translate_connect_errors("postgresql://db", "--dsn"):
        raise error
    assert str(raised.value).endswith(message)


def test_an_error_is_translated_once() -> None:
    """An inner block has named the cure, and knows more."""
    inner = ConfigError("task A: too long")
    inner.__cause__ = DENIED
    assert translate(inner, "dance", rules=RULES_FOR_ALL) is None


def test_a_refusal_of_rows_is_no_loss_of_the_database() -> None:
    rows, table, gone = asyncpg.CheckViolationError("no"), asyncpg.ObjectNotInPrerequisiteStateError("no"), MISSING
    lost = asyncpg.ConnectionDoesNotExistError("gone")
    assert [is_refusal(error) for error in (rows, table, gone, lost)] == [True, False, False, False]
    assert [is_answer(error) for error in (rows, table, gone, lost)] == [True, True, False, False]
    assert schema_gone(gone)
    assert schema_gone(asyncpg.UndefinedTableError('relation "audit" does not exist')) is None, "a stranger's trigger"


async def test_it_connects_again_until_the_work_is_done(dsn: str) -> None:
    """Each time on a new connection, after a pause; what isn't a failure of the connection ends it."""
    pids: list[int] = []
    failures: list[Exception] = []

    async def serve(conn: Any) -> str:
        pids.append(conn.get_server_pid())
        if len(pids) < 3:
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return "done"

    async def failed(error: Exception) -> None:
        failures.append(error)

    assert await reconnecting(lambda: connect(dsn), serve, failed) == "done"
    assert len(set(pids)) == 3
    assert len(failures) == 2

    async def bug(_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await reconnecting(lambda: connect(dsn), bug, failed)


def test_a_pause_doubles() -> None:
    pause = Pause(0.1, 1.0)
    assert [pause.lengthen() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    pause.reset()
    assert 0.05 <= pause.jittered() <= 0.1
