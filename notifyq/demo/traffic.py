"""All that enqueue: people at the web application, psql, a schedule, a COPY, and a client that makes mistakes."""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import anyio
import httpx

from notifyq import NotifyqError

from .app import ExpireKey, app
from .check import COPIED, Facts
from .database import Database, find_psql, libpq_variables

CROWD = 30  # signups at the same moment

# Rows that none of the clients below writes, but that any client of PostgreSQL may write.
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


class Plan(NamedTuple):
    """How many tasks come from where. Of `requests` to the web application, it turns a tenth away."""

    requests: int
    by_psql: int
    scheduled: int
    copied: int


def make_plan(seconds: float, tasks: int) -> Plan:
    """About `tasks` in all: single ones at the pace of people, and the rest in the COPY."""
    requests = min(tasks // 4, int(40 * seconds))
    by_psql = min(tasks // 20, int(2 * seconds))
    scheduled = min(tasks // 20, int(10 * seconds))
    return Plan(requests, by_psql, scheduled, copied=tasks - requests - by_psql - scheduled)


@dataclass
class Traffic:
    """It goes on for `seconds` from when this is made. Each client counts in `facts` what was confirmed to it."""

    db: Database
    http: httpx.AsyncClient
    facts: Facts
    plan: Plan
    seconds: float
    say: Callable[[str], None]
    began: float = field(default_factory=anyio.current_time)
    emails: list[str] = field(default_factory=list[str])  # of the users who have signed up

    async def at(self, share: float) -> None:
        """Wait until this share of the time is over."""
        await anyio.sleep_until(self.began + share * self.seconds)

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
        answer = await self.post("/signup", email, 201, 409)
        if answer.status_code == 409:
            self.facts.turned_away += 1
            return
        self.emails.append(email)
        self.facts.signed_up.add(answer.json()["id"])
        self.facts.enqueued["SEND_VERIFICATION_EMAIL"] += 1

    async def forget_password(self) -> None:
        await self.post("/forgot-password", random.choice(self.emails), 202)
        self.facts.enqueued["SEND_FORGOT_PASSWORD_EMAIL"] += 1

    async def post(self, path: str, email: str, *expected: int) -> httpx.Response:
        answer = await self.http.post(path, json={"email": email})
        if answer.status_code not in expected:
            raise NotifyqError(f"POST {path} was answered {answer.status_code}: {answer.text[:300]}")
        return answer

    async def use_psql(self) -> None:
        """A client that knows nothing of notifyq but its table."""
        psql = find_psql()
        environment = {**os.environ, **libpq_variables(self.db.url)}
        for number in range(self.plan.by_psql):
            await self.at(number / self.plan.by_psql)
            payload = json.dumps({"email": "psql@example.org", "reset_key": f"psql-{number}"})
            # As a person types it at a prompt; all that is put into it is the demo's own.
            values = f"('{self.db.queue}', 'SEND_FORGOT_PASSWORD_EMAIL', '{payload}')"
            insert = f"INSERT INTO notifyq.task (queue, type, payload) VALUES {values}"  # noqa: S608
            if psql is None:
                await self.db.pool.execute(insert)
            else:
                ran = await anyio.run_process([psql, "-Xc", insert], check=False, env=environment)
                if ran.returncode:
                    raise NotifyqError(f"psql failed: {ran.stderr.decode(errors='replace')}")
            self.facts.enqueued["SEND_FORGOT_PASSWORD_EMAIL"] += 1
        self.say(f"{self.plan.by_psql} INSERTs by {psql or 'a plain connection, as this machine has no psql'}")

    async def schedule(self) -> None:
        """Tasks that become due one after the other, the last at the end."""
        for number in range(self.plan.scheduled):
            delay = self.seconds * (0.05 + 0.95 * number / self.plan.scheduled)
            ref = await app.enqueue(ExpireKey(key=uuid.uuid4().hex), queue=self.db.queue, delay=delay)
            self.facts.scheduled.add(ref.id)
            self.facts.enqueued["EXPIRE_KEY"] += 1
        self.say(f"{self.plan.scheduled} tasks scheduled, up to {self.seconds:.0f} s ahead")

    async def copy(self) -> None:
        """Tasks from elsewhere, by COPY FROM STDIN."""
        emails = [json.dumps({"email": f"{number}@example.org"}) for number in range(self.plan.copied)]
        self.facts.copied_at = await self.db.pool.fetchval("SELECT clock_timestamp()")
        await self.db.pool.copy_records_to_table(
            "task",
            schema_name="notifyq",
            columns=["queue", "type", "payload", "priority"],
            records=[
                (self.db.queue, COPIED, email, -10) for email in emails
            ],  # the mails' priority is 0: they go first
        )
        self.facts.enqueued[COPIED] += self.plan.copied
        self.say(f"{self.plan.copied:,} tasks by COPY")

    async def make_mistakes(self) -> None:
        insert = "INSERT INTO notifyq.task (queue, type, payload) VALUES ($1, $2, $3) RETURNING id"
        for type, payload in MALFORMED:
            self.facts.malformed.add(await self.db.pool.fetchval(insert, self.db.queue, type, json.dumps(payload)))
            self.facts.enqueued[type] += 1
        self.say(f"{len(MALFORMED)} malformed rows")
