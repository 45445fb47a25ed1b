"""The package's loggers. Their messages contain all fields, so that every formatter shows them.

A call gives a text, and its fields as `extra={"fields": {...}}`. The message of the record has both: `task dead id=5
type=SEND_MAIL error="no such host"`. It is a template with arguments, so tools can group records by their template. The
record's attributes `summary` and `fields` keep the text and the fields apart, for formatters that write fields by
themselves.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, cast

ROOT = "notifyq"


def logger(name: str) -> logging.Logger:
    """The logger of this name, whose messages contain their fields."""
    found = logging.getLogger(name)
    if not any(isinstance(known, _WithFields) for known in found.filters):
        found.addFilter(_WithFields())
    return found


def enable() -> None:
    """Enable all of the package's loggers. logging.config disables the existing ones by default, and an application
    that uses it doesn't mean to silence its tasks."""
    for name, found in list(logging.root.manager.loggerDict.items()):
        if isinstance(found, logging.Logger) and (name == ROOT or name.startswith(f"{ROOT}.")):
            found.disabled = False


class _WithFields(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.summary = summary = record.getMessage()
        except Exception:
            return True  # the arguments don't fit the template: logging itself reports that
        fields: dict[str, Any] = getattr(record, "fields", {})
        if fields:
            names = "".join(f" {name.replace('%', '%%')}=%s" for name in fields)
            record.msg = summary.replace("%", "%%") + names
            record.args = tuple(text_of(value) for value in fields.values())
        if trace := getattr(record, "trace", None):
            record.exc_text = trace
        return True


def text_of(value: object) -> str:
    """A field's value in a line of text, in quotes if it is empty or has spaces, quotes, `=` or unprintables."""
    text = ",".join(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else str(value)
    if re.fullmatch(r"[^\s\"=]+", text) and text.isprintable():
        return text
    # Escape the rest too: a terminal obeys \u009b, say. JSON escapes only the control characters below 0x20.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))
