"""Configuration: every option's every mistake by its full text; URLs; and no secret in any of it."""

from __future__ import annotations

import dataclasses
import enum
import re
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_influx.errors import ConfigError
from celery_influx.options import DatabaseOptions, Options, expectation, load

DATABASE_FIELDS = [field for field in dataclasses.fields(DatabaseOptions) if field.metadata]
SETTINGS = list(dataclasses.fields(Options))

#: What each option takes, in the words of its errors. A new option needs a row here.
TAKES = {
    "transport": "one of 'udp', 'http', 'tcp', 'unixgram'",
    "host": "a string",
    "udp_port": "a whole number at least 1 and at most 65535",
    "http_port": "a whole number at least 0 and at most 65535",
    "tcp_port": "a whole number at least 1 and at most 65535",
    "socket_path": "a string or None",
    "secure": "True or False",
    "ca_file": "a string or None",
    "client_certificate": "a string or None",
    "client_key": "a string or None",
    "insecure": "True or False",
    "database": "a string",
    "api": "one of '1', '2', '3', 'victoria', 'victoria-cluster'",
    "tenant": "a string",
    "organization": "a string or None",
    "username": "a string or None",
    "password": "a string or None",
    "password_file": "a string or None",
    "password_env": "a string or None",
    "token": "a string or None",
    "token_file": "a string or None",
    "token_env": "a string or None",
    "retention_policy": "a string or None",
    "epoch": "one of 'ns', 'u', 'ms', 's', 'm', 'h'",
    "precision": "one of 'ns', 'u', 'ms', 's'",
    "field_types": "True or False",
    "batch_size": "a whole number at least 1 and at most 1000000",
    "batch_bytes": "a whole number of bytes at least 1024 and at most 25000000",
    "datagram_bytes": "a whole number of bytes at least 64 and at most 65507 or None",
    "bytes_per_second": "a whole number of bytes at least 1024 and at most 10000000000",
    "queue_size": "a whole number at least 1 and at most 100000000",
    "queue_bytes": "a whole number of bytes at least 1024 and at most 1000000000000",
    "flush_interval": "seconds greater than 0 and at most 3600",
    "pool_size": "a whole number at least 1 and at most 64",
    "http_timeout": "seconds greater than 0 and at most 600",
    "retry_age": "seconds at least 0 and at most 604800",
    "retry_tries": "a whole number at least 1 and at most 1000000",
    "spool_dir": "a string or None",
    "spool_bytes": "a whole number of bytes at least 65536 and at most 1000000000000000",
    "spool_mode": "one of 'failed', 'always'",
    "spool_fsync": "True or False",
    "query_rows": "a whole number at least 1 and at most 1000000000",
    "query_bytes": "a whole number of bytes at least 1024 and at most 1000000000000",
    "gzip": "True or False",
}
SETTING_TAKES = {
    "databases": "a mapping",
    "default_database": "a string",
    "tags": "a mapping",
    "strict": "True or False",
    "task_points": "True or False",
    "task_ids": "True or False",
    "eager": "True or False",
    "enabled": "True or False",
    "allow_post": "True or False",
    "shutdown_timeout": "seconds at least 0",
}
#: For each option with a range: values outside of it, and the ends that are inside.
LIMITS: dict[str, tuple[list[float], list[float]]] = {
    "udp_port": ([0, -1, 65_536], [1, 65_535]),
    "http_port": ([-1, 65_536], [0, 65_535]),
    "tcp_port": ([0, 65_536], [1, 65_535]),
    "batch_size": ([0, 1_000_001], [1, 1_000_000]),
    "batch_bytes": ([1_023, 25_000_001], [1_024, 25_000_000]),
    "datagram_bytes": ([63, 65_508], [64, 65_507]),
    "queue_size": ([0, 100_000_001], [1, 100_000_000]),
    "queue_bytes": ([1_023, 0, 10**12 + 1], [1_024, 10**12]),
    "flush_interval": ([0, -1, 0.0, 3600.1], [0.001, 3600]),
    "bytes_per_second": ([1_023, 10_000_000_001], [1_024, 10_000_000_000]),
    "pool_size": ([0, 65], [1, 64]),
    "http_timeout": ([0, -0.5, 601], [0.1, 600]),
    "retry_age": ([-1, -0.001, 604_801], [0, 604_800]),
    "retry_tries": ([0, 1_000_001], [1, 1_000_000]),
    "spool_bytes": ([65_535, 10**15 + 1], [65_536, 10**15]),
    "query_rows": ([0, 1_000_000_001], [1, 1_000_000_000]),
    "query_bytes": ([1_023, 10**12 + 1], [1_024, 10**12]),
    "shutdown_timeout": ([-1, -0.001], [0, 10]),
}
#: Also where a secret is to be found: some would write the secret itself there.
SECRETS = {f"{name}{place}" for name in ("password", "token") for place in ("", "_file", "_env")}

