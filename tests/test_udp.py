"""UDPPool on real sockets: addresses, refusals, datagram sizes, look-ups and pace."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from celery_influx.errors import SendError
from celery_influx.options import DatabaseOptions
from celery_influx.transports import open_transport, udp
from celery_influx.transports.udp import UDPPool
from tests.servers import find, free_port
from tests.test_relay import open_files


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def receiver(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A bound UDP socket that gives up after 5 s."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind((host, port))
    return sock


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with receiver() as sock:
        yield sock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def port_of(sock: socket.socket) -> int:
    return sock.getsockname()[1]


def pool_to(port: int, host: str = "127.0.0.1", **more: Any) -> UDPPool:
    clock = more.pop("clock", None)
    arguments = {"clock": clock, "sleep": clock.sleep} if clock else {}
    return UDPPool(DatabaseOptions(host=host, udp_port=port, **more), **arguments)


def has_ipv6() -> bool:
    try:
        receiver("::1").close()
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


@pytest.fixture(params=["IPv6 first", "IPv4 first"])
def localhost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of both loopback addresses; whether /etc/hosts says so differs by machine."""

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "localhost"
        found = [
            (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port)),
        ]
        return found if request.param == "IPv6 first" else found[::-1]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return "localhost"


# -- sending -----------------------------------------------------------------------------------


def test_the_registry_makes_the_pool_from_options() -> None:
    assert isinstance(open_transport(DatabaseOptions()), UDPPool)


def test_a_payload_arrives_as_one_datagram(server: socket.socket) -> None:
    pool = pool_to(port_of(server))

    assert pool.write(b"m f=1\nm f=2") == 0

    assert server.recv(65_536) == b"m f=1\nm f=2"
    pool.close()


@ipv6
def test_a_payload_arrives_over_ipv6() -> None:
    with receiver("::1") as server:
        pool = pool_to(port_of(server), "::1")

        pool.write(b"m f=1")

        assert server.recv(65_536) == b"m f=1"
        pool.close()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_sockets_are_used_in_turn(server: socket.socket, size: int) -> None:
    pool = pool_to(port_of(server), pool_size=size)
    senders = []

    for number in range(2 * size):
        pool.write(b"%d" % number)
        senders.append(server.recvfrom(100)[1])

    assert len(set(senders)) == size
    assert senders[:size] == senders[size:]
    pool.close()


