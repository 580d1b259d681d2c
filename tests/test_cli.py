"""``celery influx setup`` against a real influxd: what is there after it, and what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

import celery_influx
from celery_influx.cli import influx
from celery_influx.database import Database
from celery_influx.measurements import MEASUREMENTS
from celery_influx.options import DatabaseOptions, load
from celery_influx.point import Point
from celery_influx.server_setup import configuration
from tests.servers import Influxd, free_port, wait_for
from tests.test_http import Stub, serving
from tests.test_line_takers import TelegrafHTTP

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
#: Of the package that is tested, installed or not.
PACKAGE = Path(celery_influx.__file__).parent

Run = Callable[..., Result]
_names = iter(range(1_000))


def run(databases: dict[str, Any], *arguments: str) -> Result:
    """``celery influx setup`` for an app with these databases."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.influx_databases = databases
    celery_influx.install(app)
    context = CLIContext(app, no_color=True, workdir=None)
    found = CliRunner().invoke(influx, ["setup", *arguments], obj=context)
    app.influx.close(1)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


@pytest.fixture
def name() -> str:
    """Of a database that is not there yet."""
    return f"set up {next(_names)}"


@pytest.fixture
def setup(influxd: Influxd, name: str) -> Run:
    """Runs it for that database."""
    entry = {"transport": "http", "host": "127.0.0.1", "http_port": influxd.http_port}

    def run_here(*arguments: str, **options: Any) -> Result:
        return run({"main": {**entry, "database": name, **options}}, *arguments)

    return run_here


def policies(influxd: Influxd, name: str) -> dict[str, tuple[str, bool]]:
    (found,) = influxd.query(f'SHOW RETENTION POLICIES ON "{name}"')
    return {row[0]: (row[1], row[4]) for row in found["values"]}


def continuous_queries(influxd: Influxd, name: str) -> dict[str, str]:
    found = influxd.query("SHOW CONTINUOUS QUERIES")
    return {
        row[0]: row[1] for each in found if each["name"] == name for row in each.get("values", [])
    }


def state(influxd: Influxd, name: str) -> tuple[object, object]:
    return policies(influxd, name), continuous_queries(influxd, name)


ASKED = ("--duration", "30d", "--downsample", "5m:52w", "--downsample", "1h:INF")


def test_what_is_missing_is_made_and_a_second_run_changes_nothing(
    influxd: Influxd, name: str, setup: Run
) -> None:
    first = setup(*ASKED)

    assert first.exit_code == 0, first.output
    assert name in {row[0] for row in influxd.query("SHOW DATABASES")[0]["values"]}
    made = state(influxd, name)
    assert made[0] == {
        "autogen": ("720h0m0s", True),
        "every_5m": ("8736h0m0s", False),
        "every_1h": ("0s", False),
    }
    assert set(made[1]) == {
        f"{measurement.name}_every_{every}"
        for measurement in MEASUREMENTS
        for every in ("5m", "1h")
    }

    second = setup(*ASKED)

    assert second.exit_code == 0, second.output
    assert state(influxd, name) == made
    assert "\n-- nothing to change\n" in second.output
    lines = second.output.splitlines()[1:]
    assert {line[:3] for line in lines if line} == {"-- "}
    assert f'-- there: the database "{name}"' in lines
    assert '-- there: the continuous query "celery_task_every_5m"' in lines


def test_without_options_it_makes_what_points_are_written_to(
    influxd: Influxd, name: str, setup: Run
) -> None:
    first = setup(retention_policy="year")

    assert first.exit_code == 0, first.output
    assert state(influxd, name) == ({"year": ("0s", True)}, {})
    assert "nothing to change" in setup(retention_policy="year").output

    assert setup(retention_policy="other", database=name).exit_code == 0

    assert state(influxd, name) == ({"year": ("0s", True), "other": ("0s", False)}, {})