#: Values of a wrong type for each type of option, and how an error shows them.
WRONG: dict[type, list[tuple[object, str]]] = {
    int: [
        ("7", "'7'"),
        (1.5, "1.5"),
        (True, "True"),
        ([1], "a value of type list"),
        (10**400, "a value of type int"),
        (float("nan"), "nan"),
    ],
    float: [
        ("1", "'1'"),
        (True, "True"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (10**400, "a value of type int"),
        ({}, "a value of type dict"),
    ],
    str: [(5, "5"), (b"x", "a value of type bytes"), (["x"], "a value of type list")],
    bool: [("yes", "'yes'"), (1, "1"), (0, "0"), ([], "a value of type list")],
    dict: [("x", "'x'"), (["x"], "a value of type list"), (None, "None"), (5, "5")],
}


def mistakes(**influx: Any) -> list[str]:
    """The lines of the ConfigError for these settings."""
    with pytest.raises(ConfigError) as caught:
        load({f"influx_{key}": value for key, value in influx.items()})
    return str(caught.value).split("\n")


def mistakes_of(entry: object) -> list[str]:
    return mistakes(databases={"m": entry})


def database(entry: object) -> DatabaseOptions:
    return load({"influx_databases": {"m": entry}}).databases["m"]


def changed(options: DatabaseOptions) -> dict[str, Any]:
    """What differs from an entry ``m`` of which nothing was said."""
    base = DatabaseOptions(name="m", database="m")
    return {key: value for key, value in vars(options).items() if value != getattr(base, key)}


# -- every option ------------------------------------------------------------------------------


def test_every_option_has_its_rows_in_these_tables() -> None:
    ranged = {
        field.name
        for field in [*DATABASE_FIELDS, *SETTINGS]
        if any(field.metadata[bound] is not None for bound in ("at_least", "at_most", "above"))
    }

    assert set(TAKES) == {field.name for field in DATABASE_FIELDS}
    assert set(SETTING_TAKES) == {field.name for field in SETTINGS}
    assert set(LIMITS) == ranged
    assert {field.name for field in DATABASE_FIELDS if field.metadata["secret"]} == SECRETS


@pytest.mark.parametrize("field", [*DATABASE_FIELDS, *SETTINGS], ids=lambda field: field.name)
def test_every_option_says_what_it_takes_and_means(field: dataclasses.Field[Any]) -> None:
    assert expectation(field) == {**TAKES, **SETTING_TAKES}[field.name]
    assert field.metadata["doc"].endswith(".")


@pytest.mark.parametrize("field", DATABASE_FIELDS, ids=lambda field: field.name)
def test_an_option_of_the_wrong_type_is_named_with_what_it_takes(
    field: dataclasses.Field[Any],
) -> None:
    wrong = list(WRONG[field.metadata["kind"]])
    if not field.metadata["optional"]:
        wrong.append((None, "None"))

    for value, shown in wrong:
        got = f"a value of type {type(value).__name__}" if field.name in SECRETS else shown
        where = f"influx_databases['m'][{field.name!r}]"

        assert mistakes_of({field.name: value})[0] == (
            f"{where}: expected {TAKES[field.name]}, got {got}"
        )


@pytest.mark.parametrize("field", SETTINGS, ids=lambda field: field.name)
def test_a_setting_of_the_wrong_type_is_named_with_what_it_takes(
    field: dataclasses.Field[Any],
) -> None:
    for value, shown in [*WRONG[field.metadata["kind"]], (None, "None")]:
        expected = f"influx_{field.name}: expected {SETTING_TAKES[field.name]}, got {shown}"

        assert mistakes(**{field.name: value}) == [expected]


@pytest.mark.parametrize("name", LIMITS)
def test_a_value_outside_its_range_is_named_and_one_at_its_end_is_taken(name: str) -> None:
    outside, inside = LIMITS[name]

    for value in outside:
        if name in TAKES:
            expected = f"influx_databases['m'][{name!r}]: expected {TAKES[name]}, got {value!r}"
            assert mistakes_of({name: value}) == [expected]
        else:
            expected = f"influx_{name}: expected {SETTING_TAKES[name]}, got {value!r}"
            assert mistakes(**{name: value}) == [expected]
    for value in inside:
        if name in TAKES:
            assert getattr(database({name: value}), name) == value
        else:
            assert getattr(load({f"influx_{name}": value}), name) == value


@pytest.mark.parametrize("name", ["transport", "api", "epoch", "precision", "spool_mode"])
def test_an_unknown_choice_is_named_with_the_choices(name: str) -> None:
    for value in ("us", "", "UDP"):
        expected = f"influx_databases['m'][{name!r}]: expected {TAKES[name]}, got {value!r}"

        assert mistakes_of({name: value}) == [expected]


def test_every_option_that_has_choices_is_tried() -> None:
    with_choices = {field.name for field in DATABASE_FIELDS if field.metadata["choices"]}

    assert with_choices == {"transport", "api", "epoch", "precision", "spool_mode"}


def test_a_choice_may_be_a_string_enum_and_is_kept_as_plain_text() -> None:
    class Word(str, enum.Enum):
        MS = "ms"

    assert type(database({"precision": Word.MS}).precision) is str
    assert database({"precision": Word.MS}).precision == "ms"
    assert mistakes_of({"transport": Word.MS}) == [
        "influx_databases['m']['transport']: expected one of 'udp', 'http', 'tcp', 'unixgram', got 'ms'"
    ]


def test_a_whole_number_serves_where_seconds_are_wanted() -> None:
    assert database({"flush_interval": 2}).flush_interval == 2.0
    assert type(database({"flush_interval": 2}).flush_interval) is float


@pytest.mark.parametrize("name", [f.name for f in DATABASE_FIELDS if f.metadata["optional"]])
def test_an_option_that_may_be_none_takes_none(name: str) -> None:
    assert getattr(database({name: None}), name) is None


@pytest.mark.parametrize("field", DATABASE_FIELDS, ids=lambda field: field.name)
def test_a_typing_error_in_an_option_is_answered_with_the_option(
    field: dataclasses.Field[Any],
) -> None:
    typed = field.name[:-1] + "_" + field.name[-1]

    assert mistakes_of({typed: 1}) == [
        f"influx_databases['m']: unknown option {typed!r}; did you mean {field.name!r}?"
    ]


@pytest.mark.parametrize("field", SETTINGS, ids=lambda field: field.name)
def test_a_typing_error_in_a_setting_is_answered_with_the_setting(
    field: dataclasses.Field[Any],
) -> None:
    typed = f"influx_{field.name[:-1]}"

    with pytest.raises(ConfigError) as caught:
        load({typed: 1})

    assert str(caught.value) == (f"unknown setting {typed!r}; did you mean 'influx_{field.name}'?")


def test_an_unknown_option_like_none_is_answered_with_all_of_them() -> None:
    assert mistakes_of({"zzz": 1}) == [
        "influx_databases['m']: unknown option 'zzz'; expected one of " + ", ".join(TAKES)
    ]
    assert mistakes_of({5: 1}) == [
        "influx_databases['m']: unknown option 5; expected one of " + ", ".join(TAKES)
    ]


def test_an_unknown_setting_like_none_is_answered_with_all_of_them() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"influx_zzzzzzzzzzzzzzzzzzzzzzzz": 1})

    assert str(caught.value) == (
        "unknown setting 'influx_zzzzzzzzzzzzzzzzzzzzzzzz'; expected one of "
        + ", ".join(f"influx_{name}" for name in SETTING_TAKES)
    )