@ipv6
@pytest.mark.parametrize("listening", ["127.0.0.1", "::1"])
def test_localhost_reaches_a_server_that_listens_on_one_family_only(
    listening: str, localhost: str
) -> None:
    with receiver(listening) as server:
        pool = pool_to(port_of(server), localhost)

        for number in range(5):
            assert pool.write(b"%d" % number) == 0

        assert [server.recv(100) for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        pool.close()


def test_nothing_is_opened_before_it_is_needed_and_closing_is_idempotent(
    server: socket.socket,
) -> None:
    before = open_files()
    pool = pool_to(port_of(server), pool_size=3)
    assert open_files() == before

    pool.write(b"a")
    assert open_files() == before + 3
    pool.close()
    pool.close()

    assert open_files() == before
    pool.write(b"b")
    assert server.recv(10) + server.recv(10) == b"ab"
    pool.abandon()
    assert open_files() == before


@pytest.mark.parametrize(
    ("host", "address"),
    [("influx.example", "udp://influx.example:8089"), ("::1", "udp://[::1]:8089")],
)
def test_address_and_repr_name_the_server_and_no_secret(host: str, address: str) -> None:
    pool = UDPPool(DatabaseOptions(host=host, username="u", password="hunter2", token="hunter2"))

    assert pool.address == address
    assert repr(pool) == f"<UDPPool {address} sockets=0 max_bytes=65507>"


# -- what the network says ---------------------------------------------------------------------


def test_a_closed_port_is_said_at_every_attempt_with_the_mend() -> None:
    port = free_port()
    pool = pool_to(port)

    for _ in range(4):
        with pytest.raises(SendError) as caught:
            pool.write(b"m f=1")

        assert caught.value.cause == "ECONNREFUSED"
        assert str(caught.value) == (
            f"udp://127.0.0.1:{port} did not take the datagram (ECONNREFUSED: Connection "
            "refused); nobody listens there; is the server's [[udp]] service on?"
        )
    pool.close()


@ipv6
def test_a_closed_port_of_a_name_with_two_addresses_is_said_too(localhost: str) -> None:
    pool = pool_to(free_port(), localhost)

    for _ in range(4):
        with pytest.raises(SendError, match="ECONNREFUSED"):
            pool.write(b"m f=1")
    pool.close()


@ipv6
def test_a_server_that_comes_up_on_the_other_family_is_found(localhost: str) -> None:
    with receiver("127.0.0.1") as server:
        port = port_of(server)
        pool = pool_to(port, localhost)
        pool.write(b"a")
        assert server.recv(10) == b"a"
    with receiver("::1", port) as server:
        assert pool.write(b"b") == 0
        assert server.recv(10) == b"b"
    pool.close()


def test_sending_resumes_when_the_port_opens(clock: Clock) -> None:
    port = free_port()
    pool = pool_to(port, clock=clock)
    with pytest.raises(SendError):
        pool.write(b"lost")

    with receiver(port=port) as server:
        pool.write(b"there")
        assert server.recv(10) == b"there"
    pool.close()


def test_probe_raises_where_nobody_listens_and_is_ignored_where_somebody_does(
    server: socket.socket, clock: Clock
) -> None:
    pool = pool_to(port_of(server), clock=clock)
    pool.probe()
    assert server.recv(10) == server.recv(10) == b"\n"
    pool.close()

    with pytest.raises(SendError, match="nobody listens there"):
        pool_to(free_port(), clock=clock).probe()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "a" * 300])
def test_a_name_that_is_unknown_or_impossible_is_a_send_error(host: str) -> None:
    pool = pool_to(8089, host)

    assert pool.max_bytes == 65_507
    for _ in range(2):
        with pytest.raises(SendError) as caught:
            pool.write(b"m f=1")

        assert caught.value.cause == "dns"
        assert str(caught.value).startswith(f"udp://{host}:8089 did not take the datagram (dns: ")
        assert str(caught.value).endswith("); the host name is unknown; check 'host'")


def test_a_datagram_longer_than_udp_takes_is_said_with_the_mend(server: socket.socket) -> None:
    pool = pool_to(port_of(server))

    with pytest.raises(SendError) as caught:
        pool.write(b"x" * 65_508)

    assert caught.value.cause == "EMSGSIZE"
    assert str(caught.value).endswith(
        "(EMSGSIZE: Message too long); the route takes no datagram that long; set "
        "'datagram_bytes' lower"
    )
    pool.write(b"short")
    assert server.recv(10) == b"short"
    pool.close()


