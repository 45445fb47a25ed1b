"""The worker processes. Each has a place; when a process ends, another takes its place, as a supervisor would see to.

A process logs in as a role of its own, w1, w2, ...: so the server's views and the ledger tell which process a session
belongs to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from ..helpers import machine
from .history import Process

PROJECT = Path(__file__).parent.parent.parent
SHUTDOWN_SECONDS = 3.0
LEASE_SECONDS = 6.0
THREADS = 8
QUEUES: dict[str, int | None] = {"default": None, "mail": None, "narrow": 8}


class Place(msgspec.Struct):
    """What runs in this place."""

    queues: dict[str, int | None]
    concurrency: int
    cli: bool  # the command, with its lease of 30 s, or our program, with one of 6 s


PLACES = (
    Place(QUEUES, 40, cli=True),
    Place(QUEUES, 40, cli=False),
    Place(QUEUES, 60, cli=False),
    Place({"default": None, "mail": None}, 40, cli=True),  # another fleet: it has a turn of its own
)


class Member:
    """A process that runs, or has run."""

    def __init__(self, place: Place, process: asyncio.subprocess.Process, seen: Process) -> None:
        self.place = place
        self.seen = seen
        self._process = process
        self.ended = asyncio.Event()

    @property
    def who(self) -> str:
        return self.seen.who

    @property
    def alive(self) -> bool:
        return self.seen.ended is None and self.seen.killed is None

    def signal(self, number: int) -> None:
        if self.seen.ended is not None:
            return
        if number == signal.SIGTERM and self.seen.told is None:
            self.seen.told = time.time()
        if number == signal.SIGKILL:
            self.seen.killed = time.time()
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            pass  # it has just ended by itself

    async def watch(self) -> None:
        self.seen.code = await self._process.wait()
        self.seen.ended = time.time()
        self.ended.set()


class Fleet:
    def __init__(self, dsn: str, folder: Path, role: Callable[[str], Awaitable[None]], project: Path) -> None:
        self._dsn = dsn
        self._folder = folder
        self._role = role
        self._project = project
        self._number = 0
        self._closing = asyncio.Event()
        self.all: list[Member] = []

    @property
    def members(self) -> list[Member]:
        """The processes that work, and weren't told to stop."""
        return [member for member in self.all if member.alive and member.seen.told is None]

    def named(self, who: str) -> Member | None:
        return next((member for member in self.members if member.who == who), None)

    async def keep(self, place: Place) -> None:
        """Keep a process at work in that place."""
        while not self._closing.is_set():
            member = await self._start(place)
            if self._closing.is_set():  # meanwhile
                member.signal(signal.SIGTERM)
            await member.watch()
            if member.seen.code == 3:
                await asyncio.sleep(0.3)  # there is no database at the moment

    async def close(self) -> None:
        """Stop them all, in order, and kill those that don't end."""
        self._closing.set()
        for member in self.all:
            member.signal(signal.SIGCONT)
            if member.seen.told is None:
                member.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(machine.limit(SHUTDOWN_SECONDS + 15)):
                for member in self.all:
                    await member.ended.wait()
        except TimeoutError:
            pass  # the checker will say so
        finally:
            for member in self.all:
                if member.seen.ended is None:
                    member.signal(signal.SIGKILL)

    async def _start(self, place: Place) -> Member:
        self._number += 1
        who = f"w{self._number}"
        await self._role(who)
        dsn = self._dsn.replace("//notifyq@", f"//{who}@", 1)
        options: dict[str, Any] = {
            "shutdown_timeout": SHUTDOWN_SECONDS,
            "concurrency": place.concurrency,
            "threads": THREADS,
        }
        if place.cli:
            argv = ["-m", "notifyq", "worker", "tests.chaos.app:app"]
            for queue, limit in place.queues.items():
                argv += ["--queue", queue if limit is None else f"{queue}:{limit}"]
            for name, value in options.items():
                argv += [f"--{name.replace('_', '-')}", str(value)]
            # Not as an argument: this is what the environment is for.
        else:
            argv = ["-m", "tests.chaos.worker", dsn]
            argv.append(json.dumps({**options, "queues": place.queues, "lease": LEASE_SECONDS}))
        environment = {**os.environ, "CHAOS_WHO": who, "CHAOS_EVENTS": str(self._folder), "NOTIFYQ_DSN": dsn}
        with open(self._folder / f"{who}.log", "wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *argv, cwd=self._project, env=environment, stdout=log, stderr=log
            )
        seen = Process(
            who=who, started=time.time(), queues=place.queues, concurrency=place.concurrency, threads=THREADS
        )
        member = Member(place, process, seen)
        self.all.append(member)
        return member