# -- what goes together ------------------------------------------------------------------------


def test_nothing_configured_is_one_database_on_localhost() -> None:
    options = load({})

    assert options.default_database == "celery"
    assert options.databases == {"celery": DatabaseOptions(name="celery", database="celery")}
    assert options.databases["celery"].host == "localhost"
    assert options.databases["celery"].udp_port == 8089
    assert options.databases["celery"].http_port == 8086


def test_the_first_database_is_the_default_one() -> None:
    assert load({"influx_databases": {"b": "udp://b", "a": "udp://a"}}).default_database == "b"


def test_a_default_database_that_is_not_there_is_named_with_those_that_are() -> None:
    assert mistakes(databases={"a": "udp://a", "b": "udp://b"}, default_database="c") == [
        "influx_default_database: 'c' is not in influx_databases; expected one of 'a', 'b'"
    ]


def test_a_default_database_is_not_blamed_where_the_databases_could_not_be_read() -> None:
    assert mistakes(databases=5, default_database="a") == [
        "influx_databases: expected a mapping, got 5"
    ]


@pytest.mark.parametrize("name", [5, None, "", ("a",)])
def test_a_database_needs_a_name(name: object) -> None:
    assert mistakes(databases={name: "udp://a"})[0] == (
        f"influx_databases[{name!r}]: expected a name that is a string, got {name!r}"
    )


