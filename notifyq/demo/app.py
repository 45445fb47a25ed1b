"""The tasks and their handlers: all that a user writes. Run by `notifyq worker notifyq.demo.app:app`."""

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

Email = Annotated[str, msgspec.Meta(pattern=r"^[^@\s]+@[^@\s]+$")]

app = notifyq.App()


class User(msgspec.Struct, forbid_unknown_fields=True):
    id: uuid.UUID
    email: Email


class DemoTask(notifyq.Task):
    """The settings that all tasks here share. It has no handler, so no task is of this class itself."""

    backoff = 0.2  # seconds; the default of 2 suits a real mail server
    timeout = 20.0


class SendVerificationEmail(DemoTask, tag="SEND_VERIFICATION_EMAIL"):
    user: User
    verification_key: str


class SendForgotPasswordEmail(DemoTask, tag="SEND_FORGOT_PASSWORD_EMAIL"):
    email: Email
    reset_key: str


class ExpireKey(DemoTask, tag="EXPIRE_KEY"):
    """Enqueued with a delay: a key is valid for a limited time."""

    key: str


class DrawAvatar(DemoTask, tag="DRAW_AVATAR"):
    email: Email
    size: Annotated[int, msgspec.Meta(ge=1, le=16)] = 5


@app.handler
async def send_verification_email(task: SendVerificationEmail, ctx: notifyq.Context) -> None:
    await send(task.user.email, task.verification_key, f"Confirm your address (attempt {ctx.attempt})")


@app.handler
async def send_forgot_password_email(task: SendForgotPasswordEmail) -> None:
    await send(task.email, task.reset_key, "Choose a new password")


@app.handler
async def expire_key(task: ExpireKey) -> str:
    return f"{task.key} has expired"  # notifyq keeps what a handler returns, as the task's result


@app.handler
def draw_avatar(task: DrawAvatar) -> list[str]:
    """A plain function runs in a thread, so it may block."""
    bits = int.from_bytes(hashlib.sha256(task.email.encode()).digest(), "big")
    rows = [f"{bits >> (row * task.size):0{task.size}b}"[-task.size :] for row in range(task.size)]
    return [row.translate({48: " ", 49: "#"}) for row in rows]


async def send(to: str, key: str, subject: str) -> None:
    """Send a mail. Raises when the mail server refuses it, so that notifyq tries again later.

    Tasks run at least once. A worker may die after the server's "250 OK" and before the task is written down as done:
    then the task runs again and sends a second mail. Its Message-ID is made from the task's key, so a
    receiver sees that the two are the same mail.
    """
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "hello@demo.example", to, subject
    mail["Message-ID"] = f"<{key}@demo.example>"
    mail.set_content(f"Follow this link: https://demo.example/{key}")
    await aiosmtplib.send(mail, hostname="127.0.0.1", port=SMTP_PORT, local_hostname="localhost")
