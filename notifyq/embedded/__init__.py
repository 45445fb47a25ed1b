"""A PostgreSQL of our own for `notifyq demo`, `notifyq dev` and the tests: found, started, never left behind.

Nothing else in notifyq imports this; production has a server already. It is a folder in a flat package, being
the one part that has nothing to do with tasks, and that can be read, or replaced, by itself:

    binaries  which PostgreSQL of this machine to run
    account   who runs it: not root, whom PostgreSQL refuses
    folders   what is on disk, whose it is, and what the dead left there
    server    start, stop, restart
"""

import sys

from notifyq.errors import EmbeddedError

if sys.platform == "win32":
    raise EmbeddedError("the embedded PostgreSQL runs on Linux and macOS; here, name a server with --dsn")

from .binaries import Binaries, find_binaries
from .server import Server, StopMode

__all__ = ["Binaries", "Server", "StopMode", "find_binaries"]