@pytest.mark.parametrize(
    ("entry", "shown"), [(5, "5"), (None, "None"), (["udp://a"], "a value of type list")]
)
def test_a_database_that_is_neither_url_nor_mapping_is_refused(entry: object, shown: str) -> None:
    assert mistakes_of(entry) == [
        (
            "influx_databases['m']: expected a URL (udp://host:8089, http://host:8086/database) or a "
            f"mapping of options, got {shown}"
        )
    ]


def test_any_mapping_serves_as_options() -> None:
    assert database(MappingProxyType({"host": "a"})).host == "a"


def test_http_without_a_port_is_refused() -> None:
    assert mistakes_of({"transport": "http", "http_port": 0}) == [
        "influx_databases['m']['http_port']: expected a port for transport 'http', got 0"
    ]


def test_token_and_password_together_are_refused() -> None:
    assert mistakes_of({"token": "t", "username": "u", "password": "p"}) == [
        "influx_databases['m']: both a token and a username or password; expected one of the two"
    ]


@pytest.mark.parametrize("secret", ["token", "password"])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["", "_file"], "'S' and 'S_file'"),
        (["", "_env"], "'S' and 'S_env'"),
        (["_file", "_env"], "'S_file' and 'S_env'"),
        (["", "_file", "_env"], "'S' and 'S_file' and 'S_env'"),
    ],
)
def test_a_secret_has_one_source(secret: str, given: list[str], named: str) -> None:
    entry = {f"{secret}{place}": "hunter2" for place in given}
    entry |= {"username": "u"} if secret == "password" else {}

    assert mistakes_of(entry) == [
        f"influx_databases['m']: {named.replace('S', secret)} are given; expected one of them"
    ]


@pytest.mark.parametrize("place", ["_file", "_env"])
def test_a_secret_from_elsewhere_is_as_good_as_one_that_is_given(place: str) -> None:
    entry = {"username": "u", f"password{place}": "x"}

    assert getattr(database(entry), f"password{place}") == "x"
    assert getattr(database(f"https://u@h/d?password{place}=/x"), f"password{place}") == "/x"
    assert mistakes_of({f"password{place}": "x"}) == [
        "influx_databases['m']: 'username' is missing; basic authentication needs both"
    ]
    assert mistakes_of({**entry, f"token{place}": "x"}) == [
        "influx_databases['m']: both a token and a username or password; expected one of the two"
    ]


def test_any_certificate_or_those_of_a_file_are_trusted_but_not_both() -> None:
    assert database({"insecure": True}).insecure
    assert mistakes_of({"insecure": True, "ca_file": "x"}) == [
        (
            "influx_databases['m']: both 'insecure' and 'ca_file'; expected one of the two: trust "
            "any certificate, or those that this file signed"
        )
    ]


