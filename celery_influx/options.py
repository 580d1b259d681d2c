"""What can be set: each option once, with default, type, range, unit and meaning.

Validation, did-you-mean and the tables in docs/reference/options.md come from here. Values in,
values out: ``plugin`` reads Celery's configuration and hands it over as a mapping.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from celery_influx.errors import ConfigError, PointError
from celery_influx.line_protocol import Encoder
from celery_influx.point import Precision

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    dict: "a mapping",
}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_ENCODE = "expected udp://host:8089 or the like, a password's special characters as %XX"
#: One name or address and nothing else. A single colon would begin a port.
_is_host = re.compile(r"[^\s\0/@?#:\[\]]+|[0-9A-Fa-f.]*(?::[0-9A-Fa-f.]*){2,}(?:%\w+)?").fullmatch
_is_tenant = re.compile(r"\d{1,10}(?::\d{1,10})?|multitenant", re.ASCII).fullmatch

T = TypeVar("T")


def option(
    default: T,
    doc: str,
    *,
    kind: type | None = None,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
    ex_flux: str = "",
) -> T:
    """Declare one option: a dataclass field that knows its own range, unit and meaning.

    ``kind`` is the type of the value where ``default`` (``None``, a mapping) does not tell it.
    ``ex_flux`` says what the option is called in ex_flux, its default there, and why ours differs.
    """
    metadata = {
        "doc": doc,
        "kind": kind or type(default),
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "choices": choices,
        "secret": secret,
        "optional": default is None,
        "ex_flux": ex_flux,
    }
    if isinstance(default, dict):
        return cast("T", dataclasses.field(default_factory=dict, metadata=metadata))
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class DatabaseOptions:
    """One entry of ``influx_databases``."""

    name: str = "celery"

    transport: str = option(
        "udp",
        "How points are sent. A URL's scheme sets it: `udp://`, `http://`, `https://`, `tcp://`, "
        "`unixgram://`.",
        choices=("udp", "http", "tcp", "unixgram"),
        ex_flux="(none) | UDP | HTTP writes say whether they arrived.",
    )
    host: str = option(
        "localhost",
        "Host name or address, IPv4 or IPv6, of the server.",
        ex_flux="`host` | `localhost` | Same; looked up again after errors, IPv6 too.",
    )
    udp_port: int = option(
        8089,
        "Port of the UDP service. One such port writes into one database, which the server names.",
        at_least=1,
        at_most=65535,
        ex_flux="`udp_port` | 8089 | Same.",
    )
    http_port: int = option(
        8086,
        "Port of the HTTP API, for `ping`, `query`, `post` and the transport `http`. "
        "0: this server has none; the default for `tcp` and `unixgram`.",
        at_least=0,
        at_most=65535,
        ex_flux="`http_port` | 8086 | Same; ours takes 0 where there is no HTTP.",
    )
    tcp_port: int = option(
        8094,
        "Port of a server that takes lines over TCP, Telegraf or QuestDB.",
        at_least=1,
        at_most=65535,
    )
    socket_path: str | None = option(
        None,
        "Path of the socket of a Telegraf on this machine, for the transport `unixgram`.",
        kind=str,
    )
    secure: bool = option(
        False,
        "Use HTTPS. The certificate is verified, unless `insecure` says otherwise.",
        ex_flux="`secure?` | false | Same.",
    )
    ca_file: str | None = option(
        None,
        "File of certificates to trust instead of the system's, for HTTPS.",
        kind=str,
    )
    client_certificate: str | None = option(
        None,
        "File of the certificate by which the server knows this client, for HTTPS.",
        kind=str,
    )
    client_key: str | None = option(
        None,
        "File of that certificate's key, without a passphrase. Default: it is in the same file.",
        kind=str,
    )
    insecure: bool = option(
        False,
        "Trust any certificate: who stands in between reads and changes all, the password too. "
        "The log warns of it.",
    )
    database: str = option(
        "",
        "Name of the database on the server, for HTTP. Default: the entry's own name.",
        ex_flux="`database` | (required) | Ours has a default: the entry's name.",
    )
    api: str = option(
        "1",
        "The server's HTTP API: of InfluxDB 1.x, 2.x or 3.x, or of VictoriaMetrics, single or a "
        "cluster, which `query` asks in PromQL.",
        choices=("1", "2", "3", "victoria", "victoria-cluster"),
    )
    tenant: str = option(
        "0",
        "Tenant in a cluster of VictoriaMetrics: `accountID`, `accountID:projectID`, or "
        "`multitenant`.",
    )
    organization: str | None = option(
        None,
        "Organization of the bucket, for InfluxDB 2.x, where `database` is the bucket's name.",
        kind=str,
    )
    username: str | None = option(
        None,
        "User for HTTP basic authentication.",
        kind=str,
        ex_flux="`auth` | none | `{user, password}` there, two options here.",
    )
    password: str | None = option(
        None,
        "Password for HTTP basic authentication.",
        kind=str,
        secret=True,
        ex_flux="`auth` | none | See `username`.",
    )
    password_file: str | None = option(
        None,
        "File that the password is read from: when a connection is opened, and again when the "
        "server refuses it. A newline at its end is not part of it.",
        kind=str,
        secret=True,
    )
    password_env: str | None = option(
        None,
        "Name of the environment variable that holds the password.",
        kind=str,
        secret=True,
    )
    token: str | None = option(
        None,
        "Token for HTTP (`Authorization: Token …`, and `Bearer …` for InfluxDB 3.x), instead of "
        "username and password.",
        kind=str,
        secret=True,
    )
    token_file: str | None = option(
        None,
        "File that the token is read from, as `password_file`.",
        kind=str,
        secret=True,
    )
    token_env: str | None = option(
        None,
        "Name of the environment variable that holds the token.",
        kind=str,
        secret=True,
    )
    retention_policy: str | None = option(
        None,
        "Retention policy to write to and query by HTTP. Default: the database's default. "
        "Over UDP the server's configuration decides.",
        kind=str,
        ex_flux="`retention_policy` | none | Same.",
    )
    epoch: str = option(
        "ns",
        "Unit of the times that `query` gives back.",
        choices=("ns", "u", "ms", "s", "m", "h"),
        ex_flux="`epoch` | none (text) | Integers of ns match the timestamps of points.",
    )
    precision: str = option(
        "ns",
        "Unit of the timestamps sent. Coarser than ns, points of one series in the same unit "
        "overwrite each other. Over UDP it must be what the server's `[[udp]]` section says.",
        choices=tuple(word.value for word in Precision),
        ex_flux="`epoch` (on write) | none | ex_flux sends `us`, which 1.x silently takes as ns.",
    )
    field_types: bool = option(
        True,
        "Keep each field to the type of its first value, as InfluxDB does. False: for servers that "
        "do not; with `api=victoria` it is never kept.",
    )
    batch_size: int = option(
        5000,
        "Most lines in one payload; so many waiting lines are sent at once.",
        at_least=1,
        at_most=1_000_000,
        ex_flux="`batch_size` | 10 | Datagrams are bounded in bytes here, so more lines may wait.",
    )
    batch_bytes: int = option(
        1_048_576,
        "Longest HTTP body or TCP payload; so many waiting bytes are sent at once.",
        unit="bytes",
        at_least=1_024,
        at_most=25_000_000,
    )
    datagram_bytes: int | None = option(
        None,
        "Longest datagram. Default: what the route to the server takes in one piece "
        "(1,472 bytes on Ethernet, 65,507 on loopback and by `unixgram`).",
        kind=int,
        unit="bytes",
        at_least=64,
        at_most=65_507,
    )
    bytes_per_second: int = option(
        8_000_000,
        "Fastest sending by UDP, after a burst of 65,536 bytes. A server's socket holds little, "
        "and what finds it full is gone unheard: raise this where its `read-buffer` is large.",
        unit="bytes",
        at_least=1_024,
        at_most=10_000_000_000,
    )
    queue_size: int = option(
        100_000,
        "Most lines that wait; when full, the oldest is dropped and counted.",
        at_least=1,
        at_most=100_000_000,
        ex_flux="`max_queue_size` | 100 | Enough for a second of heavy load.",
    )
    queue_bytes: int = option(
        33_554_432,
        "Most bytes that wait; when full, the oldest line is dropped and counted.",
        unit="bytes",
        at_least=1_024,
        at_most=1_000_000_000_000,
    )
    flush_interval: float = option(
        1.0,
        "Longest time a line waits for others before it is sent.",
        unit="s",
        above=0,
        at_most=3600,
        ex_flux="`flush_interval` | 10 s | Fresher charts; one wake-up a second costs nothing.",
    )
    pool_size: int = option(
        2,
        "UDP sockets, used in turn.",
        at_least=1,
        at_most=64,
        ex_flux="`pool_size` | 5 | One thread sends; a second socket is there if one is refused.",
    )
    http_timeout: float = option(
        5.0,
        "Longest wait for a connection, again for the head of an answer, and for each piece of "
        "the rest, which takes ten times as long at most; over TCP, for room to send.",
        unit="s",
        above=0,
        at_most=600,
        ex_flux="`http_opts` `timeout` | 5 s | Same; holds for connecting and reading.",
    )
    retry_age: float = option(
        3600.0,
        "How long a batch is tried again after its first failed attempt, at growing intervals of "
        "at most 30 s, while newer points wait in the queue. 0: never. Over UDP it never is.",
        unit="s",
        at_least=0,
        at_most=604_800,
    )
    retry_tries: int = option(
        10,
        "Most attempts at a batch that the server answers by 408, 425, 429 or 5xx: some answer so "
        "what they will never take. With `spool_dir`: at one that fails, for any reason that may "
        "pass, while others are taken.",
        at_least=1,
        at_most=1_000_000,
    )
    spool_dir: str | None = option(
        None,
        "Folder, on a local disk, for batches that cannot be sent over HTTP, TCP or `unixgram`: "
        "they are sent when it is back, after a restart, too. Without this they wait in memory.",
        kind=str,
    )
    spool_bytes: int = option(
        268_435_456,
        "Most bytes on disk for this database, of all processes that share the folder. When full, "
        "the oldest go and are counted as dropped.",
        unit="bytes",
        at_least=65_536,
        at_most=1_000_000_000_000_000,
    )
    spool_mode: str = option(
        "failed",
        "Which batches go to disk: those whose attempt has `failed`; or `always` all, before it: "
        "then a killed process loses only what is not yet a batch, since one is under way.",
        choices=("failed", "always"),
    )
    spool_fsync: bool = option(
        False,
        "Wait with each batch until the disk has it: then a loss of power loses no more than a "
        "killed process does. With gevent or eventlet all greenlets wait.",
    )
    query_rows: int = option(
        100_000,
        "Most rows in the answer to `query` or `post`; one with more is an error.",
        at_least=1,
        at_most=1_000_000_000,
    )
    query_bytes: int = option(
        33_554_432,
        "Longest answer to `query` or `post`, unpacked. As Python's values it takes five to "
        "twenty-five times as much memory.",
        unit="bytes",
        at_least=1_024,
        at_most=1_000_000_000_000,
    )
    gzip: bool = option(
        False,
        "Compress what is sent over HTTP: an eighth of the bytes, for twice the CPU time. For "
        "networks that are slow or paid for.",
    )


#: Each may be given by the option of its name, or by that with ``_file`` or ``_env``.
_SECRETS = ("token", "password")
#: Bytes of the path of a socket in the file system: Linux has room for 107.
_LONGEST_PATH = 107
#: A URL's scheme to the transport, and to the option that its port is.
_SCHEMES = {
    "udp": ("udp", "udp_port"),
    "http": ("http", "http_port"),
    "https": ("http", "http_port"),
    "tcp": ("tcp", "tcp_port"),
    "unixgram": ("unixgram", ""),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """All settings, named ``influx_…`` in Celery's configuration."""

    databases: dict[str, DatabaseOptions] = option(
        {},
        "Name to URL, or to a mapping of the options below. "
        "Default: one database, `celery`, on localhost.",
    )
    default_database: str = option(
        "", "Entry that serves `app.influx` itself. Default: the first one."
    )
    tags: dict[str, Any] = option(
        {},
        "Tags of every point. A point's own tags win. `host` is there by itself; "
        "`{'host': None}` takes it out.",
    )
    strict: bool = option(
        False,
        "Raise what is wrong with a point, instead of counting and logging it. For development.",
    )
    task_points: bool = option(True, "Write a `celery_task` point at the end of every task's run.")
    task_ids: bool = option(
        False, "Write the fields `id`, `root_id` and `parent_id` into `celery_task`."
    )
    eager: bool = option(
        False, "Write `celery_task` points of tasks that run at once, in their caller, too."
    )
    enabled: bool = option(True, "False: record nothing, start nothing, say nothing to the server.")
    allow_post: bool = option(
        False,
        "Register the helper task `celery_influx.post`, which may change and delete data.",
    )
    shutdown_timeout: float = option(
        5.0, "Longest time to send what waits when a process ends.", unit="s", at_least=0
    )


