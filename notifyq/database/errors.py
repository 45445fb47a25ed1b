"""PostgreSQL's errors: which ones may pass, and the translation of the others into notifyq's own, each with its cure.

This is the only place that translates them. It goes by SQLSTATE, so it serves asyncpg, psycopg and what wraps either.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeVar

import asyncpg
import asyncpg.exceptions

from ..config import redact
from ..errors import ConfigError, DatabaseError, NotifyqError, SchemaError
from .hosts import where_of

_Error = TypeVar("_Error", bound=BaseException)

# The errors of the database, or of the way to it. A running worker tries again after each
# of them, unless the schema has gone (`schema_gone`). All of PostgresError is among them, a violated check too: what a
# trigger or a constraint refuses today may pass tomorrow. `is_refusal` tells which ones hardly pass by themselves.
# asyncpg raises InterfaceError on a connection that is lost. `connect` translates all of them into DatabaseError.
TRANSIENT: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    OSError,
    TimeoutError,
    asyncpg.InternalClientError,
    DatabaseError,
)

# SQLSTATE classes of errors that say nothing about the rows of a statement: connection, authorisation, read-only
# server, deadlock, resources, locks, shutdown, system, and plans and statements that a session has lost.
PASSING: Final = frozenset({"08", "0A", "25", "26", "28", "34", "40", "53", "55", "57", "58", "F0"})

# The errors that one odd row can cause in a claim, however often it is tried again.
UNREADABLE: Final = (
    asyncpg.ProgramLimitExceededError,
    asyncpg.OutOfMemoryError,
    asyncpg.InternalServerError,
    asyncpg.DataError,
)


def is_refusal(error: BaseException) -> bool:
    """Whether PostgreSQL may have refused a statement because of its rows: a value that it can't store, a constraint, a
    trigger that somebody added. Then trying again won't help, and writing the other rows will."""
    return (
        isinstance(error, asyncpg.PostgresError)
        and isinstance(error.sqlstate, str)
        and (error.sqlstate[:2] not in PASSING or isinstance(error, asyncpg.OutOfMemoryError))
        and not isinstance(error, asyncpg.PostgresConnectionError)
        and schema_gone(error) is None
    )


def is_answer(error: BaseException) -> bool:
    """Whether the database is reachable and refuses: because of rows, or because of a setting of the whole table (a
    publication without a replica identity, say)."""
    return is_refusal(error) or type(error) is asyncpg.ObjectNotInPrerequisiteStateError


def schema_gone(error: BaseException) -> SchemaError | None:
    """The error to raise if `error`, of a worker's statement, means that the schema was dropped; else None."""
    # A trigger that a user added may miss a table of its own: the message then has another name in it.
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.InvalidSchemaNameError) and "notifyq" in str(error):
        return SchemaError("the schema notifyq has gone from under this worker; run: notifyq migrate")
    return None


# ---------------------------------------------------------------- translation of a statement's errors


class Rule(NamedTuple):
    """An error with SQLSTATE `state`, or of that class of two characters, becomes an `error` with this message.

    {said}     what PostgreSQL said
    {doing}    what the statement was to do
    {cure}     what helps if a privilege is missing
    {task}     "task TYPE: "; "" if the statement isn't about one task
    {payload}  " payload"; "" likewise
    """

    state: str
    error: type[NotifyqError]
    message: str
    only_if: str = ""  # PostgreSQL's message has these words


GRANTS = "schema.sql ends with the GRANTs, see: notifyq migrate --sql"
NO_SCHEMA = "this database has no schema notifyq; install it: notifyq migrate"
ADVANCE = "SELECT setval('notifyq.task_id_seq', (SELECT max(id) FROM notifyq.all_tasks))"

ACCESS: Final = (
    Rule("42501", DatabaseError, "this user may not {doing}: {said}; {cure}"),
    Rule("25006", DatabaseError, "this server, or this transaction, is read-only (a standby?); connect to the primary"),
)
RULES: Final = (
    *ACCESS,
    Rule("42P01", SchemaError, NO_SCHEMA),
    Rule("3F000", SchemaError, NO_SCHEMA),
    Rule("23514", ConfigError, "{task}{said}", only_if="notifyq.task: "),  # schema.sql's notifyq.apply_options()
    Rule(
        "23505",
        DatabaseError,
        "{task}another task has its id, as the sequence of ids is behind; run: " + ADVANCE,
        only_if="task_pkey",
    ),
    Rule("22", ConfigError, "{task}PostgreSQL can't store this{payload}: {said}"),
)
# For a statement that only reads, so that no trigger can have raised the last one.
RULES_TO_READ: Final = (
    *RULES,
    Rule("42703", SchemaError, "the schema notifyq of this database is older; run: notifyq migrate"),
)
# For a command, whose user is to see a message and no traceback.
RULES_FOR_ALL: Final = (
    *RULES,
    Rule("23", ConfigError, "PostgreSQL can't store this: {said}"),
    Rule("57014", NotifyqError, "the database took too long over it, and nothing was changed; try again"),
    Rule("08", DatabaseError, "lost the database in the middle: {said}; try again"),
    Rule("57P01", DatabaseError, "lost the database in the middle: {said}; try again"),
    Rule("", NotifyqError, "the database refused: {said}"),
)