def test_a_clients_key_belongs_to_a_certificate() -> None:
    assert database({"client_certificate": "x"}).client_key is None
    assert mistakes_of({"client_key": "x"}) == [
        "influx_databases['m']: 'client_certificate' is missing; 'client_key' belongs to it"
    ]


@pytest.mark.parametrize(("given", "missing"), [("username", "password"), ("password", "username")])
def test_half_of_basic_authentication_is_refused(given: str, missing: str) -> None:
    assert mistakes_of({given: "x"}) == [
        f"influx_databases['m']: {missing!r} is missing; basic authentication needs both"
    ]


@pytest.mark.parametrize(
    "host", ["h:8089", "[::1]", "http://h", "h/db", "a b", "", "h\n", "\0", "h#", ":80", "h?x"]
)
def test_a_host_is_a_name_or_an_address_alone(host: str) -> None:
    shown = repr(host) if not set(host) & set("@?=&") else "a value of type str"

    assert mistakes_of({"host": host}) == [
        (
            "influx_databases['m']['host']: expected a host name or address alone, such as "
            f"'influx.example' or '::1', without scheme, port or brackets, got {shown}"
        )
    ]


@pytest.mark.parametrize(
    "host",
    ["localhost", "influx.example.", "10.0.0.1", "::1", "fe80::1%eth0", "::ffff:1.2.3.4", "müller"],
)
def test_names_and_addresses_of_all_kinds_are_hosts(host: str) -> None:
    assert database({"host": host}).host == host


def test_constant_tags_that_cannot_be_stored_are_named() -> None:
    assert mistakes(tags={"time": "x"}) == [
        (
            "influx_tags: constant tags: tag key 'time' is the name of InfluxDB's own time column; "
            "choose another one"
        )
    ]


def test_all_mistakes_are_named_at_once() -> None:
    found = mistakes(
        databases={
            "a": "udp://a:0?pool_size=0",
            "b": {"udp_prot": 1, "http_timeout": "soon"},
            3: {},
        },
        default_database="c",
        strict="yes",
        tags={5: "x"},
        task_point=True,
    )

    assert found == [
        "influx_strict: expected True or False, got 'yes'",
        "unknown setting 'influx_task_point'; did you mean 'influx_task_points'?",
        (
            "influx_databases['a']['udp_port']: expected a whole number at least 1 and at most 65535,"
            " got 0"
        ),
        (
            "influx_databases['a']['pool_size']: expected a whole number at least 1 and at most 64,"
            " got '0'"
        ),
        "influx_databases['b']: unknown option 'udp_prot'; did you mean 'udp_port'?",
        (
            "influx_databases['b']['http_timeout']: expected seconds greater than 0 and at most 600,"
            " got 'soon'"
        ),
        "influx_databases[3]: expected a name that is a string, got 3",
        "influx_default_database: 'c' is not in influx_databases; expected one of 'a', 'b', 3",
        "influx_tags: constant tags: tags: key 5: expected a str",
    ]


