"""A TCP proxy between a worker and its server that does to connections what networks do, by what a connection is for.

Each connection tells its role when it starts: notifyq's have it in their application_name ("claims 7", "bell 7",
"settle", "heartbeat 7", "app"). Faults take a pattern of roles, and hit the connections that are open then. A
connection that is opened later is well."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fnmatch import fnmatch
from urllib.parse import urlsplit

import anyio

from .machine import limit

CHUNK = 65536


class Link:
    """One connection through the proxy. What is set here takes effect with the next bytes."""

    def __init__(self, role: str, worker: Half, server: Half) -> None:
        self.role = role
        self.ends = (worker, server)
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.vanishes = False  # both ways, the end of the connection too
        self.delay = 0.0  # seconds, each way
        self.rate = 0.0  # bytes a second, each way; 0: as they come
        self.resets_after: int | None = None  # bytes of what the server sends
        self.born = time.monotonic()
        self.closed = False

    async def pump(self, source: Half, sink: Half) -> None:
        """Carry bytes one way until there are no more."""
        try:
            while data := await source.reader.read(CHUNK):
                await self.flowing.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.vanishes:
                    continue
                if self.resets_after is not None and source is self.ends[1]:
                    sink.writer.write(data[: self.resets_after])
                    await sink.writer.drain()
                    self.resets_after -= len(data)
                    if self.resets_after <= 0:
                        self.close(reset=True)
                        return
                    continue
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
                sink.writer.write(data)
                await sink.writer.drain()
        except OSError:
            pass
        await self.flowing.wait()
        if not self.vanishes:
            self.close()

    def close(self, reset: bool = False) -> None:
        self.closed = True
        self.flowing.set()
        for end in self.ends:
            if reset and not end.writer.transport.is_closing():
                linger = struct.pack("ii", 1, 0)
                end.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                end.writer.transport.abort()
            else:
                end.writer.close()


class Half:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer


class Proxy:
    """`dsn` leads through it to the server on `port` of this host."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.port = 0
        self.links: list[Link] = []
        self.rates: dict[str, float] = {}  # bytes a second of connections that are opened later, by patterns of roles
        self._changed = asyncio.Event()

    def dsn(self, dsn: str) -> str:
        return urlsplit(dsn)._replace(netloc=f"notifyq@127.0.0.1:{self.port}").geturl()

    def open(self, roles: str) -> list[Link]:
        return [link for link in self.links if fnmatch(link.role, roles) and not link.closed and not link.vanishes]

    # Faults. Each returns how many connections it has hit.

    def cut(self, roles: str) -> int:
        """Both ends are closed."""
        return self._each(roles, Link.close)

    def reset(self, roles: str) -> int:
        """Both ends get a RST."""
        return self._each(roles, lambda link: link.close(reset=True))

    def reset_in_result(self, roles: str, after: int = 20) -> int:
        """Both ends get a RST when that many more bytes have come from the server."""
        return self._set(roles, "resets_after", after)

    def half_open(self, roles: str) -> int:
        """From now on what either end sends vanishes, and so does its close. The other end is still there and
        acknowledges: its kernel's keepalive finds nothing."""
        return self._set(roles, "vanishes", True)

    def delay(self, roles: str, seconds: float) -> int:
        return self._set(roles, "delay", seconds)

    def throttle(self, roles: str, bytes_per_second: float) -> int:
        return self._set(roles, "rate", bytes_per_second)

    def stall(self, roles: str) -> int:
        return self._each(roles, lambda link: link.flowing.clear())

    def resume(self, roles: str) -> int:
        return self._each(roles, lambda link: link.flowing.set())

    def _set(self, roles: str, name: str, value: object) -> int:
        return self._each(roles, lambda link: setattr(link, name, value))

    def _each(self, roles: str, hit: Callable[[Link], None]) -> int:
        links = self.open(roles)
        for link in links:
            hit(link)
        return len(links)

    async def new(self, roles: str, since: float) -> float:
        """Wait for a connection that was opened after `since`. Returns how long after."""
        with anyio.fail_after(limit()):
            while True:
                for link in self.open(roles):
                    if link.born > since:
                        return link.born - since
                self._changed.clear()
                await self._changed.wait()

    # Connections.

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await reader.readexactly(4)
            first += await reader.readexactly(int.from_bytes(first, "big") - 4)
        except (asyncio.IncompleteReadError, OSError):
            writer.close()
            return
        try:
            server = Half(*await asyncio.open_connection("127.0.0.1", self._port))
        except OSError:
            writer.close()
            return
        server.writer.write(first)
        link = Link(_role(first), Half(reader, writer), server)
        link.rate = next((rate for roles, rate in self.rates.items() if fnmatch(link.role, roles)), 0.0)
        self.links.append(link)
        self._changed.set()
        await asyncio.gather(link.pump(*link.ends), link.pump(*reversed(link.ends)))


def _role(startup: bytes) -> str:
    """The role in a startup packet: int32 length, int32 version, and names and values that NULs end."""
    if int.from_bytes(startup[4:8], "big") != 3 << 16:
        return "cancel"
    words = startup[8:].split(b"\0")
    values = dict(zip(words[::2], words[1::2], strict=False))
    return values.get(b"application_name", b"").decode().removeprefix("notifyq ")


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    """A proxy that is there inside of the block."""
    proxy, carrying = Proxy(port), set[asyncio.Task[None]]()

    def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(proxy._carry(reader, writer))
        carrying.add(task)
        task.add_done_callback(carrying.discard)

    listening = await asyncio.start_server(carry, "127.0.0.1", 0)
    proxy.port = listening.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listening.close()
        for link in proxy.links:
            link.close()
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
