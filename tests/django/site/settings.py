"""Settings of a project on the database of NOTIFYQ_DSN, a DSN of the embedded server."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qs, urlsplit

_url = urlsplit(os.environ["NOTIFYQ_DSN"])
_where = parse_qs(_url.query)

SECRET_KEY = "x"
USE_TZ = True
INSTALLED_APPS = ["tests.django.site"]
DATABASES: dict[str, dict[str, Any]] = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path.strip("/"),
        "USER": _url.username,
        "HOST": _where["host"][0],
        "PORT": _where["port"][0],
    },
    "lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
DATABASES["beside"] = {**DATABASES["default"], "OPTIONS": {"server_side_binding": True}}
TASKS = {
    "default": {"BACKEND": "notifyq.django.TaskBackend", "QUEUES": ["default", "mail"]},
    "once": {
        "BACKEND": "notifyq.django.TaskBackend",
        "OPTIONS": {"max_attempts": 1, "backoff": 0.5, "timeout": 60, "database": "beside"},
    },
}