def test_what_differs_is_kept_and_said_unless_it_may_be_altered(
    influxd: Influxd, name: str, setup: Run
) -> None:
    setup("--downsample", "5m:52w")
    influxd.query(
        f'DROP CONTINUOUS QUERY "timed_every_5m" ON "{name}"; CREATE CONTINUOUS QUERY '
        f'"timed_every_5m" ON "{name}" BEGIN SELECT max(runtime) INTO x FROM timed GROUP BY time(5m) END'
    )
    before = state(influxd, name)
    asked = ("--duration", "2h", "--downsample", "5m:10w")

    kept = setup(*asked)

    assert kept.exit_code == 1
    assert state(influxd, name) == before
    assert [line for line in kept.output.splitlines() if line.startswith("-- kept")] == [
        '-- kept: the retention policy "autogen" keeps points for ever, not 2h; --alter changes it',
        (
            '-- kept: the retention policy "every_5m" keeps points for 8736h0m0s, not 10w; --alter '
            "changes it"
        ),
        '-- kept: the continuous query "timed_every_5m" is another one; --alter changes it',
    ]

    altered = setup(*asked, "--alter")

    assert altered.exit_code == 0, altered.output
    assert policies(influxd, name) == {
        "autogen": ("2h0m0s", True),
        "every_5m": ("1680h0m0s", False),
    }
    assert "mean(runtime)" in continuous_queries(influxd, name)["timed_every_5m"]
    assert "nothing to change" in setup(*asked).output
    assert setup("--duration", "INF", "--alter").exit_code == 0
    assert policies(influxd, name)["autogen"] == ("0s", True)


def test_a_dry_run_prints_the_statements_and_sends_nothing(name: str) -> None:
    with serving() as stub:
        entry = {"transport": "http", "host": "127.0.0.1", "http_port": stub.port, "database": name}
        found = run({"main": entry}, *ASKED, "--dry-run")

        assert stub.asked == []
    assert found.exit_code == 0, found.output
    first, second, *rest = found.output.splitlines()
    assert first == f"# main: http://127.0.0.1:{stub.port}/{name.replace(' ', '%20')}"
    assert second == f'CREATE DATABASE "{name}" WITH DURATION 30d REPLICATION 1 NAME "autogen";'
    assert sum(line.startswith("CREATE CONTINUOUS QUERY ") for line in rest) == 2 * len(
        MEASUREMENTS
    )


def test_the_statements_of_a_dry_run_are_what_a_run_makes(
    influxd: Influxd, name: str, setup: Run
) -> None:
    printed = setup(*ASKED, "--dry-run").output.split("\n", 1)[1]
    influxd.query(printed)

    assert "nothing to change" in setup(*ASKED).output


@pytest.mark.parametrize("hostile", ['a"; DROP DATABASE celery; --', "it's", "ü $x"])
def test_names_are_quoted(influxd: Influxd, setup: Run, hostile: str) -> None:
    for _ in range(2):
        found = setup("--downsample", "5m:52w", database=hostile, retention_policy=f"{hostile} p")
        assert found.exit_code == 0, found.output

    assert "nothing to change" in found.output
    names = {row[0] for row in influxd.query("SHOW DATABASES")[0]["values"]}
    assert {hostile, "celery"} <= names
    quoted = hostile.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    assert policies(influxd, quoted)[f"{hostile} p"] == ("0s", True)
    influxd.query(f'DROP DATABASE "{quoted}"')