def test_a_full_send_buffer_is_waited_for_a_little_and_then_said(server: socket.socket) -> None:
    pool = pool_to(port_of(server))
    pool.write(b"a")

    class Full:
        """A socket whose send buffer does not empty: over loopback a real one always does."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def send(self, payload: bytes) -> int:
            raise BlockingIOError(errno.EAGAIN, "full")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    pool._sockets = [Full(sock) for sock in pool._sockets]  # type: ignore[misc]

    with pytest.raises(SendError) as caught:
        pool.write(b"b")

    assert caught.value.cause == errno.errorcode[errno.EAGAIN]
    assert all(sock.gettimeout() == 0.0 for sock in pool._sockets)
    pool.close()


# -- look-ups ----------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that mean what a test says; and how often they were asked for."""
    found: dict[str, Any] = {"asked": 0}
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        found["asked"] += 1
        meant = found.get(host, host)
        if isinstance(meant, Exception):
            raise meant
        return real(meant, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return found


def test_a_name_is_looked_up_again_at_intervals_and_followed(
    names: dict[str, Any], clock: Clock
) -> None:
    with receiver("127.0.0.1") as first, receiver("127.0.0.2", port_of(first)) as second:
        names["influx"] = "127.0.0.1"
        pool = pool_to(port_of(first), "influx", clock=clock)
        pool.write(b"a")
        names["influx"] = "127.0.0.2"
        pool.write(b"b")
        assert names["asked"] == 1

        clock.now += UDPPool.LOOKUP_INTERVAL
        pool.write(b"c")

        assert first.recv(10) + first.recv(10) == b"ab"
        assert second.recv(10) == b"c"
        assert names["asked"] == 2
        pool.close()


def test_a_name_is_looked_up_again_soon_after_a_refusal_and_followed(
    names: dict[str, Any], clock: Clock
) -> None:
    port = free_port()
    names["influx"] = "127.0.0.1"
    pool = pool_to(port, "influx", clock=clock)
    for _ in range(100):
        with pytest.raises(SendError, match="ECONNREFUSED"):
            pool.write(b"a")
    assert names["asked"] == 1

    with receiver("127.0.0.2", port) as server:
        names["influx"] = "127.0.0.2"
        clock.now += UDPPool.LOOKUP_PAUSE
        pool.write(b"b")

        assert server.recv(10) == b"b"
        assert names["asked"] == 2
    pool.close()


def test_a_name_that_cannot_be_found_any_more_does_not_stop_a_working_server(
    names: dict[str, Any], clock: Clock, server: socket.socket
) -> None:
    names["influx"] = "127.0.0.1"
    pool = pool_to(port_of(server), "influx", clock=clock)
    pool.write(b"a")
    names["influx"] = socket.gaierror(-3, "Temporary failure in name resolution")

    for _ in range(3):
        clock.now += UDPPool.LOOKUP_INTERVAL
        pool.write(b"b")

    assert [server.recv(10) for _ in range(4)] == [b"a", b"b", b"b", b"b"]
    assert names["asked"] == 4
    pool.close()


def test_an_unknown_name_is_not_asked_for_at_every_attempt_and_is_found_when_it_is_there(
    names: dict[str, Any], clock: Clock, server: socket.socket
) -> None:
    names["influx"] = socket.gaierror(-2, "Name or service not known")
    pool = pool_to(port_of(server), "influx", clock=clock)
    for _ in range(100):
        _ = pool.max_bytes
        with pytest.raises(SendError, match="dns"):
            pool.write(b"a")
    assert names["asked"] == 1

    names["influx"] = "127.0.0.1"
    clock.now += UDPPool.LOOKUP_PAUSE
    pool.write(b"b")

    assert server.recv(10) == b"b"
    pool.close()


def test_failing_again_and_again_keeps_no_payload_in_memory() -> None:
    clock = Clock()
    pool = UDPPool(DatabaseOptions(host="no-such-host.invalid"), clock=clock, sleep=clock.sleep)

    def fail() -> None:
        payload = bytes(60_000)
        with pytest.raises(SendError):
            pool.write(payload)

    fail()
    tracemalloc.start()
    try:
        for _ in range(200):
            clock.now = 1_000.0
            fail()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert held < 1_000_000


def test_every_address_of_a_name_is_tried_until_one_has_a_route(
    names: dict[str, Any], server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    no_route = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fe80::1", port, 0, 0))
    good = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [no_route, good])
    pool = pool_to(port, "influx")

    pool.write(b"a")

    assert server.recv(10) == b"a"
    pool.close()


def test_where_no_address_has_a_route_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    no_route = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fe80::1", 8089, 0, 0))
    for found in ([no_route], []):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: list(found))
        pool = pool_to(8089, "influx", clock=clock)

        for _ in range(2):
            with pytest.raises(SendError) as caught:
                pool.write(b"a")
            assert caught.value.cause in ("EINVAL", "ENETUNREACH", "EADDRNOTAVAIL")


# -- datagram sizes ----------------------------------------------------------------------------


def test_on_loopback_a_datagram_may_be_as_long_as_udp_takes(server: socket.socket) -> None:
    pool = pool_to(port_of(server))

    assert pool.max_bytes == 65_507
    pool.write(b"x" * pool.max_bytes)

    assert len(server.recv(70_000)) == 65_507
    pool.close()


