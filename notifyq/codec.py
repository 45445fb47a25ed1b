"""Tasks, results and errors to JSON and back. JSON is bytes everywhere, as PostgreSQL sends jsonb.

msgspec encodes a Task as {"$type":"SEND_MAIL","to":...}, the tag first. The tag is the row's column `type`, so the
stored payload has no tag, and other clients insert none. A payload is decoded by the decoder of its row's type: a
decoder of all types would need the tag in the payload.
"""

from __future__ import annotations

import os
import traceback
from typing import Any

import msgspec

from .errors import ConfigError
from .task import Task

PAYLOAD_LIMIT = 16 * 1024 * 1024  # bytes of JSON
RESULT_LIMIT = 16 * 1024 * 1024  # bytes of JSON; a larger result belongs in a table or a file, which the result names
TRACEBACK_LINES = 30  # of a traceback, its last ones
NOTE_LENGTH = 200  # characters of a note of ctx.progress
OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
TRACEBACK_MOST = 100_000  # characters of a traceback that are split into lines
TEXT_LIMIT = 8_000  # characters of an error's text, and of its traceback, that are stored

_encoder = msgspec.json.Encoder()


def type_name(cls: type[Task]) -> str:
    """The tag of a task class, which is the value of the column `type`."""
    return str(cls.__struct_config__.tag)


def encode_payload(task: Task) -> bytes:
    """The payload's JSON, without the tag. Raises ConfigError for a value that JSON can't hold, or over the limit."""
    name = type_name(type(task))
    try:
        text = _encoder.encode(task)
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"task {name} can't be written as JSON: {error}") from error
    tag = b'{"$type":' + _encoder.encode(name)
    if not text.startswith(tag):  # a class without a handler was never checked
        raise ConfigError(
            f"task {name} must be a JSON object with a str as its tag; leave tag_field and array_like alone"
        )
    body = b"{" + text[len(tag) + 1 :] if text[len(tag)] == ord(",") else b"{}"
    if len(body) > PAYLOAD_LIMIT:
        raise ConfigError(f"task {name}: its payload is {len(body):,} bytes, the limit is {PAYLOAD_LIMIT:,}")
    return body


def encode_result(result: object) -> bytes | None:
    """A handler's return value as JSON; None for None. Raises TypeError, ValueError or RecursionError."""
    return None if result is None else _encoder.encode(result)


def encode_error(attempt: int, error: str, where: BaseException | None = None, *, alone: bool = False) -> bytes:
    """A failed attempt as an item of the column `errors`. It never raises, and PostgreSQL can store the result.

    where  the exception whose traceback is stored
    alone  True: the item replaces all earlier ones; see notifyq.append_error in schema.sql
    """
    entry: dict[str, Any] = {"attempt": attempt, "error": _clean(error)}
    if alone:
        entry["left_out"] = True
    if where is not None:
        entry["traceback"] = _clean(_tail(where))
    return _encoder.encode(entry)


def describe(error: BaseException) -> str:
    """`ValueError: the message`. It never raises, even if the exception's __str__ does."""
    text = text_of(error)
    name = type(error).__name__
    return f"{name}: {text}" if text.strip() else name


def first_line(error: BaseException) -> str:
    """The first line of `describe`. PostgreSQL's DETAIL, in the second line, may have a whole row with its payload."""
    return describe(error).splitlines()[0]


def text_of(value: object) -> str:
    """str(value). It never raises."""
    try:
        return str(value)
    except BaseException as worse:
        return f"<its __str__ raised {type(worse).__name__}>"


def _tail(error: BaseException) -> str:
    try:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(OURS):
            frames = frames.tb_next  # skip notifyq's own frames above the handler's, which are the same each time
        frames = frames or error.__traceback__
        text = "".join(traceback.format_exception(type(error), error, frames))
        lines = _cut(text, TRACEBACK_MOST).splitlines()
    except BaseException:
        return ""
    return "\n".join(lines[-TRACEBACK_LINES:])


def storable(text: str) -> str:
    """The text with NUL and lone surrogates escaped, which PostgreSQL refuses."""
    return text.replace("\x00", "\\x00").encode(errors="backslashreplace").decode()


def _clean(text: str) -> str:
    """The text, storable and of at most TEXT_LIMIT characters."""
    return _cut(storable(_cut(text)))  # cut before, as escaping 100 MB takes seconds; and after, as it may have grown


def _cut(text: str, most: int = TEXT_LIMIT) -> str:
    """The beginning and the end of a text that is longer than `most` characters."""
    return text if len(text) <= most else text[: most // 2] + "\n[...]\n" + text[-most // 2 :]
