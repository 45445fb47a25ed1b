"""A client that knows nothing of notifyq but its table: psql, fed as by somebody at its prompt."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator

from notifyq.database.connection import connect
from notifyq.database.dsn import for_libpq, pairs_of
from notifyq.embedded import find_binaries
from notifyq.errors import EmbeddedError, NotifyqError

from .processes import Children


async def insert_by_psql(children: Children, psql: str, dsn: str, statements: AsyncIterator[str]) -> int:
    """Run the INSERTs, each as it comes. Returns how many psql confirmed."""
    url, environment = without_password(dsn)
    argv = [psql, "-X", "-v", "ON_ERROR_STOP=1", url]
    child = await children.start("psql", argv, talk=True, environment=environment)
    prompt, answers = child.process.stdin, child.process.stdout
    assert prompt is not None
    assert answers is not None
    async for statement in statements:
        await prompt.send(f"{statement};\n".encode())
    await prompt.aclose()
    said = b"".join([chunk async for chunk in answers])
    if await child.process.wait() != 0:
        raise NotifyqError(f"psql failed:\n{child.said()}")
    return said.count(b"INSERT 0 1")


async def insert_by_driver(dsn: str, statements: AsyncIterator[str]) -> int:
    """The same where there is no psql."""
    conn = await connect(dsn, role="demo")
    try:
        return sum([await conn.execute(statement) == "INSERT 0 1" async for statement in statements])
    finally:
        await conn.close()


def find_psql() -> str | None:
    """A psql that runs: beside the embedded server's programs, or on PATH."""
    candidates = [shutil.which("psql")]
    try:
        candidates.insert(0, str(find_binaries().bin_dir / "psql"))
    except EmbeddedError:
        pass  # with a server of one's own there need not be any
    for psql in filter(None, candidates):
        try:
            subprocess.run([psql, "--version"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return psql
    return None


def without_password(dsn: str) -> tuple[str, dict[str, str]]:
    """The DSN as an argument, which other users of the machine can see, and its password as a variable."""
    parameters = for_libpq(dsn)
    password = parameters.pop("password", None)
    return pairs_of(parameters), {} if password is None else {"PGPASSWORD": password}
