"""What the HTTP APIs of InfluxDB's versions call the same things, a row for each.

InfluxDB 1.x: https://docs.influxdata.com/influxdb/v1/tools/api/ (tried on 1.6.7; VictoriaMetrics
takes the same). From their documents alone, with no server to try them on:
2.x: https://docs.influxdata.com/influxdb/v2/api/write-data/ and .../v2/reference/api/influxdb-1x/;
3.x: https://docs.influxdata.com/influxdb3/core/api/write-data/ and .../api/query-data/. Both answer
InfluxQL at 1.x's address, in 1.x's form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from celery_influx.transports.answers import bad_lines, rejected_lines


class Server(NamedTuple):
    """One version's ways.

    Attributes:
        write: Path to write to.
        database: The parameter that names the database there.
        retention_policy: The one that names its retention policy; "": a part of the database's
            name, after a "/".
        organization: The one that names the organization; "": there is none.
        precision: Our units of time to its words.
        scheme: Of a token, in the header ``Authorization``.
        alive: Status of the answer to a ping.
        rejected: How many lines an answer of 400 says were rejected, the others being stored; 0: it
            speaks of other things. Of its words, its JSON and the payload.
    """

    write: str
    database: str
    retention_policy: str
    organization: str
    precision: Mapping[str, str]
    scheme: str
    alive: int
    rejected: Callable[[str, object, bytes], int]


#: By the option ``api``.
SERVERS = {
    "1": Server(
        write="/write",
        database="db",
        retention_policy="rp",
        organization="",
        precision={"ns": "ns", "u": "u", "ms": "ms", "s": "s"},
        scheme="Token",
        alive=204,
        rejected=lambda words, _, payload: rejected_lines(words, payload),
    ),
    "2": Server(
        write="/api/v2/write",
        database="bucket",
        retention_policy="",
        organization="org",
        precision={"ns": "ns", "u": "us", "ms": "ms", "s": "s"},
        scheme="Token",
        alive=204,
        # A bad line spoils its whole batch, and no number is given.
        rejected=lambda *_: 0,
    ),
    "3": Server(
        write="/api/v3/write_lp",
        database="db",
        retention_policy="",
        organization="",
        precision={"ns": "nanosecond", "u": "microsecond", "ms": "millisecond", "s": "second"},
        scheme="Bearer",
        alive=200,
        rejected=lambda _, said, __: len(bad_lines(said)),
    ),
}