# -- URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("udp://influx.example", {"host": "influx.example"}),
        ("udp://influx.example:9000", {"host": "influx.example", "udp_port": 9000}),
        ("udp://", {}),
        ("udp://:9000", {"udp_port": 9000}),
        ("UDP://Influx.Example", {"host": "influx.example"}),
        ("udp://[::1]", {"host": "::1"}),
        ("udp://[2001:db8::1]:9000", {"host": "2001:db8::1", "udp_port": 9000}),
        ("udp://h/sales", {"host": "h", "database": "sales"}),
        ("http://h", {"transport": "http", "host": "h"}),
        ("http://h:1/", {"transport": "http", "host": "h", "http_port": 1}),
        ("https://h", {"transport": "http", "host": "h", "secure": True}),
        (
            "https://[::1]:8443/my%20db%2F",
            {
                "transport": "http",
                "host": "::1",
                "http_port": 8443,
                "secure": True,
                "database": "my db/",
            },
        ),
        (
            "http://us%40er:s%3Ae%2Fc%23r%3Fe%25t%C3%BC@h/d",
            {
                "transport": "http",
                "host": "h",
                "username": "us@er",
                "password": "s:e/c#r?e%tü",
                "database": "d",
            },
        ),
        ("http://h?token=a%2Bb%3D%3D", {"transport": "http", "host": "h", "token": "a+b=="}),
        (
            (
                "http://h/d?retention_policy=week&precision=ms&http_timeout=0.5&batch_size=10"
                "&udp_port=99"
            ),
            {
                "transport": "http",
                "host": "h",
                "database": "d",
                "retention_policy": "week",
                "precision": "ms",
                "http_timeout": 0.5,
                "batch_size": 10,
                "udp_port": 99,
            },
        ),
        (
            "udp://h?datagram_bytes=1472&http_port=0",
            {"host": "h", "datagram_bytes": 1472, "http_port": 0},
        ),
        ("udp://h?secure=yes", {"host": "h", "secure": True}),
        ("udp://h?secure=False", {"host": "h"}),
        ("udp://h?http_timeout=2", {"host": "h", "http_timeout": 2.0}),
        ("tcp://h", {"host": "h", "transport": "tcp", "http_port": 0}),
        (
            "tcp://h:9009?http_port=9000&retry_age=60",
            {
                "host": "h",
                "transport": "tcp",
                "tcp_port": 9009,
                "http_port": 9000,
                "retry_age": 60.0,
            },
        ),
        (
            "unixgram:///run/tele%20graf@1.sock?datagram_bytes=8000",
            {
                "transport": "unixgram",
                "socket_path": "/run/tele graf@1.sock",
                "http_port": 0,
                "datagram_bytes": 8000,
            },
        ),
        ("udp://h?password=p&username=5", {"host": "h", "username": "5", "password": "p"}),
    ],
)
def test_a_url_stands_for_options(url: str, expected: dict[str, Any]) -> None:
    assert changed(database(url)) == expected


