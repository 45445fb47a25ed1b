"""How a worker's log records look: a line of text with key=value fields, or of JSON. To stderr."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, cast

LEVELS = ("debug", "info", "warning", "error")


def set_up(level: str, style: str, *, pid: bool) -> None:
    """Show all records from `level` on, the app's too. An app that sets up handlers of its own replaces this."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else TextLines(pid=pid))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its pool tells of every try to reach a lost database, with a traceback; the worker says it once.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)


class TextLines(logging.Formatter):
    """`2030-01-31T08:00:00.123+00:00 ERROR notifyq.run: task dead id=5 type=SEND_MAIL error="no such host"`"""

    def __init__(self, *, pid: bool) -> None:
        super().__init__()
        self._pid = pid  # several processes write to one place

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        who = f"{record.name}[{record.process}]" if self._pid else record.name
        # One line a record, whatever is in it.
        line = f"{when} {record.levelname} {who}: {_one_line(record.getMessage())}"
        line += "".join(f" {name}={_value(value)}" for name, value in _fields(record).items())
        return "\n".join([line, *_trace(self, record)])


class JsonLines(logging.Formatter):
    """The same as an object with time, level, logger, message, pid, the fields, and maybe a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **_fields(record),
        }
        if trace := _trace(self, record):
            line["traceback"] = "\n".join(trace)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    found = [formatter.formatException(record.exc_info)] if record.exc_info else []
    return [*found, formatter.formatStack(record.stack_info)] if record.stack_info else found


def _value(value: object) -> str:
    text = ",".join(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else str(value)
    if re.fullmatch(r"[^\s\"=]+", text) and text.isprintable():
        return text
    # What a terminal might obey is \u009b and the like: of what isn't printable, JSON escapes only the beginning.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")
