"""What ``celery influx setup`` does: databases, retention policies and continuous queries of 1.x.

And the configuration of influxd and Telegraf that fits one entry of ``influx_databases``. Rules:
https://docs.influxdata.com/influxdb/v1/query_language/manage-database/ and
.../query_language/continuous_queries/ (tried on 1.6.7);
https://github.com/influxdata/telegraf/tree/master/plugins/inputs/socket_listener and
.../inputs/influxdb_listener.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from celery_influx.database import Database
from celery_influx.errors import InfluxError, QueryError
from celery_influx.measurements import MEASUREMENTS, Measurement
from celery_influx.options import DatabaseOptions
from celery_influx.queries import quote_ident

#: The name of a retention policy that nobody gave one.
_AUTOGEN = "autogen"
_PIECE = re.compile(r"(\d+)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
#: By ``api``: how to say that points are kept for ever, and what to do instead.
_EVER = {"2": "0", "3": "none", "victoria": "", "victoria-cluster": ""}
_INSTEAD = {
    "2": "InfluxDB 2.x has buckets: influx bucket create --org {organization} --name {database}"
    " --retention {duration}",
    "3": "InfluxDB 3.x has a command: influxdb3 create database --retention-period {duration}"
    " {database}",
    "victoria": "VictoriaMetrics needs no database; its flag -retentionPeriod says what it keeps",
    "victoria-cluster": "VictoriaMetrics needs no database; -retentionPeriod of its vmstorage says "
    "what it keeps",
}
#: A Telegraf's influxdb_listener listens here if nothing else is said, says that it is of this
#: version, and answers all statements with nothing.
_TELEGRAF_PORT, _TELEGRAF_VERSION = 8186, "1.0"


class Setup:
    """One database's. ``say`` takes each line of what was done, or was there.

    Args:
        database: Whose entry it is.
        alter: Change what is there and differs; without, it is said and kept.
        dry_run: Print the statements that an empty server needs, and send nothing.

    Attributes:
        is_telegraf: No InfluxDB is there but a Telegraf; as ``run`` has found, by the version or,
            where nothing is to be sent, by the port.
    """

    def __init__(
        self, database: Database, *, alter: bool, dry_run: bool, say: Callable[[str], None]
    ) -> None:
        self._database = database
        self._alter = alter
        self._dry_run = dry_run
        self._say = say
        self._changed = False
        self.is_telegraf = dry_run and database.options.http_port == _TELEGRAF_PORT
        self._name = database.options.database or database.name
        self._quoted = quote_ident(self._name)
        self._policies: dict[str, str] = {}
        self._default = ""

    def run(self, duration: str | None, downsample: Iterable[tuple[str, str]]) -> bool:
        """Make what is missing; whether all is as asked now.

        Args:
            duration: How long points are kept, such as ``30d``.
            downsample: Pairs of an interval and how long its points are kept.

        Raises:
            InfluxError: It cannot be done there, or the server refused something.
        """
        options = self._database.options
        downsample = list(downsample)
        self._require_1(duration)
        if not options.http_port:
            if duration or downsample:
                raise InfluxError(
                    "no HTTP API, since 'http_port' is 0; expected InfluxDB's, to make retention "
                    "policies by"
                )
            self._say("-- 'http_port' is 0, so nothing is asked or made there")
            return True
        if self.is_telegraf:
            if duration or downsample:
                raise InfluxError(
                    "a Telegraf listens there, which makes no retention policies; expected the "
                    "InfluxDB that it writes to, to make them by"
                )
            self._say(
                "-- a Telegraf listens there, which makes no databases: they are made in the "
                "InfluxDB that it writes to, by an entry with that one's address"
            )
            return True
        source, kept = self._source(duration)
        kept.update((f"every_{every}", length) for every, length in downsample)
        if source in [f"every_{every}" for every, _ in downsample]:
            raise InfluxError(
                f"points are written to the retention policy {source!r}, where --downsample puts "
                "its own; expected another 'retention_policy'"
            )
        as_asked = [self._policy(name, length) for name, length in kept.items()]
        known = {row["name"]: row for row in self._ask("SHOW CONTINUOUS QUERIES", self._name)}
        for every, _ in downsample:
            for measurement in MEASUREMENTS:
                name = f"{measurement.name}_every_{every}"
                text = continuous_query(name, self._name, source, measurement, every)
                as_asked.append(self._continuous_query(name, text, is_there=name in known))
        if not self._changed:
            self._say("-- nothing to change")
        return all(as_asked)

    def _require_1(self, duration: str | None) -> None:
        options = self._database.options
        if options.api in _INSTEAD:
            name = f"{self._name}/{options.retention_policy}" if options.retention_policy else ""
            instead = _INSTEAD[options.api].format(
                organization=shlex.quote(options.organization or "…"),
                database=shlex.quote(name or self._name),
                duration=_EVER[options.api] if duration in (None, "INF") else duration,
            )
            raise InfluxError(f"api {options.api!r}: this is for InfluxDB 1.x; {instead}")
        if options.http_port and not self._dry_run:
            version = self._database.ping().version or ""
            self.is_telegraf = version == _TELEGRAF_VERSION
            if not self.is_telegraf and not re.match(r"v?1\.\d+\.", version):
                raise InfluxError(
                    f"the server's version is {version or 'none, as of VictoriaMetrics'}; expected "
                    "InfluxDB 1.x itself, such as 1.8.10; set 'api' to what it is"
                )

    def _source(self, duration: str | None) -> tuple[str, dict[str, str | None]]:
        """The retention policy that points are written to, and what it must be like.

        Makes the database where there is none, with it as the default.
        """
        given = self._database.options.retention_policy
        if self._name not in {row["name"] for row in self._ask("SHOW DATABASES")}:
            source = given or _AUTOGEN
            self._do(
                f"CREATE DATABASE {self._quoted} WITH DURATION {duration or 'INF'} REPLICATION 1 "
                f"NAME {quote_ident(source)}"
            )
            self._default = source
            return source, {}
        self._say(f"-- there: the database {self._quoted}")
        rows = self._ask(f"SHOW RETENTION POLICIES ON {self._quoted}")
        self._policies = {row["name"]: row["duration"] for row in rows}
        self._default = next((row["name"] for row in rows if row["default"]), "")
        source = given or self._default or _AUTOGEN
        return source, {source: duration}

    def _policy(self, name: str, duration: str | None) -> bool:
        quoted = quote_ident(name)
        found = self._policies.get(name)
        if found is None:
            # An influxd may be told to make databases without any.
            default = "" if self._default else " DEFAULT"
            self._do(
                f"CREATE RETENTION POLICY {quoted} ON {self._quoted} "
                f"DURATION {duration or 'INF'} REPLICATION 1{default}"
            )
            self._default = self._default or name
            return True
        if duration is None or _seconds(found) == _seconds(duration):
            self._say(f"-- there: the retention policy {quoted}")
            return True
        # Without the last two words a duration below the old shards' is refused.
        alter = f"ALTER RETENTION POLICY {quoted} ON {self._quoted} DURATION {duration} "
        differs = f"the retention policy {quoted} keeps points for {_long(found)}, not {duration}"
        return self._change(differs, alter + "SHARD DURATION 0s")

    def _continuous_query(self, name: str, text: str, *, is_there: bool) -> bool:
        """Which is the same query as before, the server tells: it takes that one again."""
        if not is_there:
            self._do(text)
            return True
        try:
            self._database.post(text)
        except QueryError as error:
            if "already exists" not in str(error):
                raise
        else:
            self._say(f"-- there: the continuous query {quote_ident(name)}")
            return True
        drop = f"DROP CONTINUOUS QUERY {quote_ident(name)} ON {self._quoted}"
        differs = f"the continuous query {quote_ident(name)} is another one"
        return self._change(differs, drop, text)

    def _change(self, what: str, *statements: str) -> bool:
        if not self._alter:
            self._say(f"-- kept: {what}; --alter changes it")
            return False
        for statement in statements:
            self._do(statement)
        return True

    def _do(self, statement: str) -> None:
        self._changed = True
        if not self._dry_run:
            self._database.post(statement)
        self._say(f"{statement};")

    def _ask(self, statement: str, series: str | None = None) -> list[dict[str, Any]]:
        if self._dry_run:
            return []
        found = self._database.query(statement)
        return [row for each in found if series in (None, each.name) for row in each.rows()]


def continuous_query(
    name: str, database: str, source: str, measurement: Measurement, every: str
) -> str:
    """The statement that keeps one point of a measurement for each interval and set of tags.

    Of each number its mean, by its own name, its maximum and its count. The mean of an integer is a
    float: in a retention policy of its own a field has a type of its own.
    """
    fields = [column.name for column in measurement.columns if column.type in ("float", "int")]
    kept = ", ".join(
        f"{function}({quote_ident(field)}) AS {quote_ident(field + suffix)}"
        for field in fields
        for function, suffix in (("mean", ""), ("max", "_max"), ("count", "_count"))
    )
    where, table = quote_ident(database), quote_ident(measurement.name)
    target, origin = quote_ident(f"every_{every}"), quote_ident(source)
    # An interval is computed again at the end of the next: until then its last points come.
    resample = f"RESAMPLE FOR {2 * int(every[:-1])}{every[-1]}"
    return (
        f"CREATE CONTINUOUS QUERY {quote_ident(name)} ON {where} {resample} BEGIN SELECT {kept} "  # noqa: S608 - all names are quoted
        f"INTO {where}.{target}.{table} FROM {where}.{origin}.{table} GROUP BY time({every}), * END"
    )


def _long(duration: str) -> str:
    return duration if _seconds(duration) else "ever"


def _seconds(duration: str) -> int:
    """Of ``30d``, or of ``720h0m0s`` as influxd says it; 0: for ever."""
    return sum(int(number) * _SECONDS[unit] for number, unit in _PIECE.findall(duration))


# -- configuration of servers --------------------------------------------------------------------

#: Bytes that a server's socket holds: a second of what UDP may send, but no less than this.
_LEAST_BUFFER = 8_388_608
_MOST_BUFFER = 1 << 30
_TELEGRAF_UNITS = {"u": "1us", "ms": "1ms", "s": "1s"}
_LISTENS = {
    "udp": "udp://:{udp_port}",
    "tcp": "tcp://:{tcp_port}",
    "unixgram": "unixgram://{socket_path}",
    "http": ":{http_port}",
}


def configuration(options: DatabaseOptions, *, is_telegraf: bool = False) -> str:
    """What influxd.conf, the kernel and Telegraf need, for one entry; "" where that is nothing.

    ``is_telegraf``: no InfluxDB is at the entry's HTTP port, but a Telegraf.
    """
    parts: list[str] = []
    buffer = min(max(_LEAST_BUFFER, options.bytes_per_second), _MOST_BUFFER)
    if options.transport == "udp":
        parts += ["\n# influxdb.conf", *_udp(options, buffer)]
        parts += ["\n# /etc/sysctl.d/60-influxdb.conf, read by: sysctl --system"]
        parts += [f"net.core.rmem_max = {buffer}"]
    if options.transport != "http" or is_telegraf:
        instead = " instead of InfluxDB itself" if options.transport == "udp" else ""
        parts += [f"\n# telegraf.conf, for a Telegraf that listens there{instead}"]
        parts += _telegraf(options, buffer, is_telegraf=is_telegraf)
    return "\n".join([*parts, ""]) if parts else ""


def _udp(options: DatabaseOptions, buffer: int) -> Iterator[str]:
    yield "[[udp]]"
    yield "  enabled = true"
    yield f'  bind-address = ":{options.udp_port}"'
    yield f"  database = {_toml(options.database or options.name)}"
    if options.retention_policy:
        yield f"  retention-policy = {_toml(options.retention_policy)}"
    yield "  batch-size = 5000"
    yield '  batch-timeout = "1s"'
    yield f"  read-buffer = {buffer}"
    yield f"  precision = {_toml(options.precision.replace('ns', ''))}"


def _telegraf(options: DatabaseOptions, buffer: int, *, is_telegraf: bool) -> Iterator[str]:
    listens = _LISTENS[options.transport].format(
        udp_port=options.udp_port,
        tcp_port=options.tcp_port,
        http_port=options.http_port,
        socket_path=options.socket_path,
    )
    by_http = options.transport == "http"
    yield "[[inputs.influxdb_listener]]" if by_http else "[[inputs.socket_listener]]"
    yield f"  service_address = {_toml(listens)}"
    if by_http:
        yield from _listens_by_http(options)
    else:
        if options.transport == "udp":
            yield f"  read_buffer_size = {buffer}"
        yield '  data_format = "influx"'
        if options.precision in _TELEGRAF_UNITS:
            yield f"  influx_timestamp_precision = {_toml(_TELEGRAF_UNITS[options.precision])}"
    yield "[[outputs.influxdb]]"
    influxdb = "http://localhost:8086" if is_telegraf else _influxdb(options)
    yield f"  urls = [{_toml(influxdb)}]  # where InfluxDB is"
    yield f"  database = {_toml(options.database or options.name)}"
    if options.retention_policy:
        yield f"  retention_policy = {_toml(options.retention_policy)}"
    yield "  skip_database_creation = true"
    if (options.username or options.token) and not is_telegraf:
        yield "  # and the credentials, which are not shown here"


def _listens_by_http(options: DatabaseOptions) -> Iterator[str]:
    """What the entry says of a Telegraf; each request says the unit of its times."""
    if options.secure:
        yield '  tls_cert = "/etc/telegraf/cert.pem"  # where its certificate is'
        yield '  tls_key = "/etc/telegraf/key.pem"'
    if options.client_certificate:
        yield '  tls_allowed_cacerts = ["/etc/telegraf/clientca.pem"]'
    if options.username:
        yield "  # and basic_username and basic_password, which are not shown here"


def _influxdb(options: DatabaseOptions) -> str:
    if not options.http_port:
        return "http://localhost:8086"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'https' if options.secure else 'http'}://{host}:{options.http_port}"


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
