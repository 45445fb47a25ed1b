"""A queue, through its driver: a program that knows the commands of kit/kit.py, in an environment of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from notifyq.embedded import Server

from .environments import HERE, driver

COMMAND_SECONDS = 120.0  # the longest that any command may take


class PeerError(Exception):
    """It did not do what it was asked to; says what, with the end of what it printed."""


class About(msgspec.Struct):
    """What a driver says of itself."""

    version: str
    runtime: str
    settings: dict[str, dict[str, Any]]  # by mode
    tasks: dict[str, int]  # by mode: how many a drain gets
    left: str  # SQL: how many are not durably done
    failed: str  # SQL: how many ended otherwise


@dataclass
class Peer:
    """One of them, on a server."""

    name: str
    server: Server
    command: list[str] = field(default_factory=list)
    about: About = field(init=False)

    async def start(self) -> None:
        """Make its environment, and a template of its database for each mode. Raises NoEnvironment or PeerError."""
        self.command = driver(self.name)
        self.about = msgspec.convert(await self.call("about"), About)
        for mode in self.about.settings:
            await self._sql(f'CREATE DATABASE "{self.name} {mode}"')
            await self.call("setup", self.server.dsn(f"{self.name} {mode}"), mode)

    async def call(self, *args: object) -> Any:
        """Run a command; its answer. Raises PeerError."""
        async with self._process(*args, stdout=asyncio.subprocess.PIPE) as (process, log):
            try:
                output, _ = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
            except TimeoutError:
                raise PeerError(f"{args[0]}: not done after {COMMAND_SECONDS:g} s; {tail(log)}") from None
            if process.returncode != 0:
                raise PeerError(f"{args[0]}: exit code {process.returncode}; {tail(log)}")
            return msgspec.json.decode(output.splitlines()[-1])

    @asynccontextmanager
    async def database(self, mode: str) -> AsyncGenerator[str]:
        """A fresh database: its DSN; dropped at the end."""
        await self._sql(f'CREATE DATABASE measured TEMPLATE "{self.name} {mode}"')
        await self._sql("CHECKPOINT")  # its writes are no part of what follows
        try:
            yield self.server.dsn("measured")
        finally:
            await self._sql("DROP DATABASE measured WITH (FORCE)")

    @asynccontextmanager
    async def working(self, dsn: str, mode: str) -> AsyncGenerator[Worker]:
        """A worker process, started when this begins, and ended."""
        async with self._process("work", dsn, mode, stdout=asyncio.subprocess.DEVNULL) as (process, log):
            yield Worker(process, log)

    @asynccontextmanager
    async def _process(self, *args: object, stdout: int) -> AsyncGenerator[tuple[asyncio.subprocess.Process, Path]]:
        environ = os.environ | {"PYTHONPATH": str(HERE / "kit"), "PYTHONDONTWRITEBYTECODE": "1"}
        with tempfile.NamedTemporaryFile() as log:
            process = await asyncio.create_subprocess_exec(
                *self.command, *map(str, args), env=environ, stdout=stdout, stderr=log, start_new_session=True
            )
            try:
                yield process, Path(log.name)
            finally:
                await end(process)

    async def _sql(self, statement: str) -> None:
        conn = await asyncpg.connect(self.server.dsn())
        await conn.execute(statement)
        await conn.close()


@dataclass
class Worker:
    """A worker process."""

    process: asyncio.subprocess.Process
    log: Path

    def check(self) -> None:
        """Raise PeerError if it has ended."""
        if self.process.returncode is not None:
            raise PeerError(f"work: exit code {self.process.returncode}; {tail(self.log)}")


async def end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and after 5 s SIGKILL, to the process and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            await asyncio.wait_for(process.wait(), 5)
        except (ProcessLookupError, TimeoutError):
            continue


def tail(log: Path) -> str:
    return "it printed: " + (log.read_text(errors="replace").strip()[-600:] or "nothing")