@ipv6
def test_on_ipv6_loopback_the_headers_are_longer() -> None:
    with receiver("::1") as server:
        pool = pool_to(port_of(server), "::1")

        assert pool.max_bytes == 65_536 - 48
        pool.write(b"x" * pool.max_bytes)

        assert len(server.recv(70_000)) == 65_536 - 48
        pool.close()


def test_the_option_is_the_size_whatever_the_route_takes(server: socket.socket) -> None:
    pool = pool_to(port_of(server), datagram_bytes=512)

    assert pool.max_bytes == 512
    pool.close()


# -- bursts ------------------------------------------------------------------------------------

SO_NO_CHECK = 11  # <asm-generic/socket.h>
BURST = [b"m f=1", b"m f=2\nm f=3", b"", b"m f=4"]


def cutting_pool(port: int, host: str = "127.0.0.1") -> UDPPool:
    """One that sends bursts, where the kernel cuts them."""
    pool = pool_to(port, host, datagram_bytes=1_432)
    assert pool.max_bytes == 1_432
    if pool.burst == 1:
        pytest.skip("this kernel knows no UDP_SEGMENT")
    return pool


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=ipv6)])
def test_a_burst_arrives_as_its_datagrams_filled_up_with_newlines(host: str) -> None:
    with receiver(host) as server:
        pool = cutting_pool(port_of(server), host)

        assert pool.write(*BURST) == 0

        found = [server.recv(65_536) for _ in BURST]
        assert found == [each.ljust(11, b"\n") for each in BURST[:-1]] + BURST[-1:]
        pool.close()


def test_a_burst_is_no_more_than_the_kernel_cuts(server: socket.socket) -> None:
    pool = cutting_pool(port_of(server))

    assert pool.burst == 45
    longest = [b"%d" % (number % 10) * 1_432 for number in range(45)]
    assert pool.write(*longest) == 0

    assert [server.recv(65_536) for _ in longest] == longest
    pool.close()


@pytest.mark.parametrize(("size", "burst"), [(64, 64), (40_000, 1), (None, 1)])
def test_how_many_datagrams_go_at_once_follows_from_their_size(
    server: socket.socket, size: int | None, burst: int
) -> None:
    cutting_pool(port_of(server)).close()
    pool = pool_to(port_of(server), datagram_bytes=size)

    assert pool.max_bytes
    assert pool.burst == burst
    pool.close()


def test_a_burst_is_no_more_than_goes_in_a_tenth_of_a_second(server: socket.socket) -> None:
    cutting_pool(port_of(server)).close()
    pool = pool_to(port_of(server), datagram_bytes=1_432, bytes_per_second=100_000)

    assert pool.max_bytes
    assert pool.burst == 6
    pool.close()


def test_what_the_kernel_refuses_to_cut_is_sent_one_by_one_from_then_on(
    server: socket.socket,
) -> None:
    pool = cutting_pool(port_of(server))
    for sock in pool._sockets:
        sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)  # it cuts only where it adds checksums

    assert pool.write(*BURST) == 0

    assert [server.recv(65_536) for _ in BURST] == BURST
    assert (pool.max_bytes, pool.burst) == (1_432, 1)
    pool.close()
    assert (pool.max_bytes, pool.burst) == (1_432, 1)
    pool.close()


def test_a_burst_to_a_closed_port_is_refused_and_the_next_one_still_a_burst() -> None:
    with receiver() as server:
        pool = cutting_pool(port_of(server))

    with pytest.raises(SendError, match="ECONNREFUSED"):
        pool.write(*BURST)

    assert pool.max_bytes
    assert pool.burst == 45
    pool.close()


IN_NAMESPACE = """
import socket, sys
from celery_influx.options import DatabaseOptions
from celery_influx.transports.udp import UDPPool
for host in ("10.99.0.2", "fd99::2"):
    print(UDPPool(DatabaseOptions(host=host)).max_bytes)
"""


