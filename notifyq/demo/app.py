"""The tasks and their handlers, all that a user writes. Run by `notifyq worker notifyq.demo.app:app`."""

from __future__ import annotations

import hashlib
import os
import uuid
from email.message import EmailMessage
from typing import Annotated

import aiosmtplib
import msgspec

import notifyq

SMTP_PORT = int(os.environ.get("DEMO_SMTP_PORT", "25"))
QUEUE = os.environ.get("DEMO_QUEUE", "default")

app = notifyq.App()

Email = Annotated[str, msgspec.Meta(pattern=r"^[^@\s]+@[^@\s]+$")]


class User(msgspec.Struct, forbid_unknown_fields=True):
    id: uuid.UUID
    email: Email


class MailTask(notifyq.Task):
    """What the tasks that send mail have in common. Not a task itself, as no handler takes it."""

    backoff = 0.2  # seconds; the default of 2 is right for a real mail server
    timeout = 20.0


class SendVerificationEmail(MailTask, tag="SEND_VERIFICATION_EMAIL"):
    user: User
    verification_key: str


class SendForgotPasswordEmail(MailTask, tag="SEND_FORGOT_PASSWORD_EMAIL"):
    email: Email
    reset_key: str


class ExpireKey(notifyq.Task, tag="EXPIRE_KEY"):
    """Enqueued with a delay: a key that nobody used is worth nothing after a while."""

    key: str


class DrawAvatar(notifyq.Task, tag="DRAW_AVATAR"):
    email: Email
    size: Annotated[int, msgspec.Meta(ge=1, le=16)] = 5


@app.handler
async def send_verification_email(task: SendVerificationEmail, ctx: notifyq.Context) -> None:
    await send(task.user.email, task.verification_key, f"Confirm your address (try {ctx.attempt})")


@app.handler
async def send_forgot_password_email(task: SendForgotPasswordEmail) -> None:
    await send(task.email, task.reset_key, "Choose a new password")


@app.handler
async def expire_key(task: ExpireKey) -> str:
    return f"{task.key} has expired"  # what a handler returns is kept as the task's result


@app.handler
def draw_avatar(task: DrawAvatar) -> list[str]:
    """A plain function: it runs in a thread, and may compute or block."""
    bits = int.from_bytes(hashlib.sha256(task.email.encode()).digest(), "big")
    rows = [f"{bits >> (row * task.size):0{task.size}b}"[-task.size :] for row in range(task.size)]
    return [row.translate({48: " ", 49: "#"}) for row in rows]


async def send(to: str, key: str, subject: str) -> None:
    """Raises when the mail server refuses, and then notifyq tries again later.

    A worker that dies between the server's "250 OK" and its own "done" leaves a task that runs again, and
    a mail that goes twice: tasks run at least once. So a mail is named after its task's key, and whoever
    gets two can tell.
    """
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "hello@demo.example", to, subject
    mail["Message-ID"] = f"<{key}@demo.example>"
    mail.set_content(f"Follow this link: https://demo.example/{key}")
    await aiosmtplib.send(mail, hostname="127.0.0.1", port=SMTP_PORT, local_hostname="localhost")