def test_a_continuous_query_keeps_means_maxima_and_counts_with_types_of_their_own(
    influxd: Influxd, name: str, setup: Run
) -> None:
    setup("--downsample", "5m:52w")
    end = time.time_ns() // (300 * 10**9) * 300
    database = Database(
        DatabaseOptions(
            transport="http", host="127.0.0.1", http_port=influxd.http_port, database=name
        )
    )
    for task, runtime, retries, more, ago in (
        ("a", 1.0, 0, {}, 299),
        ("a", 2.0, 1, {"age": 7.5, "id": "x"}, 1),
        ("b", 9.0, 0, {}, 150),
        ("a", 5.0, 3, {}, 400),
    ):
        fields = {"runtime": runtime, "retries": retries, **more}
        database.send_data(Point("celery_task", fields, {"task": task}, (end - ago) * 10**9))
    assert database.flush(5)
    text = continuous_queries(influxd, name)["celery_task_every_5m"]
    (select,) = re.findall(r" BEGIN (SELECT .* )GROUP BY time\(5m\), \* END$", text)

    database.post(
        f"{select}WHERE time >= {end - 600}s AND time < {end}s GROUP BY time(5m), *",
    )

    found = database.query("SELECT * FROM celery_task", retention_policy="every_5m", epoch="s")
    # Where there was no value there is no field.
    rows = [{k: v for k, v in row.items() if v is not None} for row in found.rows()]
    ours = [{k: v for k, v in row.items() if k != "host"} for row in rows]
    one = {"runtime_count": 1, "retries_count": 1}
    assert sorted(ours, key=lambda row: (row["time"], row["task"])) == [
        {"time": end - 600, "task": "a", "runtime": 5, "runtime_max": 5, "retries": 3, "retries_max": 3, **one},
        {
            "time": end - 300, "task": "a", "runtime": 1.5, "runtime_max": 2, "runtime_count": 2,
            "retries": 0.5, "retries_max": 1, "retries_count": 2, "age": 7.5, "age_max": 7.5,
            "age_count": 1,
        },
        {"time": end - 300, "task": "b", "runtime": 9, "runtime_max": 9, "retries": 0, "retries_max": 0, **one},
    ]  # fmt: skip
    mean = (
        "SELECT sum(total) / sum(runs) FROM (SELECT runtime * runtime_count AS total, "
        "runtime_count AS runs FROM every_5m.celery_task)"
    )
    assert database.query(mean).series[0].values[0][1] == (1 + 2 + 9 + 5) / 4
    # The mean of integers is a float beside the integer that came in, which goes on coming in.
    database.send_data(Point("celery_task", {"retries": 4}, {"task": "a"}, end * 10**9))
    assert database.flush(5)
    assert database.stats()["rejected"] == 0
    both = "SELECT mean(retries) FROM every_5m.celery_task, autogen.celery_task"
    assert len(database.query(both).rows()) == 1
    assert database.close()


def test_every_number_of_every_measurement_is_downsampled() -> None:
    found = run({"main": "http://127.0.0.1:9/x"}, "--downsample", "2d:INF", "--dry-run").output

    for measurement in MEASUREMENTS:
        (text,) = re.findall(rf'CREATE CONTINUOUS QUERY "{measurement.name}_every_2d".*', found)
        assert " RESAMPLE FOR 4d BEGIN " in text
        for column in measurement.columns:
            is_number = column.type in ("int", "float")
            for function in ("mean", "max", "count"):
                assert (f'{function}("{column.name}")' in text) == is_number


# -- what it prints for servers' configuration -------------------------------------------------


class _Printed(Influxd):
    """influxd with the printed section instead of its own."""

    section = ""

    def command(self) -> list[str]:
        command = super().command()
        path = Path(command[-1])
        path.write_text(path.read_text() + self.section)
        return command


def test_a_real_influxd_with_the_printed_section_stores_our_points(tmp_path: Path) -> None:
    with _Printed(tmp_path, udp=False, make_database=False) as server:
        # Its ports are known, and the section's retention policy must be there before it is.
        entry = {
            "transport": "udp", "host": "127.0.0.1", "udp_port": server.udp_port,
            "http_port": server.http_port, "database": "shop", "retention_policy": "year",
            "precision": "ms",
        }  # fmt: skip
        server.query("CREATE DATABASE shop")  # whose default is another one
        found = run({"main": entry}, "--duration", "52w")
        assert found.exit_code == 0, found.output
        (server.section,) = re.findall(r"^\[\[udp\]\]\n(?:  .*\n)+", found.output, re.MULTILINE)
        server.stop()
        server.start()

        now = time.time_ns() // 10**6
        database = Database(DatabaseOptions(**entry))
        database.send_data(Point("m", {"f": 1.5}, {"t": "a"}, now * 10**6))
        assert database.flush(5)

        rows = wait_for(lambda: database.query("SELECT f, t FROM year.m", epoch="ms").rows(), 10)
        assert rows == [{"time": now, "f": 1.5, "t": "a"}]
        assert database.close()


UDP = """
# influxdb.conf
[[udp]]
  enabled = true
  bind-address = ":8089"
  database = "m"
  batch-size = 5000
  batch-timeout = "1s"
  read-buffer = 8388608
  precision = ""

# /etc/sysctl.d/60-influxdb.conf, read by: sysctl --system
net.core.rmem_max = 8388608

# telegraf.conf, for a Telegraf that listens there instead of InfluxDB itself
[[inputs.socket_listener]]
  service_address = "udp://:8089"
  read_buffer_size = 8388608
  data_format = "influx"
[[outputs.influxdb]]
  urls = ["http://localhost:8086"]  # where InfluxDB is
  database = "m"
  skip_database_creation = true
"""


