"""All clients that enqueue: people at the web application, psql, a schedule, a COPY, one that makes mistakes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import asyncpg
import httpx

from notifyq.embedded import find_binaries
from notifyq.errors import EmbeddedError

from .app import ExpireKey, app
from .check import COPIED, Facts

CROWD = 30  # signups at the same moment

NOBODY = {"id": str(uuid.UUID(int=0)), "email": "nobody@example.org"}
MALFORMED: tuple[tuple[str, Any], ...] = (
    ("SEND_VERIFICATION_EMAIL", [1, 2, 3]),
    ("SEND_VERIFICATION_EMAIL", "just text"),
    ("SEND_VERIFICATION_EMAIL", None),
    ("SEND_VERIFICATION_EMAIL", {}),
    ("SEND_VERIFICATION_EMAIL", {"user": NOBODY}),
    ("SEND_VERIFICATION_EMAIL", {"user": {**NOBODY, "id": 7}, "verification_key": "wrong-type"}),
    ("SEND_VERIFICATION_EMAIL", {"user": {**NOBODY, "is_admin": True}, "verification_key": "unknown-field"}),
    ("SEND_FORGOT_PASSWORD_EMAIL", {"email": "not an address", "reset_key": "broken-constraint"}),
    ("SEND_FORGOT_PASSWORD_EMAIL", {"email": "a@example.org", "reset_key": {"not": ["text"]}}),
    ("DRAW_AVATAR", {"email": "a@example.org", "size": 1e300}),
    ("EXPIRE_KEY", {"key": None}),
)


class Plan:
    """How long there is traffic, and how many tasks each client enqueues: the first three one by one, COPY the rest."""

    def __init__(self, seconds: float, tasks: int) -> None:
        self.seconds = seconds
        self.requests = min(tasks // 4, int(40 * seconds))  # to the web application, which turns a tenth away
        self.by_psql = min(tasks // 20, int(2 * seconds))
        self.scheduled = min(tasks // 20, int(10 * seconds))
        self.copied = tasks - self.requests - self.by_psql - self.scheduled


@dataclass
class Traffic:
    """The clients. Their time begins when this is made. Each counts in `facts` the tasks that were confirmed to it."""

    pool: asyncpg.Pool[asyncpg.Record]
    http: httpx.AsyncClient
    facts: Facts
    plan: Plan
    say: Callable[[str], None]
    began: float = field(default_factory=anyio.current_time)
    emails: list[str] = field(default_factory=list[str])  # of the users who have signed up

    async def at(self, share: float) -> None:
        """Wait until this share of the time is over."""
        await anyio.sleep_until(self.began + share * self.plan.seconds)

    async def visit(self) -> None:
        """People sign up. Some forget their password, and some forget that they have signed up before."""
        async with anyio.create_task_group() as visitors:
            for number in range(self.plan.requests):
                await self.at(number / self.plan.requests)
                match number % 10:
                    case 2 | 5 | 7:
                        visitors.start_soon(self.forget_password)
                    case 9:
                        visitors.start_soon(self.sign_up, random.choice(self.emails))
                    case _:
                        visitors.start_soon(self.sign_up)

    async def crowd(self) -> None:
        """Many people sign up at the same moment."""
        async with anyio.create_task_group() as visitors:
            for _ in range(CROWD):
                visitors.start_soon(self.sign_up)

    async def sign_up(self, known: str | None = None) -> None:
        email = known or f"{uuid.uuid4().hex[:12]}@example.org"
        answer = await self.http.post("/signup", json={"email": email})
        if answer.status_code == 409:
            self.facts.turned_away += 1
            return
        self.facts.signed_up.add(answer.raise_for_status().json()["id"])
        self.facts.enqueued["SEND_VERIFICATION_EMAIL"] += 1
        self.emails.append(email)

    async def forget_password(self) -> None:
        answer = await self.http.post("/forgot-password", json={"email": random.choice(self.emails)})
        answer.raise_for_status()
        self.facts.enqueued["SEND_FORGOT_PASSWORD_EMAIL"] += 1

    async def use_psql(self) -> None:
        """Enqueue by psql: a client that knows nothing of notifyq but its table."""
        psql = find_psql()
        for number in range(self.plan.by_psql):
            await self.at(number / self.plan.by_psql)
            payload = json.dumps({"email": "psql@example.org", "reset_key": f"psql-{number}"})
            values = f"('SEND_FORGOT_PASSWORD_EMAIL', '{payload}')"  # as typed at its prompt; no value is from outside
            insert = f"INSERT INTO notifyq.task (type, payload) VALUES {values}"  # noqa: S608
            if psql is None:
                await self.pool.execute(insert)
            else:
                await anyio.run_process([psql, "-Xc", insert], stderr=None)
            self.facts.enqueued["SEND_FORGOT_PASSWORD_EMAIL"] += 1
        self.say(f"{self.plan.by_psql} INSERTs by {psql or 'a plain connection, as this machine has no psql'}")

    async def schedule(self) -> None:
        """Enqueue tasks that become due one after the other, the last one at the end."""
        for number in range(self.plan.scheduled):
            delay = self.plan.seconds * (0.05 + 0.95 * number / self.plan.scheduled)
            ref = await app.enqueue(ExpireKey(key=uuid.uuid4().hex), delay=delay)
            self.facts.scheduled.add(ref.id)
            self.facts.enqueued["EXPIRE_KEY"] += 1
        self.say(f"{self.plan.scheduled} tasks scheduled, up to {self.plan.seconds:.0f} s ahead")

    async def copy(self) -> None:
        """Enqueue many tasks by one COPY FROM STDIN."""
        payloads = [json.dumps({"email": f"{number}@example.org"}) for number in range(self.plan.copied)]
        self.facts.copied_at = await self.pool.fetchval("SELECT clock_timestamp()")
        await self.pool.copy_records_to_table(
            "task",
            schema_name="notifyq",
            columns=["type", "payload", "priority"],
            records=[(COPIED, payload, -10) for payload in payloads],  # mails have priority 0, so they go first
        )
        self.facts.enqueued[COPIED] += self.plan.copied
        self.say(f"{self.plan.copied:,} tasks by COPY")

    async def make_mistakes(self) -> None:
        """Insert rows that PostgreSQL accepts, and that no handler can take."""
        insert = "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2) RETURNING id"
        for type, payload in MALFORMED:
            self.facts.malformed.add(await self.pool.fetchval(insert, type, json.dumps(payload)))
            self.facts.enqueued[type] += 1
        self.say(f"{len(MALFORMED)} malformed rows")


def find_psql() -> str | None:
    """A psql that runs: beside the embedded server's programs, or on PATH."""
    folders = os.environ.get("PATH", os.defpath)
    try:
        folders = f"{find_binaries().bin_dir}{os.pathsep}{folders}"
    except EmbeddedError:
        pass  # with --dsn this machine may have no server's programs
    psql = shutil.which("psql", path=folders)
    if psql is None or subprocess.run([psql, "--version"], capture_output=True, check=False).returncode:
        return None
    return psql
