"""An embedded PostgreSQL on a slower disk: 1 ms more for each fsync, about what a cloud's network disk takes.

A small library does that, built here and preloaded into the server: the embedded server hands LD_PRELOAD down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from notifyq.embedded import Server

from .common import SERVER

SOURCE = Path(__file__).with_name("slow_fsync.c")
EXTRA_NS = 1_000_000


def missing() -> str | None:
    """Why there can't be one here."""
    if sys.platform != "linux":
        return "it needs Linux"
    if not shutil.which("cc"):
        return "it needs a C compiler, called cc"
    return None


@contextmanager
def slow_server() -> Generator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "slow_fsync.so"
        build = ["cc", "-shared", "-fPIC", "-O2", f"-DEXTRA_NS={EXTRA_NS}", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(build, check=True)
        for path in (Path(folder), library):  # root's server runs as another user
            path.chmod(0o755)
        before = os.environ.get("LD_PRELOAD")
        server = Server(durable=True, settings=SERVER | {"wal_sync_method": "fdatasync"})
        try:
            os.environ["LD_PRELOAD"] = f"{library}:{before}" if before else str(library)
            server.start()
        finally:
            os.environ.pop("LD_PRELOAD")
            if before is not None:
                os.environ["LD_PRELOAD"] = before
        with server:
            yield server
