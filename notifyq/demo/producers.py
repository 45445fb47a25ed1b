"""Those who enqueue: people at the web application, psql, a schedule, a COPY, and somebody who gets it wrong.

Each counts what it enqueued in `facts`, once that was acknowledged.
"""

from __future__ import annotations

import csv
import io
import json
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from notifyq.database.connection import Connection
from notifyq.errors import NotifyqError

from .app import ExpireKey, app
from .check import COPIED, Facts
from .database import Database
from .processes import Children
from .psql import find_psql, insert_by_driver, insert_by_psql

CROWD = 30  # signups at one moment

# Rows that no producer of ours would write, but that any client may: type and payload.
NOBODY = {"id": str(uuid.UUID(int=0)), "email": "nobody@example.org"}
MALFORMED: Sequence[tuple[str, Any]] = (
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


@dataclass(frozen=True)
class Plan:
    """How many of what: tasks, but for `requests`, a tenth of which is turned away."""

    requests: int
    by_psql: int
    scheduled: int
    copied: int

    @classmethod
    def of(cls, seconds: float, tasks: int) -> Plan:
        """About `tasks` in all: what comes singly at a person's pace, and the rest with the COPY."""
        requests = min(tasks // 4, int(40 * seconds))
        by_psql = min(tasks // 20, int(2 * seconds))
        scheduled = min(tasks // 20, int(10 * seconds))
        return cls(requests, by_psql, scheduled, copied=tasks - requests - by_psql - scheduled)


@dataclass
class Producers:
    """All of them; `seconds` is how long they go on from when `begin` was called."""

    db: Database
    children: Children
    http: httpx.AsyncClient
    facts: Facts
    plan: Plan
    seconds: float
    began: float = 0.0
    emails: list[str] = field(default_factory=list[str])  # of those who have signed up

    def begin(self) -> None:
        self.began = anyio.current_time()

    async def at(self, share: float) -> None:
        """Wait until this share of the time is over."""
        await anyio.sleep_until(self.began + share * self.seconds)

    # People.

    async def visit(self) -> None:
        """They sign up; some forget their password, and some that they have signed up already."""
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
        """Many sign up at the same moment."""
        async with anyio.create_task_group() as visitors:
            for _ in range(CROWD):
                visitors.start_soon(self.sign_up)

    async def sign_up(self, again: str | None = None) -> None:
        email = again or f"{uuid.uuid4().hex[:12]}@example.org"
        answer = await self._post("/signup", email, 201, 409)
        if answer.status_code == 409:
            self.facts.turned_away += 1
            return
        self.emails.append(email)
        self.facts.signed_up.add(answer.json()["id"])
        self.facts.enqueued["SEND_VERIFICATION_EMAIL"] += 1

    async def forget_password(self) -> None:
        await self._post("/forgot-password", random.choice(self.emails), 202)
        self.facts.enqueued["SEND_FORGOT_PASSWORD_EMAIL"] += 1

    async def _post(self, path: str, email: str, *expected: int) -> httpx.Response:
        answer = await self.http.post(path, json={"email": email})
        if answer.status_code not in expected:
            raise NotifyqError(f"POST {path} was answered {answer.status_code}: {answer.text[:300]}")
        return answer

    # Other clients.

    async def use_psql(self) -> str:
        """A client that knows nothing of notifyq but its table."""
        psql = find_psql()
        if psql:
            confirmed = await insert_by_psql(self.children, psql, self.db.dsn, self._statements())
        else:
            confirmed = await insert_by_driver(self.db.dsn, self._statements())
        self.facts.enqueued["SEND_FORGOT_PASSWORD_EMAIL"] += confirmed
        return f"{confirmed} INSERTs by {psql or 'a plain connection, as this machine has no psql'}"

    async def _statements(self) -> AsyncIterator[str]:
        for number in range(self.plan.by_psql):
            await self.at(number / self.plan.by_psql)
            payload = json.dumps({"email": "psql@example.org", "reset_key": f"psql-{number}"})
            # Glued together as at a prompt; all that is glued is ours.
            values = f"('{self.db.queue}', 'SEND_FORGOT_PASSWORD_EMAIL', '{payload}')"
            yield f"INSERT INTO notifyq.task (queue, type, payload) VALUES {values}"  # noqa: S608

    async def schedule(self) -> str:
        """Tasks that are due one after the other, up to the end."""
        for number in range(self.plan.scheduled):
            delay = self.seconds * (0.05 + 0.95 * number / self.plan.scheduled)
            ref = await app.enqueue(ExpireKey(key=uuid.uuid4().hex), queue=self.db.queue, delay=delay)
            self.facts.scheduled.add(ref.id)
            self.facts.enqueued["EXPIRE_KEY"] += 1
        return f"{self.plan.scheduled} tasks scheduled, up to {self.seconds:.0f} s ahead"

    async def copy(self, conn: Connection) -> str:
        """As from a file: COPY FROM STDIN, in CSV."""
        text = io.StringIO()
        rows = csv.writer(text)
        for number in range(self.plan.copied):
            payload = json.dumps({"email": f"{number}@example.org"})
            rows.writerow([self.db.queue, COPIED, payload, -10])  # mails go first
        self.facts.copied_at = await conn.fetchval("SELECT clock_timestamp()")
        await conn.copy_to_table(
            "task",
            schema_name="notifyq",
            columns=["queue", "type", "payload", "priority"],
            source=io.BytesIO(text.getvalue().encode()),
            format="csv",
        )
        self.facts.enqueued[COPIED] += self.plan.copied
        return f"{self.plan.copied:,} tasks by COPY"

    async def get_it_wrong(self, conn: Connection) -> str:
        insert = "INSERT INTO notifyq.task (queue, type, payload) VALUES ($1, $2, $3) RETURNING id"
        for type, payload in MALFORMED:
            id = await conn.fetchval(insert, self.db.queue, type, json.dumps(payload).encode())
            self.facts.malformed.add(id)
            self.facts.enqueued[type] += 1
        return f"{len(MALFORMED)} malformed rows"
