"""While the command line imports a user's module, that module must not start a program of its own.

A module without `if __name__ == "__main__":` would connect, or run its worker, in place of the command. So what an App
does first, connect() and run_worker(), is refused during the import.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import ConfigError

_is_loading: ContextVar[bool] = ContextVar("notifyq_loading", default=False)


@contextmanager
def loading() -> Generator[None, None, None]:
    """Inside this block `check_not_loading` raises."""
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)


def check_not_loading(what: str) -> None:
    """Raise ConfigError inside a `loading()` block. `what` is the call, for the message."""
    if _is_loading.get():
        raise ConfigError(
            f"{what} is called while this module is imported, and would run in place of the command; put what calls "
            'it under `if __name__ == "__main__":`'
        )
