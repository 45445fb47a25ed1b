"""An embedded PostgreSQL for `notifyq demo`, `notifyq dev` and tests: found on this machine, started, and cleaned up.

Only the demo, `notifyq dev`, the pytest plugin and tests import it: production has a server. It imports nothing of
notifyq but `errors` and `forked`, so it can be read by itself:

    binaries  which PostgreSQL of this machine to run
    account   the account that runs it, since PostgreSQL refuses to run as root
    folders   the files on disk, their owners, and the cleanup after killed processes
    server    start, stop, restart
"""

import sys

from notifyq.errors import EmbeddedError

if sys.platform == "win32":
    raise EmbeddedError("the embedded PostgreSQL runs on Linux and macOS; here, name a server with --dsn")

from .binaries import Binaries, find_binaries
from .server import Server, StopMode

__all__ = ["Binaries", "Server", "StopMode", "find_binaries"]
