"""A mail server on loopback. It takes its time, now and then it refuses, and it counts what it took."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiosmtpd.smtp import SMTP, Envelope, Session

SECONDS = (0.04, 0.2)  # that a mail takes, as with a server elsewhere; so a worker has some in its hands


class MailServer:
    """Mails by the key in their Message-ID: how often `received`, how often `refused`."""

    def __init__(self, refuse: float = 0.08, seconds: tuple[float, float] = SECONDS) -> None:
        self.refuse = refuse  # the share of mails that it refuses, each time anew
        self.seconds = seconds
        self.received: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
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
        # Taken, but not yet said so: a client that dies now doesn't know, and sends it again.
        await asyncio.sleep(random.uniform(*self.seconds))
        return "250 2.0.0 OK"

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[MailServer, None]:
        """Listen on a port of the system's choice."""
        logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # aiosmtpd: each connection, each broken one
        loop = asyncio.get_running_loop()
        # With a name given, nothing asks the DNS for one.
        listener = await loop.create_server(lambda: SMTP(self, hostname="localhost", loop=loop), "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