def translate(
    error: BaseException, doing: str, *, task: str = "", cure: str = GRANTS, rules: tuple[Rule, ...] = RULES
) -> NotifyqError | None:
    """What `error` is as one of notifyq's, by the first rule for it; None if there is none, or it is one already."""
    state, said = _sqlstate(error)
    if not state or isinstance(error, NotifyqError):
        return None
    for rule in rules:
        if state.startswith(rule.state) and rule.only_if in said:
            words = {
                "said": said.removeprefix(rule.only_if),
                "doing": doing,
                "cure": cure,
                "task": f"task {task}: " if task else "",
                "payload": " payload" if task else "",
            }
            return rule.error(rule.message.format_map(words))
    return None


class translate_errors:
    """Around a statement: raise notifyq's error for PostgreSQL's, where there is a rule. `doing`, `task`: see Rule."""

    __slots__ = ("_cure", "_doing", "_rules", "_task")

    def __init__(self, doing: str, *, task: str = "", cure: str = GRANTS, rules: tuple[Rule, ...] = RULES) -> None:
        self._doing = doing
        self._task = task
        self._cure = cure
        self._rules = rules

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            return
        if isinstance(error, UnicodeEncodeError) and self._task:  # psycopg's, which encodes for the caller's `conn`
            raise ConfigError(
                f"task {self._task}: the client_encoding of `conn` is {error.encoding}, which doesn't have "
                f"{error.object[error.start : error.end]!r}; connect with client_encoding=utf8"
            ) from None
        found = translate(error, self._doing, task=self._task, cure=self._cure, rules=self._rules)
        if found is not None:
            raise found from (without_traceback(error) if isinstance(found, SchemaError) else error)


def _sqlstate(error: BaseException | None) -> tuple[str, str]:
    """The SQLSTATE and message of a driver's exception, or of the one that it was raised from. A failure on this side
    of the connection gets the SQLSTATE that PostgreSQL has for it."""
    cause = error
    while isinstance(cause, Exception):
        state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)  # psycopg2's name
        if isinstance(state, str):
            return state, str(cause)
        cause = cause.__cause__
    if isinstance(error, TimeoutError):
        return "57014", str(error)
    return ("08", str(error)) if isinstance(error, OSError | asyncpg.InterfaceError) else ("", "")


def without_traceback(error: _Error) -> _Error:
    """The error without its traceback and its causes: seventy lines of a driver's code would hide the message."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


# ---------------------------------------------------------------- translation of what fails while connecting

CONNECT_CURES: Final = (
    ("3D000", "create it with createdb, or name another"),
    ("28", "check the user and the password"),
    ("53300", "the server is there, and its connections are used up; close some, or raise the limit that it names"),
    ("57P03", "the server is there, and takes no connections now; try again soon"),
    ("", "the server is there, and refuses this connection"),
)


@contextmanager
def translate_connect_errors(url: str | None, source: str) -> Generator[None, None, None]:
    """Raise ConfigError or DatabaseError for what goes wrong while connecting, with the cure, without the password."""
    try:
        yield
    except asyncpg.exceptions.TargetServerAttributeNotMatched as error:
        raise DatabaseError(f"no server of {source} will do: {redact(str(error))}") from None
    except (asyncpg.PostgresError, OSError) as error:  # first: ssl.SSLCertVerificationError is a ValueError too
        raise DatabaseError(_unreachable(url, source, error)) from without_traceback(error)
    except (asyncpg.ClientConfigurationError, asyncpg.UnsupportedClientFeatureError, ValueError) as error:
        raise ConfigError(f"{source} can't be used: {redact(str(error))}") from None
    except (asyncpg.InternalClientError, asyncpg.InterfaceError) as error:
        raise DatabaseError(_unreachable(url, source, error)) from without_traceback(error)


def _unreachable(url: str | None, source: str, error: BaseException) -> str:
    what = redact(str(error)) or type(error).__name__
    where = f"{source}: {redact(url)}" if url else f"nothing names one; {source} and libpq's defaults: {where_of(url)}"
    if isinstance(error, asyncpg.PostgresError):
        cure = next(cure for state, cure in CONNECT_CURES if str(error.sqlstate).startswith(state))
    elif url is None:
        cure = "name a server with --dsn, NOTIFYQ_DSN or DATABASE_URL (to try one: notifyq dev)"
    elif "SSL" in what or (isinstance(error, FileNotFoundError) and "sslrootcert" in where):
        # ssl.SSLError, or asyncpg's ConnectionError where the server has none.
        cure = "check sslmode and sslrootcert"
    elif isinstance(error, TimeoutError):
        what, cure = "no answer", "check the address, and what lies between"
    else:
        cure = "is the server running there?"
    return f"can't connect to the database ({where}): {what}; {cure}"
