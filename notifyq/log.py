"""The package's loggers: each message says everything, whatever formats it.

A call gives a text, and what it is about as `extra={"fields": {...}}`. The record gets both in its message, as
`task dead id=5 type=SEND_MAIL error="no such host"`, so that a plain formatter shows them; as a template and its
arguments, so that tools which group records by their template do so. `summary` and `fields` keep the two apart, for
formatters that write fields by themselves.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, cast

ROOT = "notifyq"


def logger(name: str) -> logging.Logger:
    """The logger of this name, whose records are as said above."""
    found = logging.getLogger(name)
    if not any(isinstance(known, _Whole) for known in found.filters):
        found.addFilter(_Whole())
    return found


def enable() -> None:
    """Enable all of the package's loggers. logging.config disables those that exist, if it isn't told otherwise; and
    an application that does that doesn't mean to be told nothing of its tasks."""
    for name, found in list(logging.root.manager.loggerDict.items()):
        if isinstance(found, logging.Logger) and (name == ROOT or name.startswith(f"{ROOT}.")):
            found.disabled = False


class _Whole(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.summary = summary = record.getMessage()
        except Exception:
            return True  # arguments that don't fit: logging itself says so
        fields: dict[str, Any] = getattr(record, "fields", {})
        if fields:
            names = "".join(f" {name.replace('%', '%%')}=%s" for name in fields)
            record.msg = summary.replace("%", "%%") + names
            record.args = tuple(text_of(value) for value in fields.values())
        if trace := getattr(record, "trace", None):
            record.exc_text = trace
        return True


def text_of(value: object) -> str:
    """A field's value in a line of text: in quotes where a reader would lose the thread."""
    text = ",".join(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else str(value)
    if re.fullmatch(r"[^\s\"=]+", text) and text.isprintable():
        return text
    # What a terminal might obey is \u009b and the like: of what isn't printable, JSON escapes only the beginning.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))
