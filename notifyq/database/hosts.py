"""Which servers a DSN leads to, and the form in which each driver takes them.

    attempts    for asyncpg: the arguments of one call for each host, in the order to try them
    conninfo    for psycopg and psql: a string of key=value
    where_of    for messages

A mistake in a DSN is a ValueError here, as in dsn.py.
"""

from __future__ import annotations

import os
import random
import re
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .dsn import DEFAULT_PORT, SOCKET_FOLDERS, VARIABLES, WITHOUT_VARIABLE, home_folder, read, url_of

TARGETS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SSL_FILES = [name for name in (*VARIABLES, "sslpassword") if name.startswith("ssl") and name != "sslmode"]

# Parameters for what asyncpg can't do: a DSN that demands it is refused. Of each, the values that don't demand it.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "require_auth": (),
    "requirepeer": (),
    "sslcertmode": ("allow",),
    "sslcrldir": (),
    "replication": ("false", "off", "no", "0"),
    **dict.fromkeys(sorted(WITHOUT_VARIABLE - {"sslpassword", "replication"}), ()),
}
CURE = {"channel_binding": "; sslmode=verify-full proves the server too"}


class Host(NamedTuple):
    """One of a DSN's servers. `host` is a name, an address, or the folder of a unix socket."""

    host: str
    address: str  # hostaddr; empty: look up the name
    port: int

    @property
    def is_socket(self) -> bool:
        return self.host.startswith("/")


class Attempt(NamedTuple):
    """One call of asyncpg.connect."""

    arguments: dict[str, Any]
    options: str  # settings for the server, as libpq's `options` has them
    timeout: float | None  # connect_timeout


def hosts(parameters: Mapping[str, str]) -> list[Host]:
    """The servers, in the order to try them. Raises ValueError."""
    names, addresses = (parameters[name].split(",") if name in parameters else [] for name in ("host", "hostaddr"))
    count = max(len(names), len(addresses))
    if names and addresses and len(names) != len(addresses):
        raise ValueError(f"it has {len(names)} hosts and {len(addresses)} hostaddrs; expected as many of both")
    ports = parameters.get("port", "").split(",")
    if len(ports) not in (1, count):
        raise ValueError(f"it has {len(ports)} ports for {count} {'host' if count == 1 else 'hosts'}")
    ports = [port.strip() or DEFAULT_PORT for port in ports] * (count if len(ports) == 1 else 1)
    if not all(re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) < 65536 for port in ports):
        raise ValueError("a port of it is no number from 1 to 65535")
    found = [
        Host((names or addresses)[i].strip() or "localhost", (addresses or [""] * count)[i].strip(), int(ports[i]))
        for i in range(count)
    ]
    balance = parameters.get("load_balance_hosts", "disable")
    if balance not in ("disable", "random"):
        raise ValueError(f"load_balance_hosts is {balance!r}; expected disable, random")
    return random.sample(found, len(found)) if balance == "random" else found


def attempts(text: str | None, environ: Mapping[str, str] = os.environ) -> list[Attempt]:
    """The calls of asyncpg.connect to try, in this order. Raises ValueError for what asyncpg can't do."""
    parameters = read(text, environ)
    for name, harmless in HARMLESS.items():
        value = parameters.get(name)
        if value is not None and value not in harmless:
            shown = "..." if "secret" in name or "key" in name else value
            also = f" or {VARIABLES[name]}" if name in VARIABLES else ""
            raise ValueError(
                f"{name}={shown} is demanded, which asyncpg, the driver here, can't do; take {name}{also} out"
                f"{CURE.get(name, '')}"
            )
    attributes = parameters.get("target_session_attrs", "any")
    if attributes not in TARGETS:
        raise ValueError(f"target_session_attrs is {attributes!r:.40}; expected one of {', '.join(TARGETS)}")
    # Two rounds, as asyncpg gets one host in each call: with prefer-standby it would accept the first, of any kind.
    wanted = ("standby", "any") if attributes == "prefer-standby" else (attributes,)
    return [_attempt(parameters, host, which) for which in wanted for host in hosts(parameters)]


