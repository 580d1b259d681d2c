"""The development listener on its own; tests/conformance/ holds it against influxd."""

from __future__ import annotations

import gzip
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import requests

from celery_influx.listener import Listener
from celery_influx.point import Point
from tests.servers import free_port


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as one:
        yield one


def send(listener: Listener, *datagrams: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for datagram in datagrams:
            sock.sendto(datagram, ("127.0.0.1", listener.udp_port))


def post(listener: Listener, body: bytes, **params: str) -> tuple[int, str]:
    answer = requests.post(
        f"{listener.http_url}/write", params={"db": "celery", **params}, data=body, timeout=5
    )
    return answer.status_code, answer.json()["error"] if answer.content else ""


def test_points_sent_by_udp_are_stored(listener: Listener) -> None:
    send(listener, b"m,t=v f=1 5\nm i=2i 6", b"# nothing\n\nn s=t 7")

    listener.wait_for(3)

    assert listener.points("m") == [
        Point("m", {"f": 1.0}, {"t": "v"}, 5),
        Point("m", {"i": 2}, None, 6),
    ]
    assert listener.points("n") == [Point("n", {"s": True}, None, 7)]
    assert listener.received.datagrams == 2
    assert listener.received.lines == 3
    assert listener.received.bytes == 38


def test_one_bad_line_costs_the_whole_datagram_and_it_says_so(listener: Listener) -> None:
    send(listener, b"m f=1 1\nbad\nm f=2 2", b"m f=3 3")

    listener.wait_for(1)

    assert [point.timestamp for point in listener.points()] == [3]
    (refusal,) = listener.refused
    assert refusal.startswith(
        "unable to parse 'bad': missing fields; the whole datagram is dropped"
    )
    assert "2 good points with it" in refusal


def test_a_burst_is_not_lost(listener: Listener) -> None:
    send(listener, *(b"m f=1 %d" % number for number in range(3000)))

    listener.wait_for(3000, 20)

    assert listener.count("m") == 3000


def test_points_of_the_same_series_and_time_become_one(listener: Listener) -> None:
    assert post(listener, b"m,a=1,b=2 f=1,g=1 5\nm,b=2,a=1 g=2,h=3 5\nm,a=1 f=1 5") == (204, "")

    assert listener.points() == [
        Point("m", {"f": 1.0, "g": 2.0, "h": 3.0}, {"a": "1", "b": "2"}, 5),
        Point("m", {"f": 1.0}, {"a": "1"}, 5),
    ]
    assert listener.count("m", "h") == 1


def test_the_first_type_of_a_field_wins(listener: Listener) -> None:
    post(listener, b"m f=1 1")

    status, error = post(listener, b'm f="x",g=1 2\nm f=2 3')

    assert status == 400
    assert error == (
        'partial write: field type conflict: input field "f" on measurement "m" is type string,'
        " already exists as type float dropped=1"
    )
    assert [point.timestamp for point in listener.points()] == [1, 3]


def test_bad_lines_over_http_cost_only_themselves(listener: Listener) -> None:
    status, error = post(listener, b"m f=1 1\nbad")

    assert status == 400
    assert error == "partial write: unable to parse 'bad': missing fields dropped=0"
    assert listener.count("m") == 1
    assert listener.refused == [error]


@pytest.mark.parametrize(
    ("precision", "nanoseconds"),
    [("ns", 7), ("n", 7), ("u", 7_000), ("ms", 7_000_000), ("s", 7_000_000_000), ("us", 7)],
)
def test_precisions_are_read_as_influxd_does(
    listener: Listener, precision: str, nanoseconds: int
) -> None:
    assert post(listener, b"m f=1 7", precision=precision) == (204, "")

    assert listener.points()[0].timestamp == nanoseconds


def test_other_requests_get_influxds_answers(listener: Listener) -> None:
    url = listener.http_url

    ping = requests.get(f"{url}/ping", timeout=5)
    assert (ping.status_code, ping.headers["X-Influxdb-Version"]) == (204, "1.6.7")
    assert requests.head(f"{url}/ping", timeout=5).status_code == 204
    assert requests.get(f"{url}/write", timeout=5).status_code == 405
    assert requests.get(f"{url}/health", timeout=5).status_code == 404
    assert post(listener, b"m f=1", db="nodb") == (404, 'database not found: "nodb"')
    assert post(listener, b"m f=1", db="") == (400, "database is required")
    assert post(listener, b"m f=1", rp="nope") == (500, "retention policy not found: nope")
    assert post(listener, b"x" * 25_000_001)[0] == 413
    assert listener.points() == []


def test_gzip_and_chunked_bodies_are_read(listener: Listener) -> None:
    url = f"{listener.http_url}/write?db=celery"
    zipped = {"Content-Encoding": "gzip"}
    body = gzip.compress(b"m f=1 1")

    assert requests.post(url, data=body, headers=zipped, timeout=5).status_code == 204
    assert requests.post(url, data=iter([b"m f=", b"1 2"]), timeout=5).status_code == 204
    assert requests.post(url, data=body[:-9], headers=zipped, timeout=5).status_code == 400
    assert [point.timestamp for point in listener.points()] == [1, 2]


def test_a_query_is_told_that_this_is_no_influxdb(listener: Listener) -> None:
    url = f"{listener.http_url}/query"

    shown = requests.get(url, params={"q": "SHOW DATABASES"}, timeout=5).json()
    refused = requests.post(url, data={"q": "SELECT * FROM m"}, timeout=5)

    assert shown["results"][0]["series"][0]["values"] == [["celery"]]
    assert refused.status_code == 400
    assert "answers no InfluxQL" in refused.json()["error"]


def test_waiting_ends_with_what_was_refused(listener: Listener) -> None:
    post(listener, b"bad")

    with pytest.raises(TimeoutError, match=r"1 points: not within 0.01 s.*refused=1>\n.*'bad'"):
        listener.wait_for(1, 0.01)


def test_waiting_for_a_predicate_ends_when_it_is_true(listener: Listener) -> None:
    threading.Timer(0.02, send, (listener, b"m f=1 1")).start()

    listener.wait_for(lambda: listener.count("m"))

    assert listener.count("m") == 1


def test_refusals_and_points_are_bounded() -> None:
    with Listener(max_points=10) as listener:
        listener.write(b"\n".join(b"m f=1 %d" % number for number in range(50)))
        for number in range(1100):
            listener.write(b"bad%d" % number)

        assert [point.timestamp for point in listener.points()] == list(range(40, 50))
        assert len(listener.refused) == 1000
        assert "bad1099" in listener.refused[-1]


def test_closing_twice_is_closing_once_and_frees_the_ports() -> None:
    listener = Listener()
    listener.close()
    listener = Listener().start()
    post(listener, b"m f=1 1")
    listener.close()
    listener.close()

    assert listener.count("m") == 1
    assert "closed" in repr(listener)
    with Listener(udp_port=listener.udp_port, http_port=listener.http_port):
        pass


def test_a_port_in_use_is_an_os_error(listener: Listener) -> None:
    with pytest.raises(OSError, match="in use"):
        Listener(udp_port=listener.udp_port).start()
    with pytest.raises(OSError, match="in use"):
        Listener(http_port=listener.http_port).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_prints_points_and_refusals_and_ends_cleanly(number: int) -> None:
    udp, http = free_port(), free_port()
    command = [sys.executable, "-m", "celery_influx.listener"]
    ports = ["--udp-port", str(udp), "--http-port", str(http), "--database", "shop"]
    with subprocess.Popen(command + ports, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "database 'shop' at udp://127.0.0.1" in process.stdout.readline()
        body = b'm,t=v f=1,s="x" 1500000000\nbad'
        url = f"http://127.0.0.1:{http}/write?db=shop"
        requests.post(url, data=body, timeout=5)

        assert process.stdout.readline() == "1970-01-01 00:00:01.500000000 m t=v | f=1.0 s='x'\n"
        assert "REFUSED partial write: unable to parse 'bad'" in process.stdout.readline()
        process.send_signal(number)
        assert process.wait(10) == 0