def test_the_docs_show_what_is_printed_by_default() -> None:
    page = (ROOT / "docs/how-to/enable-udp.md").read_text()
    shown = "".join(line[4:] or "\n" for line in re.findall(r"^(?:    .*|)\n", page, re.MULTILINE))
    printed = configuration(DatabaseOptions(name="celery")).split("\n# telegraf.conf")[0]

    assert printed.replace("\n# influxdb.conf\n", "") in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, UDP),
        (
            {"bytes_per_second": 20_000_000},
            UDP.replace("= 8388608", "= 20000000"),
        ),
        ({"bytes_per_second": 10**10}, UDP.replace("= 8388608", f"= {2**30}")),
        (
            {"precision": "u", "udp_port": 1, "host": "::1", "secure": True, "token": "s3cret"},
            UDP.replace(":8089", ":1")
            .replace('precision = ""', 'precision = "u"')
            .replace('"influx"', '"influx"\n  influx_timestamp_precision = "1us"')
            .replace("http://localhost", "https://[::1]")
            + "  # and the credentials, which are not shown here\n",
        ),
        (
            {
                "transport": "unixgram",
                "socket_path": '/run/"t".sock',
                "http_port": 0,
                "database": "shop",
                "retention_policy": "year",
                "precision": "s",
            },
            """
# telegraf.conf, for a Telegraf that listens there
[[inputs.socket_listener]]
  service_address = "unixgram:///run/\\"t\\".sock"
  data_format = "influx"
  influx_timestamp_precision = "1s"
[[outputs.influxdb]]
  urls = ["http://localhost:8086"]  # where InfluxDB is
  database = "shop"
  retention_policy = "year"
  skip_database_creation = true
""",
        ),
        ({"transport": "http"}, ""),
    ],
)
def test_the_configuration_fits_the_entry(options: dict[str, Any], expected: str) -> None:
    assert configuration(DatabaseOptions(name="m", **options)) == expected


