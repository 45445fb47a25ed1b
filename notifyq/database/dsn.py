"""Where a DSN leads: by libpq's rules, so that notifyq reaches the database that psql reaches, or says why it can't.

asyncpg reads DSNs by rules of its own. To `postgresql://host/?dbname=shop` it opens the database that is called as the
user is, it takes the first of `//one/db?host=two` where libpq takes the second, it sends `connect_timeout` to the
server as a setting, and it doesn't know PGSERVICE, PGOPTIONS or PGCONNECT_TIMEOUT. So what a DSN says is read here,
once: into libpq's parameters. asyncpg and psycopg are then told host, port, database and user outright.

    read        the parameters: of the DSN, else of its service, else of the PG* variables
    attempts    for asyncpg: one for each host, in the order to try them
    conninfo    for psycopg and psql

What is wrong with a DSN is a ValueError here. The caller knows where the DSN comes from and adds that.
"""

from __future__ import annotations

import configparser
import difflib
import getpass
import os
import random
import re
import ssl
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

if sys.platform != "win32":
    import pwd

# libpq's parameters, and the variable that each has.
VARIABLES: Mapping[str, str] = {
    "service": "PGSERVICE",
    "servicefile": "PGSERVICEFILE",
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "options": "PGOPTIONS",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
    "channel_binding": "PGCHANNELBINDING",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcertmode": "PGSSLCERTMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "gssencmode": "PGGSSENCMODE",
    "krbsrvname": "PGKRBSRVNAME",
    "gsslib": "PGGSSLIB",
}
WITHOUT_VARIABLE = frozenset(
    [
        "sslpassword",
        "replication",
        "scram_client_key",
        "scram_server_key",
        "oauth_issuer",
        "oauth_client_id",
        "oauth_client_secret",
        "oauth_scope",
    ]
)

# Parameters that choose neither the server nor the database, nor how either is proven. notifyq names its connections
# itself, has keepalives of its own, and speaks UTF-8.
OURS = frozenset(
    [
        "application_name",
        "fallback_application_name",
        "client_encoding",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "sslsni",
        "sslcompression",
        "gssdelegation",
        "min_protocol_version",
        "max_protocol_version",
        "sslkeylogfile",
        "requiressl",
        "authtype",
        "tty",
    ]
)

# Arguments for a driver, in SQLAlchemy's URLs.
OF_DRIVERS = frozenset(
    [
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "async_fallback",
        "statement_cache_size",
        "max_cached_statement_lifetime",
        "max_cacheable_statement_size",
        "command_timeout",
        "timeout",
        "prepare_threshold",
        "autocommit",
    ]
)

KNOWN = {*VARIABLES, *WITHOUT_VARIABLE, *OURS, *OF_DRIVERS, "ssl", "database"}

TARGETS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SSL_FILES = [name for name in (*VARIABLES, "sslpassword") if name.startswith("ssl") and name != "sslmode"]

# What asyncpg can't do, and a DSN must not ask for in vain: the values with which it isn't asked for.
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

# Where servers put their sockets: what libpq has for a default depends on who built it. Debian's, others', upstream's.
WITH_PORT = re.compile(r"([^:/,\[\]]+):([0-9]+)")  # of a host by SQLAlchemy's rules
SOCKET_FOLDERS = ("/var/run/postgresql", "/run/postgresql", "/tmp")
DEFAULT_PORT = "5432"
SERVICE_FILES = ("/etc/postgresql-common/pg_service.conf", "/etc/sysconfig/pgsql/pg_service.conf")


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


# ---------------------------------------------------------------- reading


