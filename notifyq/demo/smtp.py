"""A mail server on loopback. It is slow, it refuses some mails, and it counts both kinds."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from typing import Self

from aiosmtpd.smtp import SMTP, Envelope, Session


class MailServer:
    """`received` and `refused` count mails by the key in their Message-ID."""

    def __init__(self, refuse: float = 0.08, seconds: tuple[float, float] = (0.04, 0.2)) -> None:
        self.refuse = refuse  # the share of deliveries that it refuses
        self.seconds = seconds  # how long a delivery takes: as on a real server, so that workers hold some tasks
        self.received, self.refused = Counter[str](), Counter[str]()
        self.port = 0

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        found = re.search(rb"^Message-ID: <(.+)@", envelope.content, re.MULTILINE | re.IGNORECASE)
        if found is None:
            return "550 5.6.0 a mail has a Message-ID"
        key = found[1].decode()
        if random.random() < self.refuse:
            self.refused[key] += 1
            return "451 4.7.1 too busy, come back later"
        self.received[key] += 1
        # A client that dies during this pause doesn't know that the mail was received, and its task sends it again.
        await asyncio.sleep(random.uniform(*self.seconds))
        return "250 2.0.0 OK"

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[Self, None]:
        """Listen on a port that the system chooses."""
        logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # aiosmtpd logs each connection, and each broken one
        loop = asyncio.get_running_loop()
        # With a hostname given, aiosmtpd doesn't ask the DNS for one.
        listener = await loop.create_server(lambda: SMTP(self, hostname="localhost"), "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        with closing(listener):  # it doesn't wait for connections that a killed worker has left
            yield self