SHRINKING = """
import socket, subprocess, sys
from celery_influx.options import DatabaseOptions
from celery_influx.transports.udp import UDPPool
def set_mtu(mtu):
    subprocess.run([sys.argv[1], "link", "set", "lo", "up", "mtu", mtu], check=True)
set_mtu("1500")
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 0))
server.settimeout(5)
pool = UDPPool(DatabaseOptions(host="127.0.0.1", udp_port=server.getsockname()[1]))
print(pool.max_bytes, pool.burst)
set_mtu("1400")
pool.write(b"a" * 1472, b"b" * 1472)
print(*{server.recv(65536)[:1].decode() for _ in "ab"} - {"a", "b"}, pool.max_bytes, pool.burst)
"""


def test_a_route_that_takes_less_than_before_ends_no_bursts() -> None:
    with receiver() as server:
        cutting_pool(port_of(server)).close()
    ip = find("ip")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a network namespace")
    name = f"influx{os.getpid()}mtu"
    if subprocess.run([ip, "netns", "add", name], capture_output=True, timeout=20).returncode:
        pytest.skip("needs the right to make network namespaces")
    try:
        found = subprocess.run(
            [ip, "netns", "exec", name, sys.executable, "-c", SHRINKING, ip],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        subprocess.run([ip, "netns", "del", name], capture_output=True, timeout=20)

    assert found.stdout.split() == ["1472", "44", "1372", "47"], found.stderr


def test_on_ethernet_a_datagram_is_what_its_frame_takes() -> None:
    ip = find("ip")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a network namespace")
    name = f"influx{os.getpid()}"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ip, *words], capture_output=True, text=True, timeout=20)

    if run("netns", "add", name).returncode:
        pytest.skip("needs the right to make network namespaces")
    try:
        inside = ("netns", "exec", name, ip)
        for words in (
            (
                "link",
                "add",
                "v0",
                "mtu",
                "1500",
                "type",
                "veth",
                "peer",
                "name",
                "v1",
                "mtu",
                "1500",
            ),
            ("addr", "add", "10.99.0.1/24", "dev", "v0"),
            ("addr", "add", "fd99::1/64", "dev", "v0", "nodad"),
            ("link", "set", "v0", "up"),
            ("link", "set", "v1", "up"),
        ):
            done = run(*inside, *words)
            if done.returncode and "veth" in words:
                pytest.skip(f"needs veth devices: {done.stderr.strip()}")
            assert done.returncode == 0, done.stderr

        found = subprocess.run(
            [ip, "netns", "exec", name, sys.executable, "-c", IN_NAMESPACE],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        run("netns", "del", name)

    assert found.stdout.split() == ["1472", "1452"], found.stderr


# -- pace --------------------------------------------------------------------------------------


def test_a_burst_goes_at_once_and_what_comes_after_it_at_the_speed(
    server: socket.socket, clock: Clock
) -> None:
    pool = pool_to(port_of(server), clock=clock)
    begin = clock.now

    for _ in range(udp._BURST_BYTES // 8_192 - 1):
        pool.write(b"x" * 8_192)
    assert clock.now == begin
    for _ in range(1_000):
        pool.write(b"x" * 8_192)

    assert clock.now - begin == pytest.approx(
        8_192_000 / DatabaseOptions().bytes_per_second,
        abs=2 * udp._BURST_BYTES / DatabaseOptions().bytes_per_second,
    )
    pool.close()


def test_who_sends_slower_than_the_speed_is_never_held_up(
    server: socket.socket, clock: Clock
) -> None:
    pool = pool_to(port_of(server), clock=clock)
    naps = []
    pool._sleep = naps.append

    for _ in range(500):
        pool.write(b"x" * 60_000)
        clock.now += 60_000 / DatabaseOptions().bytes_per_second

    assert naps == []
    pool.close()


@pytest.mark.alone
def test_a_single_payload_goes_without_delay_after_any_burst(server: socket.socket) -> None:
    pool = pool_to(port_of(server))
    for _ in range(20):
        pool.write(b"x" * 65_507)

    time.sleep(0.05)
    begin = time.monotonic()
    pool.write(b"m f=1")

    assert time.monotonic() - begin < 0.02
    pool.close()
