"""Tasks, results and errors to JSON and back. JSON is bytes everywhere: PostgreSQL's jsonb arrives as such.

A Task encodes as {"$type":"SEND_MAIL","to":...}, tag first. The tag is the row's `type`, so the stored payload
goes without, and what any other client inserts needs none. Decoding takes the decoder of the row's type: a
union of all types would have to be told the tag again, and a union of one type wouldn't ask for it.
"""

from __future__ import annotations

import os
import traceback
from typing import Any

import msgspec

from .errors import ConfigError
from .task import Task

PAYLOAD_LIMIT = 16 * 1024 * 1024  # bytes of JSON
RESULT_LIMIT = 16 * 1024 * 1024  # bytes of JSON; what is larger belongs in a table or a file, which the result names
TRACEBACK_LINES = 30
NOTE_LENGTH = 200  # characters of what ctx.progress tells
OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
TRACEBACK_MOST = 100_000  # characters of a traceback that are looked at
TEXT_LIMIT = 8_000  # characters of an error's text, and of its traceback

_encoder = msgspec.json.Encoder()


def type_name(cls: type[Task]) -> str:
    """The tag: what the `type` column holds."""
    return str(cls.__struct_config__.tag)


def encode_payload(task: Task) -> bytes:
    """The payload's JSON, without the tag. Raises ConfigError for what JSON or PostgreSQL can't hold."""
    name = type_name(type(task))
    try:
        text = _encoder.encode(task)
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"task {name} can't be written as JSON: {error}") from error
    tag = b'{"$type":' + _encoder.encode(name)
    if not text.startswith(tag):  # a class that no handler takes was never checked
        raise ConfigError(
            f"task {name} must be a JSON object with a str as its tag; leave tag_field and array_like alone"
        )
    body = b"{" + text[len(tag) + 1 :] if text[len(tag)] == ord(",") else b"{}"
    if len(body) > PAYLOAD_LIMIT:
        raise ConfigError(f"task {name}: its payload is {len(body):,} bytes, the limit is {PAYLOAD_LIMIT:,}")
    return body


def encode_result(result: object) -> bytes | None:
    """A handler's return value as JSON; None stays None. Raises TypeError, ValueError or RecursionError."""
    return None if result is None else _encoder.encode(result)


def encode_error(attempt: int, error: str, where: BaseException | None = None, *, alone: bool = False) -> bytes:
    """One failed attempt, an element of the `errors` column. Never raises, and PostgreSQL takes what it makes.

    alone: it takes the place of all earlier ones; see notifyq.append_error in schema.sql.
    """
    entry: dict[str, Any] = {"attempt": attempt, "error": _clean(error)}
    if alone:
        entry["left_out"] = True
    if where is not None:
        entry["traceback"] = _clean(_tail(where))
    return _encoder.encode(entry)


def describe(error: BaseException) -> str:
    """`ValueError: the message`. Never raises, whatever the exception's __str__ does."""
    text = text_of(error)
    name = type(error).__name__
    return f"{name}: {text}" if text.strip() else name


def first_line(error: BaseException) -> str:
    """Of what describes it: PostgreSQL's DETAIL, in the second one, may hold a whole row with its payload."""
    return describe(error).splitlines()[0]


def text_of(value: object) -> str:
    """Its str(). Never raises."""
    try:
        return str(value)
    except BaseException as worse:
        return f"<its __str__ raised {type(worse).__name__}>"


def _tail(error: BaseException) -> str:
    try:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(OURS):
            frames = frames.tb_next  # what called the handler: the same in each of them
        frames = frames or error.__traceback__
        text = "".join(traceback.format_exception(type(error), error, frames))
        lines = _cut(text, TRACEBACK_MOST).splitlines()
    except BaseException:
        return ""
    return "\n".join(lines[-TRACEBACK_LINES:])


def storable(text: str) -> str:
    """Without what PostgreSQL refuses: NUL and lone surrogates."""
    return text.replace("\x00", "\\x00").encode(errors="backslashreplace").decode()


def _clean(text: str) -> str:
    """Storable, and no longer than people read."""
    return _cut(storable(_cut(text)))  # before it, as to look through 100 MB takes seconds; after it, as it may grow


def _cut(text: str, most: int = TEXT_LIMIT) -> str:
    """Its beginning and its end."""
    return text if len(text) <= most else text[: most // 2] + "\n[...]\n" + text[-most // 2 :]