def telegraf_conf(printed: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its one input and its one output, as Telegraf reads them; the input's kind among the rest."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    found = tomllib.loads(printed.partition("\n# telegraf.conf")[2].partition("\n")[2])
    ((kind, (listener,)),) = found["inputs"].items()
    return {"kind": kind, **listener}, found["outputs"]["influxdb"][0]


def test_telegrafs_socket_holds_as_much_as_the_kernel_lets_it() -> None:
    printed = configuration(DatabaseOptions(name="m", bytes_per_second=20_000_000))

    listener, _ = telegraf_conf(printed)

    assert "net.core.rmem_max = 20000000\n" in printed
    assert listener["read_buffer_size"] == 20_000_000


@pytest.mark.parametrize(
    ("url", "listens", "writes"),
    [
        ("http://h:8186/shop?precision=s", {"service_address": ":8186"}, {"database": "shop"}),
        (
            "https://u:s3cret@h:99/m?retention_policy=year&client_certificate=/c.pem",
            {
                "service_address": ":99",
                "tls_cert": "/etc/telegraf/cert.pem",
                "tls_key": "/etc/telegraf/key.pem",
                "tls_allowed_cacerts": ["/etc/telegraf/clientca.pem"],
            },
            {"database": "m", "retention_policy": "year"},
        ),
    ],
)
def test_a_telegraf_that_takes_http_listens_where_the_entry_says_and_writes_elsewhere(
    url: str, listens: dict[str, Any], writes: dict[str, Any]
) -> None:
    options = load({"influx_databases": {"m": url}}).databases["m"]

    printed = configuration(options, is_telegraf=True)

    listener, output = telegraf_conf(printed)
    assert listener == {"kind": "influxdb_listener", **listens}
    # Not to itself.
    assert output == {
        "urls": ["http://localhost:8086"], "skip_database_creation": True, **writes,
    }  # fmt: skip
    assert "s3cret" not in printed
    assert ("basic_password" in printed) is ("s3cret" in url)


def test_where_there_is_no_http_api_only_the_configuration_is_printed() -> None:
    found = run({"main": "tcp://telegraf.example:8094"})

    assert found.exit_code == 0
    assert "-- 'http_port' is 0, so nothing is asked or made there\n" in found.output
    assert 'service_address = "tcp://:8094"' in found.output


# -- errors ------------------------------------------------------------------------------------


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as made:
        yield made


HERE = "api {!r}: this is for InfluxDB 1.x; "


@pytest.mark.parametrize(
    ("databases", "arguments", "text"),
    [
        (
            {"m": f"http://127.0.0.1:{free_port()}/x"},
            (),
            (
                "Error: m: http://127.0.0.1:PORT/x: connection refused (ECONNREFUSED); is the server "
                "running, and are 'host' and 'http_port' right?\n"
            ),
        ),
        (
            {"m": "https://h/b?api=2&organization=a%20b&token=s3cret&retention_policy=p"},
            ("--duration", "30d"),
            "Error: m: " + HERE.format("2") + "InfluxDB 2.x has buckets: influx bucket create "
            "--org 'a b' --name b/p --retention 30d\n",
        ),
        (
            {"m": "https://h/b?api=2&organization=o"},
            (),
            "Error: m: " + HERE.format("2") + "InfluxDB 2.x has buckets: influx bucket create "
            "--org o --name b --retention 0\n",
        ),
        (
            {"m": "https://h/b?api=3"},
            (),
            "Error: m: " + HERE.format("3") + "InfluxDB 3.x has a command: influxdb3 create "
            "database --retention-period none b\n",
        ),
        (
            {"m": "https://h/b?api=victoria"},
            (),
            "Error: m: " + HERE.format("victoria") + "VictoriaMetrics needs no database; its flag "
            "-retentionPeriod says what it keeps\n",
        ),
        (
            {"m": "https://h/b?api=victoria-cluster"},
            (),
            "Error: m: " + HERE.format("victoria-cluster") + "VictoriaMetrics needs no database; "
            "-retentionPeriod of its vmstorage says what it keeps\n",
        ),
        (
            {"m": "tcp://h"},
            ("--duration", "30d"),
            (
                "Error: m: no HTTP API, since 'http_port' is 0; expected InfluxDB's, to make retention "
                "policies by\n"
            ),
        ),
        (
            {"m": "http://h/b?retention_policy=every_5m"},
            ("--downsample", "5m:30d", "--dry-run"),
            (
                "Error: m: points are written to the retention policy 'every_5m', where --downsample "
                "puts its own; expected another 'retention_policy'\n"
            ),
        ),
        (
            {"m": "http://h/b"},
            ("other",),
            "Error: no database 'other' in influx_databases; expected one of 'm'\n",
        ),
        (
            {"m": "htp://h"},
            (),
            (
                "Error: influx_databases['m']: unknown scheme 'htp'; expected udp://host:8089, "
                "http://host:8086/database, https://…, tcp://host:8094 or unixgram:///path\n"
            ),
        ),
        (
            {"m": {"transport": "http", "database": "a\0"}},
            (),
            "Error: m: 'a\\x00': InfluxQL has no way to write a NUL; bind it by params\n",
        ),
        *(
            (
                {"m": "http://h/b"},
                ("--duration", duration),
                (
                    f"Error: Invalid value for '--duration': {duration!r}: expected 30d, 52w or the "
                    "like, of 1h at least, or INF\n"
                ),
            )
            for duration in ("59m", "5", "0d", "1y", "", "30d; DROP DATABASE x")
        ),
        *(
            (
                {"m": "http://h/b"},
                ("--downsample", given),
                f"Error: Invalid value for '--downsample': {given!r}: expected 5m:52w or the like\n",
            )
            for given in ("5m", "5m:", "INF:1d", "x:1d")
        ),
    ],
)
def test_an_error_says_what_to_do_and_is_not_a_success(
    databases: dict[str, Any], arguments: tuple[str, ...], text: str
) -> None:
    found = run(databases, *arguments)

    assert found.exit_code != 0
    assert re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", found.output).endswith(text)


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({}, "none, as of VictoriaMetrics"),
        ({"X_Influxdb_Version": "v2.7.5"}, "v2.7.5"),
        ({"X_Influxdb_Version": "1.1"}, "1.1"),
    ],
)
def test_another_server_than_the_entry_says_is_noticed(
    stub: Stub, headers: dict[str, str], version: str
) -> None:
    stub.answer = lambda handler: handler.reply(204, **headers)

    found = run({"m": f"http://127.0.0.1:{stub.port}/x"})

    assert found.exit_code == 1
    assert found.output.endswith(
        f"Error: m: the server's version is {version}; expected InfluxDB 1.x itself, such as "
        "1.8.10; set 'api' to what it is\n"
    )
    assert len(stub.asked) == 1