def read(text: str | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """libpq's parameters, of a URL or a string of key=value; then of the service; then of PG* variables.

    Those that aren't for a connection of ours are dropped; host, port, dbname and user are there. Raises ValueError.
    """
    said = _translated(url_parameters(text) if text else {})
    found = said
    service = said.get("service", environ.get("PGSERVICE", ""))
    if service:
        found = {**_service(service, said.get("servicefile") or environ.get("PGSERVICEFILE"), environ), **said}
    found = {**{name: environ[it] for name, it in VARIABLES.items() if it in environ}, **found}
    found.pop("service", None)
    found.pop("servicefile", None)
    if not found.get("user"):
        found["user"] = _os_user()
    if not found.get("dbname"):
        found["dbname"] = found["user"]
    if not found.get("host") and not found.get("hostaddr"):
        port = found.get("port") or DEFAULT_PORT
        sockets = [folder for folder in SOCKET_FOLDERS if Path(folder, f".s.PGSQL.{port}").exists()]
        found["host"] = ",".join([*sockets[:1], "localhost"]) if "," not in port else "localhost"
    return {name: value for name, value in found.items() if value}


def url_parameters(url: str) -> dict[str, str]:
    """What a postgresql:// URL says, as libpq reads it: what follows the ? goes before what stands in front."""
    rest = url.partition("://")[2]
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    user_info, _, servers = authority.rpartition("@")
    user, _, password = user_info.partition(":")
    hosts, ports = _servers(servers)
    found = {"user": user, "password": password, "host": hosts, "port": ports, "dbname": path}
    found = {name: _decoded(value) for name, value in found.items() if value}
    listed: list[str] = []
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or "=" in value:
            raise ValueError("what follows its ? is not name=value&name=value; write = and & in a value as %3D and %26")
        found[_decoded(name)] = _decoded(value)
        if _decoded(name) == "host":
            listed.append(_decoded(value))
    if any(WITH_PORT.fullmatch(host) for host in listed):  # SQLAlchemy's: host=one:5432&host=two:5433
        found["host"] = ",".join(WITH_PORT.sub(r"\1", host) for host in listed)
        found["port"] = ",".join(said[2] if (said := WITH_PORT.fullmatch(host)) else "" for host in listed)
    return found


def pair_parameters(text: str) -> dict[str, str]:
    """What a string of key=value says. A value with spaces stands in single quotes; a backslash takes what follows."""
    found: dict[str, str] = {}
    item = re.compile(
        r"\s*([^\s=']+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)(?=\s|$)", re.DOTALL
    )
    place = 0
    while place < len(text.rstrip()):
        match = item.match(text, place)
        if match is None:  # without a word of it, which may be of a password
            raise ValueError("it is not name=value name='value with spaces'; in a value, write ' as \\' and \\ as \\\\")
        found[match[1]] = re.sub(r"\\(.)", r"\1", match[2] or match[3] or "", flags=re.DOTALL)
        place = match.end()
    return found


def url_of(parameters: Mapping[str, str]) -> str:
    """A URL that says the same, to other readers of URLs too: user and database stand where they look for them."""
    rest = dict(parameters)
    user, password, database = (rest.pop(name, "") for name in ("user", "password", "dbname"))
    user_info = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in rest.items())
    return f"postgresql://{user_info}{'@' if user_info else ''}/{quote(database, safe='')}{'?' if query else ''}{query}"


def with_database(url: str | None, database: str) -> str:
    """`url`, with another database."""
    return url_of({**(url_parameters(url) if url else {}), "dbname": database})