def load(settings: Mapping[str, Any]) -> Options:
    """Check ``settings`` (``influx_…`` keys, lower case) and make ``Options`` of them.

    Raises:
        ConfigError: Naming every mistake, a line each.
    """
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    by_key = {f"influx_{field.name}": field for field in dataclasses.fields(Options)}
    for key, value in settings.items():
        if key in by_key:
            _take(values, by_key[key], value, key, mistakes)
        else:
            hint = _did_you_mean(key, by_key)
            if key.startswith("celery_influx_"):
                hint += " The prefix is read only where the app has namespace='CELERY'"
            mistakes.append(f"unknown setting {key!r}{hint}")
    unread = "influx_databases" in settings and "databases" not in values
    databases = {
        name: _database(name, entry, mistakes)
        for name, entry in (values.get("databases") or {"celery": {}}).items()
    }
    values["databases"] = databases
    default = values.setdefault("default_database", "") or next(iter(databases))
    values["default_database"] = default
    # Where influx_databases could not be read at all, its names are not known.
    if default not in databases and not unread:
        expected = ", ".join(map(repr, databases))
        mistakes.append(
            f"influx_default_database: {_shown(default)} is not in influx_databases; "
            f"expected one of {expected}"
        )
    try:
        Encoder(tags=values.get("tags"))
    except PointError as error:
        mistakes.append(f"influx_tags: {error}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Options(**values)


def part_urls(databases: object) -> None:
    """In ``influx_databases``: have each URL with a secret be the mapping that it stands for.

    Celery masks what is under such a key when it prints the configuration, for `celery inspect`
    too, and leaves a URL as it is.
    """
    if not isinstance(databases, dict):
        return
    by_key = _options_of(DatabaseOptions)
    for name, entry in databases.items():
        if isinstance(entry, str):
            given = _parse_url(entry, "", by_key, [])
            if any(map(given.get, _SECRETS)):
                databases[name] = given


def _database(name: object, entry: object, mistakes: list[str]) -> DatabaseOptions:
    where = f"influx_databases[{name!r}]"
    if not isinstance(name, str) or not name:
        mistakes.append(f"{where}: expected a name that is a string, got {name!r}")
        return DatabaseOptions()
    given: Mapping[str, object]
    by_key = _options_of(DatabaseOptions)
    if isinstance(entry, str):
        given = _parse_url(entry, where, by_key, mistakes)
    elif isinstance(entry, Mapping):
        given = entry
    else:
        mistakes.append(
            f"{where}: expected a URL (udp://host:8089, http://host:8086/database) "
            f"or a mapping of options, got {_shown(entry)}"
        )
        return DatabaseOptions()
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in by_key:
            _take(values, by_key[key], value, f"{where}[{key!r}]", mistakes)
        else:
            mistakes.append(f"{where}: unknown option {key!r}{_did_you_mean(key, by_key)}")
    host = values.get("host", "localhost")
    if not _is_host(host):
        mistakes.append(
            f"{where}['host']: expected a host name or address alone, such as 'influx.example' or "
            f"'::1', without scheme, port or brackets, got {_shown(host)}"
        )
    if values.get("transport") == "http" and values.get("http_port") == 0:
        mistakes.append(f"{where}['http_port']: expected a port for transport 'http', got 0")
    if values.get("transport") in ("tcp", "unixgram"):
        values.setdefault("http_port", 0)  # who listens there is no InfluxDB
    if values.get("transport") == "unixgram" and not _is_socket_path(values.get("socket_path")):
        mistakes.append(
            f"{where}['socket_path']: expected unixgram:///path/of/the/socket, or the option "
            f"'socket_path', of at most {_LONGEST_PATH} bytes"
        )
    if values.get("spool_dir") is not None:
        mistakes += _spool_mistakes(values, where)
    if values.get("api") == "2" and not values.get("organization"):
        mistakes.append(f"{where}['organization']: missing; InfluxDB 2.x wants the bucket's")
    tenant = values.get("tenant", "0")
    if not _is_tenant(tenant):
        mistakes.append(
            f"{where}['tenant']: expected numbers as in '7' or '7:2', or 'multitenant', "
            f"got {_shown(tenant)}"
        )
    token, password = (_sources(values, secret, where, mistakes) for secret in _SECRETS)
    if token and (values.get("username") or password):
        mistakes.append(
            f"{where}: both a token and a username or password; expected one of the two"
        )
    if bool(values.get("username")) != bool(password):
        missing = "password" if values.get("username") else "username"
        mistakes.append(f"{where}: {missing!r} is missing; basic authentication needs both")
    if values.get("insecure") and values.get("ca_file"):
        mistakes.append(
            f"{where}: both 'insecure' and 'ca_file'; expected one of the two: trust any "
            "certificate, or those that this file signed"
        )
    if values.get("client_key") and not values.get("client_certificate"):
        mistakes.append(f"{where}: 'client_certificate' is missing; 'client_key' belongs to it")
    values["name"] = name
    values["database"] = values.get("database") or name
    return DatabaseOptions(**values)


def _spool_mistakes(values: Mapping[str, Any], where: str) -> Iterator[str]:
    if values.get("transport", "udp") == "udp":
        yield (
            f"{where}['spool_dir']: UDP does not say what did not arrive; expected the transport "
            "'http', 'tcp' or 'unixgram'"
        )
    if not values["spool_dir"].startswith("/"):
        yield (
            f"{where}['spool_dir']: expected an absolute path, since a worker's own folder may "
            f"change, got {_shown(values['spool_dir'])}"
        )
    smallest = 2 * values.get("batch_bytes", DatabaseOptions.batch_bytes)
    if values.get("spool_bytes", DatabaseOptions.spool_bytes) < smallest:
        yield (
            f"{where}['spool_bytes']: expected room for two batches, {smallest} bytes with this "
            f"'batch_bytes', got {values['spool_bytes']}"
        )


def _sources(
    values: Mapping[str, object], secret: str, where: str, mistakes: list[str]
) -> list[str]:
    """The options that say what ``secret`` is: one of three."""
    given = [name for name in (secret, f"{secret}_file", f"{secret}_env") if values.get(name)]
    if len(given) > 1:
        named = " and ".join(map(repr, given))
        mistakes.append(f"{where}: {named} are given; expected one of them")
    return given


def _is_socket_path(path: str | None) -> bool:
    try:
        return path is not None and path.strip("/") != "" and len(path.encode()) <= _LONGEST_PATH
    except UnicodeEncodeError:
        return False


def _parse_url(
    url: str, where: str, known: Mapping[str, object], mistakes: list[str]
) -> dict[str, object]:
    """The options that a URL stands for.

    No part of it gets into a message, except where it is an option's name or close to one: what
    looks like a port or a key may be the half of a password that was not written as %XX.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        # The error's own text may quote a part of a password.
        mistakes.append(f"{where}: not a URL with a host and a port up to 65535; {_ENCODE}")
        return {}
    if parts.scheme not in _SCHEMES or "://" not in url:
        # Without "://" what looks like a scheme may be a user's name.
        wrong = f"unknown scheme {parts.scheme!r}" if "://" in url else "a URL without a scheme"
        mistakes.append(
            f"{where}: {wrong}; expected udp://host:8089, http://host:8086/database, https://…, "
            "tcp://host:8094 or unixgram:///path"
        )
        return {}
    transport, port_option = _SCHEMES[parts.scheme]
    is_path = transport == "unixgram"
    if parts.fragment or ("@" in parts.path and not is_path) or "@" in parts.query:
        mistakes.append(f"{where}: a '#' or a second '@' in the URL; {_ENCODE}")
        return {}
    values: dict[str, object] = {"transport": transport}
    if is_path:
        if parts.netloc:
            mistakes.append(
                f"{where}: a host in a unixgram URL; expected three slashes, unixgram:///path"
            )
        values["socket_path"] = unquote(parts.path)
        return values | _from_query(parts.query, known, values, where, mistakes)
    if host:
        values["host"] = host
    if port is not None:
        values[port_option] = port
    if parts.scheme == "https":
        values["secure"] = True
    if parts.username:
        values["username"] = unquote(parts.username)
    if parts.password:
        values["password"] = unquote(parts.password)
    path = parts.path.strip("/")
    if "/" in path:
        mistakes.append(
            f"{where}: a URL's path is the database, and this one has a '/' in it; "
            "expected http://host:8086/database, and %2F where the name has one"
        )
    elif path:
        values["database"] = unquote(path)
    return values | _from_query(parts.query, known, values, where, mistakes)


def _from_query(
    query: str,
    known: Mapping[str, object],
    given: Mapping[str, object],
    where: str,
    mistakes: list[str],
) -> dict[str, object]:
    """The options in a URL's query; ``given``: those that stand in its other parts."""
    values: dict[str, object] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            hint = _did_you_mean(key, known)
            shown = repr(key) if "did you mean" in hint else "in the URL's query"
            mistakes.append(f"{where}: unknown option {shown}{hint}")
        elif key in values or key in given:
            mistakes.append(f"{where}: {key!r} is given twice in the URL; expected it once")
        else:
            values[key] = _Text(value)
    return values


class _Text(str):
    """A value from a URL's query: text that stands for whatever its option is."""

    __slots__ = ()


def _take(
    values: dict[str, Any],
    field: dataclasses.Field[Any],
    value: object,
    where: str,
    mistakes: list[str],
) -> None:
    """Check one value against its option's declaration; keep it, or say what is wrong."""
    rule = field.metadata
    kind: type = rule["kind"]
    if value is None and rule["optional"]:
        values[field.name] = None
        return
    converted = _convert(value, kind)
    low, high, above = rule["at_least"], rule["at_most"], rule["above"]
    if (
        converted is None
        or (rule["choices"] and converted not in rule["choices"])
        or (low is not None and converted < low)
        or (high is not None and converted > high)
        or (above is not None and converted <= above)
    ):
        got = _named(value) if rule["secret"] else _shown(value)
        mistakes.append(f"{where}: expected {expectation(field)}, got {got}")
        return
    values[field.name] = converted


def _convert(value: object, kind: type) -> Any:
    """``value`` as ``kind``, or None where it is something else."""
    if isinstance(value, _Text):
        try:
            value = _TRUTH[value.lower()] if kind is bool else kind(str(value))
        except (ValueError, KeyError):
            return None
    if kind is dict:
        return dict(value) if isinstance(value, Mapping) else None
    if isinstance(value, bool) and kind is not bool:
        return None
    if kind is float and isinstance(value, (int, float)):
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None
    if kind is str and isinstance(value, str):
        # A choice may be given as an Enum that is a str: keep its plain value.
        return str.__str__(value)
    return value if isinstance(value, kind) else None


def _shown(value: object) -> str:
    """``value`` for a message, but only its type where it may hold a secret, or be long."""
    if value is None or isinstance(value, float):
        return repr(value)
    if isinstance(value, int) and -(2**64) < value < 2**64:
        return repr(value)
    if isinstance(value, str) and len(value) <= 60 and not set(value) & set("@?=&"):
        return repr(str.__str__(value))
    return _named(value)


def _named(value: object) -> str:
    return f"a value of type {'str' if isinstance(value, str) else type(value).__name__}"


def expectation(field: dataclasses.Field[Any]) -> str:
    """What an option takes, in words: ``seconds greater than 0 and at most 3600``."""
    rule = field.metadata
    if rule["choices"]:
        return "one of " + ", ".join(map(repr, rule["choices"]))
    units = {"s": "seconds", "bytes": "a whole number of bytes"}
    text = units.get(rule["unit"], _KINDS[rule["kind"]])
    bounds = [
        f"{words} {rule[bound]:g}" if rule["unit"] == "s" else f"{words} {rule[bound]}"
        for bound, words in (
            ("above", "greater than"),
            ("at_least", "at least"),
            ("at_most", "at most"),
        )
        if rule[bound] is not None
    ]
    text = " ".join([text, " and ".join(bounds)]).strip()
    return f"{text} or None" if rule["optional"] else text


def _options_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of ``cls`` that were declared by ``option``, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata}


def _did_you_mean(word: object, known: Mapping[str, object]) -> str:
    import difflib

    close = difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; expected one of " + ", ".join(known)