def test_every_option_can_be_said_in_a_url() -> None:
    words = {"spool_dir": "/word", "tenant": "7"}
    for field in DATABASE_FIELDS:
        if field.name in ("transport", "host", "username", "password", "secure"):
            continue
        others = {"client_key": "&client_certificate=c"}  # what it does not go without
        others |= dict.fromkeys(("password_file", "password_env"), "&username=u")
        value = {
            int: "10000000" if "spool" in field.name else "1024" if "bytes" in field.name else "7",
            float: "1.5",
            bool: "True",
            str: (field.metadata["choices"] or (words.get(field.name, "word"),))[-1],
        }[field.metadata["kind"]]

        found = getattr(
            database(f"http://h?{field.name}={value}{others.get(field.name, '')}"), field.name
        )

        assert found == field.metadata["kind"](value)
        assert type(found) is field.metadata["kind"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "ftp://h",
            (
                "influx_databases['m']: unknown scheme 'ftp'; expected udp://host:8089, "
                "http://host:8086/database, https://…, tcp://host:8094 or unixgram:///path"
            ),
        ),
        *(
            (
                url,
                (
                    "influx_databases['m']: a URL without a scheme; expected udp://host:8089, "
                    "http://host:8086/database, https://…, tcp://host:8094 or unixgram:///path"
                ),
            )
            for url in ("h", "localhost:8089", "", "udp:h:8089", "user:secret@h", "//h:80")
        ),
        *(
            (
                url,
                (
                    "influx_databases['m']: not a URL with a host and a port up to 65535; expected "
                    "udp://host:8089 or the like, a password's special characters as %XX"
                ),
            )
            for url in ("udp://h:65536", "udp://h:x", "udp://[::1", "udp://u:p:q", "udp://h:-1")
        ),
        *(
            (
                url,
                (
                    "influx_databases['m']: a '#' or a second '@' in the URL; expected "
                    "udp://host:8089 or the like, a password's special characters as %XX"
                ),
            )
            for url in ("http://u:1#p@h", "http://u:1/p@h", "http://u:1?p@h", "udp://h#x")
        ),
        (
            "http://proxy/influx/db",
            (
                "influx_databases['m']: a URL's path is the database, and this one has a '/' in "
                "it; expected http://host:8086/database, and %2F where the name has one"
            ),
        ),
        (
            "udp://h:0",
            (
                "influx_databases['m']['udp_port']: expected a whole number at least 1 and at most "
                "65535, got 0"
            ),
        ),
        (
            "http://h:0",
            "influx_databases['m']['http_port']: expected a port for transport 'http', got 0",
        ),
        (
            "udp://h?pool_size=2&pool_size=3",
            "influx_databases['m']: 'pool_size' is given twice in the URL; expected it once",
        ),
        (
            "udp://h:1?udp_port=1",
            "influx_databases['m']: 'udp_port' is given twice in the URL; expected it once",
        ),
        (
            "https://h?secure=true",
            "influx_databases['m']: 'secure' is given twice in the URL; expected it once",
        ),
        (
            "unixgram://run/socket",
            (
                "influx_databases['m']: a host in a unixgram URL; expected three slashes, "
                "unixgram:///path"
            ),
        ),
        (
            "unixgram://",
            (
                "influx_databases['m']['socket_path']: expected unixgram:///path/of/the/socket, or "
                "the option 'socket_path', of at most 107 bytes"
            ),
        ),
        (
            "unixgram://user:secret@/run/a",
            (
                "influx_databases['m']: a host in a unixgram URL; expected three slashes, "
                "unixgram:///path"
            ),
        ),
        *(
            (
                f"unixgram://{path}",
                (
                    "influx_databases['m']['socket_path']: expected "
                    "unixgram:///path/of/the/socket, or the option 'socket_path', of at most 107 "
                    "bytes"
                ),
            )
            for path in ("/", "/" + "x" * 107, "/" + "é" * 54, "/%ED%A0%80" * 12)
        ),
        (
            "http://h/b?api=2&token=t",
            "influx_databases['m']['organization']: missing; InfluxDB 2.x wants the bucket's",
        ),
        *(
            (
                f"http://h?api=victoria-cluster&tenant={tenant}",
                (
                    "influx_databases['m']['tenant']: expected numbers as in '7' or '7:2', or "
                    f"'multitenant', got {tenant!r}"
                ),
            )
            for tenant in ("", "a", "1:2:3", "1:", "-1", "1/2", "12345678901", "١")
        ),
        (
            "udp://h?spool_dir=/var/spool/x",
            (
                "influx_databases['m']['spool_dir']: UDP does not say what did not arrive; expected "
                "the transport 'http', 'tcp' or 'unixgram'"
            ),
        ),
        (
            "http://h/b?spool_dir=spool",
            (
                "influx_databases['m']['spool_dir']: expected an absolute path, since a worker's own "
                "folder may change, got 'spool'"
            ),
        ),
        (
            "http://h/b?spool_dir=/x&spool_bytes=2000000",
            (
                "influx_databases['m']['spool_bytes']: expected room for two batches, 2097152 bytes "
                "with this 'batch_bytes', got 2000000"
            ),
        ),
        (
            "unixgram:///run/a?socket_path=/run/b",
            "influx_databases['m']: 'socket_path' is given twice in the URL; expected it once",
        ),
        (
            "udp://h?pool_sise=2",
            "influx_databases['m']: unknown option 'pool_sise'; did you mean 'pool_size'?",
        ),
        (
            "udp://h?zz=2",
            "influx_databases['m']: unknown option in the URL's query; expected one of "
            + ", ".join(TAKES),
        ),
        (
            "udp://a%20b",
            (
                "influx_databases['m']['host']: expected a host name or address alone, such as "
                "'influx.example' or '::1', without scheme, port or brackets, got 'a b'"
            ),
        ),
        (
            "http://u@h",
            "influx_databases['m']: 'password' is missing; basic authentication needs both",
        ),
    ],
)
def test_a_url_with_a_mistake_is_answered_by(url: str, expected: str) -> None:
    if "%20" in url:
        url = url.replace("%20", " ")

    assert mistakes_of(url) == [expected]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_size", "two"),
        ("pool_size", "2.5"),
        ("pool_size", ""),
        ("http_timeout", "nan"),
        ("http_timeout", "inf"),
        ("http_timeout", "1e999"),
        ("flush_interval", "-1"),
        ("secure", "maybe"),
        ("secure", ""),
        ("epoch", "us"),
        ("udp_port", "70000"),
        ("datagram_bytes", "1"),
        ("queue_size", "9" * 50),
    ],
)
def test_a_value_in_a_url_is_checked_as_its_option_is(name: str, value: str) -> None:
    assert mistakes_of(f"udp://h?{name}={value}") == [
        f"influx_databases['m'][{name!r}]: expected {TAKES[name]}, got {value!r}"
    ]