def _servers(text: str) -> tuple[str, str]:
    """`[::1]:5432,b,c:1` as hosts "::1,b,c" and ports "5432,,1"; no port at all is no list of empty ones."""
    hosts: list[str] = []
    ports: list[str] = []
    for server in text.split(","):
        found = re.fullmatch(r"\[([^\]]*)\](?::(.*))?|([^:]*)(?::(.*))?", server)
        if found is None:
            raise ValueError("it has a host that is neither a name nor an address; IPv6 stands in brackets: [::1]")
        hosts.append(found[1] or found[3] or "")
        ports.append(found[2] or found[4] or "")
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _decoded(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00", text):
        raise ValueError("it has a % that isn't followed by two hexadecimal digits; write % as %25")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("what is percent-encoded in it isn't UTF-8") from None


def _translated(said: Mapping[str, str]) -> dict[str, str]:
    """SQLAlchemy's, asyncpg's and JDBC's words in libpq's; without what is for a driver. Raises for unknown ones."""
    found = dict(said)
    for name in found:
        if name not in KNOWN:
            close = difflib.get_close_matches(name.lower(), KNOWN - OF_DRIVERS, n=1, cutoff=0.8)
            guess = (
                f"did you mean {close[0]!r}?"
                if close
                else ("take it out; a setting of the server is options=-c%20name%3Dvalue")
            )
            raise ValueError(f"it has the parameter {name!r:.40}, which PostgreSQL's clients don't know; {guess}")
    if mode := found.pop("ssl", None):
        words = {"true": "require", "false": "disable", "1": "require", "0": "disable"}
        found.setdefault("sslmode", words.get(mode.lower(), mode))
    if found.pop("requiressl", None) == "1":
        found.setdefault("sslmode", "require")
    if "database" in found:
        found.setdefault("dbname", found.pop("database"))
        found.pop("database", None)
    return {name: value for name, value in found.items() if name not in OURS and name not in OF_DRIVERS}


def _service(name: str, file: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The section of a service file. Raises ValueError if there is none of this name."""
    home = _home()
    folder = environ.get("PGSYSCONFDIR")
    system = [str(Path(folder, "pg_service.conf"))] if folder else [*SERVICE_FILES]
    own = [file] if file else [str(home / ".pg_service.conf")] if home else []
    for path in [*own, *system]:
        parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=False)
        parser.optionxform = str  # type: ignore[assignment, method-assign] # names as they are
        try:
            parser.read_string(Path(path).read_text(encoding="utf-8"))
        except OSError:
            continue
        except (configparser.Error, UnicodeDecodeError):
            raise ValueError(f"the service file {path} can't be read; expected lines of [name] and key=value") from None
        if name in parser.sections():
            return _translated(dict(parser[name]))
    raise ValueError(f"the service {name!r} is defined nowhere; looked in {', '.join([*own, *system])}")


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None  # a user id without a name, and no HOME


def _os_user() -> str:
    """Not getpass.getuser(), which believes the variables LOGNAME and USER; libpq asks the system."""
    if sys.platform == "win32":
        return getpass.getuser()
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ValueError(
            f"no user is named, and the user id {os.geteuid()} has no name here; name one: PGUSER, or postgresql://USER@..."
        ) from None


# ---------------------------------------------------------------- for drivers


def hosts(parameters: Mapping[str, str]) -> list[Host]:
    """In the order to try them."""
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
    """How to try for a connection with asyncpg, in this order. Raises ValueError for what asyncpg can't do."""
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
    # One after the other, as asyncpg sees a single host each time and would be content with the first.
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
        # Never None: asyncpg would look for a password by rules of its own.
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
    """asyncpg reads these from a URL only."""
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
    """The password for this host in the password file; empty without one. A file that others may read is left alone."""
    home = _home()
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
    """For libpq: key=value, with nothing left to find out but passwords. Raises ValueError."""
    return pairs_of(for_libpq(text, environ))


def for_libpq(text: str | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`read`, with a host and a port in each place."""
    parameters = read(text, environ)
    listed = hosts({**parameters, "load_balance_hosts": "disable"})
    parameters["host"] = ",".join(host.host for host in listed)
    parameters["port"] = ",".join(str(host.port) for host in listed)
    return parameters


def pairs_of(parameters: Mapping[str, str]) -> str:
    """As a string of key=value."""
    quoted = {name: re.sub(r"(['\\])", r"\\\1", value) for name, value in parameters.items()}
    return " ".join(f"{name}='{value}'" for name, value in quoted.items())


def where_of(text: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Host, port, database and user that a DSN comes to, for a message; never a password."""
    try:
        parameters = read(text, environ)
        named = ",".join(f"{host.address or host.host}:{host.port}" for host in hosts(parameters))
    except ValueError:
        return ""
    return f"{named}, database {parameters['dbname']}, user {parameters['user']}"
