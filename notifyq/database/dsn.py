"""What a DSN says, by libpq's rules: notifyq reaches the database that psql reaches, or says why not.

asyncpg reads DSNs by rules of its own. For `postgresql://host/?dbname=shop` it opens the database with the user's name.
It takes the first host of `//one/db?host=two`, where libpq takes the second. It sends `connect_timeout` to the server
as a setting, and it doesn't know PGSERVICE, PGOPTIONS or PGCONNECT_TIMEOUT. So a DSN is read here, once, into libpq's
parameters; hosts.py then tells asyncpg and psycopg host, port, database and user outright.

A mistake in a DSN is a ValueError here. The caller knows where the DSN comes from, and adds that.
"""

from __future__ import annotations

import configparser
import difflib
import getpass
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote

if sys.platform != "win32":
    import pwd

# libpq's parameters, and the environment variable of each.
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

# Parameters that choose neither server nor database, nor how the two sides are authenticated: notifyq ignores them. It
# names its connections itself, has keepalives of its own, and speaks UTF-8.
IGNORED = frozenset(
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

# Arguments for a driver, which SQLAlchemy's URLs may have. They are ignored too.
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

KNOWN = {*VARIABLES, *WITHOUT_VARIABLE, *IGNORED, *OF_DRIVERS, "ssl", "database"}

WITH_PORT = re.compile(r"([^:/,\[\]]+):([0-9]+)")  # a host by SQLAlchemy's rules
DEFAULT_PORT = "5432"
# Where servers put their sockets. libpq's default depends on who built it: Debian, other distributions, upstream.
SOCKET_FOLDERS = ("/var/run/postgresql", "/run/postgresql", "/tmp")
SERVICE_FILES = ("/etc/postgresql-common/pg_service.conf", "/etc/sysconfig/pgsql/pg_service.conf")


def read(text: str | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """libpq's parameters: those of the URL, then those of its service, then those of PG* variables.

    Ignored ones are left out; host, dbname and user are always there. Raises ValueError.
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
    """What a postgresql:// URL says, as libpq reads it: a parameter after the ? wins over what stands before it."""
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
    """What a string of key=value says. A value with spaces is in single quotes; a backslash escapes a character."""
    found: dict[str, str] = {}
    item = re.compile(
        r"\s*([^\s=']+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)(?=\s|$)", re.DOTALL
    )
    place = 0
    while place < len(text.rstrip()):
        match = item.match(text, place)
        if match is None:  # the message quotes nothing of the text, as that may be a password
            raise ValueError("it is not name=value name='value with spaces'; in a value, write ' as \\' and \\ as \\\\")
        found[match[1]] = re.sub(r"\\(.)", r"\1", match[2] or match[3] or "", flags=re.DOTALL)
        place = match.end()
    return found


def url_of(parameters: Mapping[str, str]) -> str:
    """A URL that says the same, for other parsers too: user and database are where those look for them."""
    rest = dict(parameters)
    user, password, database = (rest.pop(name, "") for name in ("user", "password", "dbname"))
    user_info = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in rest.items())
    return f"postgresql://{user_info}{'@' if user_info else ''}/{quote(database, safe='')}{'?' if query else ''}{query}"


def with_database(url: str | None, database: str) -> str:
    """`url`, with another database."""
    return url_of({**(url_parameters(url) if url else {}), "dbname": database})


def _servers(text: str) -> tuple[str, str]:
    """`[::1]:5432,b,c:1` gives hosts "::1,b,c" and ports "5432,,1". If no host has a port, the ports are ""."""
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
    """The parameters of SQLAlchemy, asyncpg and JDBC as libpq's, without ignored ones. Raises ValueError for others."""
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
    return {name: value for name, value in found.items() if name not in IGNORED and name not in OF_DRIVERS}


def _service(name: str, file: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The section of a service file. Raises ValueError if there is none of this name."""
    home = home_folder()
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


def home_folder() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None  # a user id without a name, and no HOME


def _os_user() -> str:
    """The user's name as the system has it, which libpq takes. getpass.getuser() would take LOGNAME or USER first."""
    if sys.platform == "win32":
        return getpass.getuser()
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ValueError(
            f"no user is named, and the user id {os.geteuid()} has no name here; name one: PGUSER, or postgresql://USER@..."
        ) from None
