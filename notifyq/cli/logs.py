"""The format of a worker's log records on stderr: a line of text with key=value fields, or a line of JSON."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from notifyq.log import text_of

LEVELS = ("debug", "info", "warning", "error")


def set_up(level: str, style: str, *, pid: bool) -> None:
    """Show all records of `level` and above, the app's too. An app that sets up logging handlers replaces this one.

    pid  True: show the process id in each line of text
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else TextLines(pid=pid))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # asyncpg's pool logs each failed try to reach a lost database, with a traceback. The worker logs it once.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
    # What a task's handler prints appears at once, also where stdout isn't a terminal.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


class TextLines(logging.Formatter):
    """`2030-01-31T08:00:00.123+00:00 ERROR notifyq.run: task dead id=5 type=SEND_MAIL error="no such host"`"""

    def __init__(self, *, pid: bool) -> None:
        super().__init__()
        self._pid = pid

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        who = f"{record.name}[{record.process}]" if self._pid else record.name
        # A record is one line, even if its message has line breaks.
        line = f"{when} {record.levelname} {who}: {_one_line(_summary(record))}"
        line += "".join(f" {name}={text_of(value)}" for name, value in _fields(record).items())
        return "\n".join([line, *_trace(self, record)])


class JsonLines(logging.Formatter):
    """The same as an object with time, level, logger, message, pid, the fields, and maybe a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _summary(record),
            "pid": record.process,
            **_fields(record),
        }
        if trace := _trace(self, record):
            line["traceback"] = "\n".join(trace)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _summary(record: logging.LogRecord) -> str:
    """The message; for one of notifyq's own records, without the fields."""
    return str(getattr(record, "summary", None) or record.getMessage())


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    found = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.exc_text and not record.exc_info:
        found = [record.exc_text]
    return [*found, formatter.formatStack(record.stack_info)] if record.stack_info else found


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")