NO_DATABASES = (
    "-- a Telegraf listens there, which makes no databases: they are made in the InfluxDB that it "
    "writes to, by an entry with that one's address\n"
)


def test_of_a_telegraf_nothing_is_asked_but_its_version_and_its_section_is_printed(
    stub: Stub,
) -> None:
    telegraf = TelegrafHTTP(stub)

    found = run({"m": {**telegraf.options, "database": "shop"}})

    assert found.exit_code == 0, found.output
    assert NO_DATABASES in found.output
    listener, output = telegraf_conf(found.output)
    assert listener == {"kind": "influxdb_listener", "service_address": f":{stub.port}"}
    assert output["database"] == "shop"
    assert len(stub.asked) == 1  # its version


def test_a_dry_run_knows_a_telegraf_by_its_port() -> None:
    found = run({"m": "http://nowhere.invalid:8186/shop"}, "--dry-run")

    assert found.exit_code == 0, found.output
    assert NO_DATABASES in found.output
    assert "CREATE" not in found.output
    assert telegraf_conf(found.output)[0]["service_address"] == ":8186"


@pytest.mark.parametrize("asked", [("--duration", "30d"), ("--downsample", "5m:52w")])
def test_a_telegraf_keeps_nothing_so_to_say_how_long_is_an_error(
    stub: Stub, asked: tuple[str, ...]
) -> None:
    found = run({"m": TelegrafHTTP(stub).options}, *asked)

    assert found.exit_code == 1
    assert found.output.endswith(
        "Error: m: a Telegraf listens there, which makes no retention policies; expected the "
        "InfluxDB that it writes to, to make them by\n"
    )


def test_one_entrys_error_leaves_the_others_to_be_made(influxd: Influxd, name: str) -> None:
    good = {
        "transport": "http",
        "host": "127.0.0.1",
        "http_port": influxd.http_port,
        "database": name,
    }

    found = run({"bad": "https://h/b?api=3", "good": good, "unasked": good}, "bad", "good")

    assert found.exit_code == 1
    assert policies(influxd, name) == {"autogen": ("0s", True)}
    assert "# unasked" not in found.output


def test_an_app_without_the_plugin_is_told_so() -> None:
    app = Celery("bare", set_as_current=False)
    context = CLIContext(app, no_color=True, workdir=None)

    found = CliRunner().invoke(influx, ["setup"], obj=context)

    assert found.exit_code == 1
    assert found.output == (
        "Error: the app 'bare' has no celery_influx; expected celery -A and the name of a module "
        "whose app is given to celery_influx.install\n"
    )


# -- Celery's own command line -----------------------------------------------------------------


def test_celery_finds_the_command_by_the_projects_entry_point(tmp_path: Path) -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    (group,) = re.findall(
        r'^\[project\.entry-points\."celery\.commands"\]\n(.+\n)', declared, re.MULTILINE
    )
    # As an installation writes it; it is found first, whether there is another one or not.
    metadata = tmp_path / "celery_influx-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: celery_influx\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[celery.commands]\n" + group.replace('"', ""))
    # Whatever celery is to do, it has loaded all commands by now.
    (tmp_path / "shop.py").write_text(
        "import sys; print(*sorted(name for name in sys.modules if name[:13] == 'celery_influx'))\n"
        "import celery, celery_influx\n"
        "app = celery.Celery('shop')\n"
        "celery_influx.install(app)\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shop", "influx", "setup", "--dry-run"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    statement = 'CREATE DATABASE "celery" WITH DURATION INF REPLICATION 1 NAME "autogen";\n'
    first, rest = done.stdout.split("\n", 1)
    assert set(first.split()) - {"celery_influx._version"} == {"celery_influx", "celery_influx.cli"}
    assert rest.startswith(f"# celery: udp://localhost:8089\n{statement}")
    assert "\n[[udp]]\n" in done.stdout