# -- secrets -----------------------------------------------------------------------------------

CORE = "hunter2"
SECRET = st.builds(
    lambda before, after: before + CORE + after,
    st.text(st.characters(codec="utf-8"), max_size=6) | st.text("@:/?#&=%[]12\\ \n", max_size=6),
    st.text(st.characters(codec="utf-8"), max_size=6) | st.text("@:/?#&=%[]12\\ \n", max_size=6),
)
PLACES = [
    "http://user:{}@host:8086/db",
    "http://user:{}@host:99999/db",
    "ftp://user:{}@host/db",
    "user:{}@host",
    "{}:{}@host",
    "http://{}@host/db",
    "http://user:{}@host/db?pool_size=0&zz=1",
    "http://user:{}@[::1/db",
    "http://h/db?token={}",
    "http://h/db?username=u&password={}",
    "http://h/db?token={}&token={}",
    "http://h/db?token={}&username=u&password={}",
    "http://h/db?tokn={}",
    "http://user:12/{}@host",
    "http://user:12?{}@host",
    "http://user:12#{}@host",
    "http://user:12?a={}&b@host",
]


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(PLACES), secret=SECRET)
def test_no_secret_of_a_url_gets_into_an_error(place: str, secret: str) -> None:
    url = place.replace("{}", secret)

    for configuration in (
        {"influx_databases": {"m": url}},
        {"influx_databases": url},
        {"influx_databases": [url]},
        {"influx_databases": {"m": [url]}},
        {"influx_default_database": url},
        {"influx_databases": {"m": {"host": url}}},
        {"influx_databases": {"m": {"transport": url}}},
        {"influx_databases": {"m": {"pool_size": url}}},
        {"influx_databases": {"m": {"password": [secret], "token": {secret: secret}}}},
        {"influx_databases": {"m": {"password": secret, "pool_size": 0}}},
        {"influx_databases": {"m": {"host": {"password": secret}}}},
    ):
        try:
            options = load(configuration)
        except ConfigError as error:
            assert CORE not in str(error)
            assert CORE not in repr(error.__context__)
        else:
            # A part before a raw ":" is the user's name, which is no secret.
            assert CORE not in repr(dataclasses.replace(options.databases["m"], username=None))


@settings(max_examples=100, deadline=None)
@given(
    username=st.text(st.characters(codec="utf-8"), min_size=1),
    password=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_a_password_written_as_xx_arrives_whole(username: str, password: str) -> None:
    from urllib.parse import quote

    url = f"http://{quote(username, safe='')}:{quote(password, safe='')}@h:8086/d"

    assert database(url).username == username
    assert database(url).password == password


def test_no_secret_is_in_a_repr() -> None:
    options = load({"influx_databases": {"m": {"token": CORE}, "n": f"http://u:{CORE}@h"}})
    for name in SECRETS - {"token"}:
        assert CORE not in repr(
            database({name: CORE, **({"username": "u"} if "p" in name else {})})
        )

    assert CORE not in repr(options)
    assert CORE not in repr(options.databases["m"])
    assert CORE not in str(options.databases["n"])


def test_every_option_of_ex_flux_has_its_counterpart() -> None:
    theirs = {
        "host": ["host"],
        "udp_port": ["udp_port"],
        "http_port": ["http_port"],
        "secure?": ["secure"],
        "database": ["database"],
        "auth": ["username", "password"],
        "retention_policy": ["retention_policy"],
        "epoch": ["epoch", "precision"],  # one for answers and writes
        "batch_size": ["batch_size"],
        "max_queue_size": ["queue_size"],
        "flush_interval": ["flush_interval"],
        "pool_size": ["pool_size"],
        "http_opts": ["http_timeout"],
    }

    found: dict[str, list[str]] = {}
    for option in dataclasses.fields(DatabaseOptions):
        for name in re.findall(r"^`(\S+)`", option.metadata.get("ex_flux", "")):
            found.setdefault(name, []).append(option.name)

    assert found == theirs