def _attempt(parameters: Mapping[str, str], host: Host, attributes: str) -> Attempt:
    if host.host.startswith("@"):
        raise ValueError("it names an abstract unix socket, which asyncpg, the driver here, can't reach")
    arguments: dict[str, Any] = {
        "host": host.address or host.host,
        "port": host.port,
        "user": parameters["user"],
        "database": parameters["dbname"],
        # Never None: asyncpg would then look for a password by rules of its own.
        "password": parameters.get("password") or _password_of_file(parameters, host),
        "target_session_attrs": attributes,
        **{name: parameters[name] for name in ("krbsrvname", "gsslib") if name in parameters},
        **({"ssl": False} if host.is_socket else _ssl(parameters, host)),
    }
    timeout = parameters.get("connect_timeout", "0")
    if not re.fullmatch(r"\s*[-+]?[0-9]{1,9}\s*", timeout):
        raise ValueError(f"connect_timeout is {timeout!r:.40}; expected whole seconds")
    seconds = int(timeout)
    return Attempt(arguments, parameters.get("options", ""), max(2.0, seconds) if seconds > 0 else None)


def _ssl(parameters: Mapping[str, str], host: Host) -> dict[str, Any]:
    """The arguments for TLS. asyncpg takes the files from a URL only."""
    from_system = parameters.get("sslrootcert") == "system"
    mode = parameters.get("sslmode", "verify-full" if from_system else "prefer")
    if mode not in SSL_MODES:
        raise ValueError(f"sslmode is {mode!r:.40}; expected one of {', '.join(SSL_MODES)}")
    if mode == "verify-full" and host.address and host.address != host.host:
        raise ValueError("it has hostaddr, whose certificate asyncpg would check for the address; leave hostaddr out")
    if from_system:
        if mode != "verify-full":
            raise ValueError(f"sslrootcert=system goes with sslmode=verify-full only, and sslmode is {mode!r}")
        context = ssl.create_default_context()
        if cert := parameters.get("sslcert"):
            context.load_cert_chain(cert, parameters.get("sslkey"), parameters.get("sslpassword", ""))
        return {"ssl": context}
    files = {name: parameters[name] for name in SSL_FILES if name in parameters}
    return {"ssl": mode, **({"dsn": url_of(files)} if files else {})}


def _password_of_file(parameters: Mapping[str, str], host: Host) -> str:
    """The password for this host in the password file; empty without one. A file that others may read is ignored."""
    home = home_folder()
    path = Path(parameters["passfile"]) if "passfile" in parameters else home / ".pgpass" if home else None
    try:
        if path is None or not stat.S_ISREG((status := path.stat()).st_mode) or status.st_mode & 0o077:
            return ""
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    names = {host.host, "localhost"} if host.host in SOCKET_FOLDERS else {host.host}
    wanted = (names, {str(host.port)}, {parameters["dbname"]}, {parameters["user"]})
    for line in lines:
        fields = re.match(r"(?!#)" + r"((?:[^:\\]|\\.)*):" * 4 + "(.*)", line)
        plain = [re.sub(r"\\(.)", r"\1", field) for field in fields.groups()] if fields else []
        if fields and all(fields[i + 1] == "*" or plain[i] in wanted[i] for i in range(4)):
            return plain[4]
    return ""


def conninfo(text: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """A string of key=value for libpq, with all parameters but passwords resolved. Raises ValueError."""
    return pairs_of(for_libpq(text, environ))


def for_libpq(text: str | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`read`, with as many ports as hosts, and no host empty."""
    parameters = read(text, environ)
    listed = hosts({**parameters, "load_balance_hosts": "disable"})
    parameters["host"] = ",".join(host.host for host in listed)
    parameters["port"] = ",".join(str(host.port) for host in listed)
    return parameters


def pairs_of(parameters: Mapping[str, str]) -> str:
    """The parameters as a string of key=value."""
    quoted = {name: re.sub(r"(['\\])", r"\\\1", value) for name, value in parameters.items()}
    return " ".join(f"{name}='{value}'" for name, value in quoted.items())


def where_of(text: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The host, port, database and user that a DSN leads to, for a message; never a password."""
    try:
        parameters = read(text, environ)
        named = ",".join(f"{host.address or host.host}:{host.port}" for host in hosts(parameters))
    except ValueError:
        return ""
    return f"{named}, database {parameters['dbname']}, user {parameters['user']}"
