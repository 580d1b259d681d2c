"""Fixtures shared by all tests: real servers, one of each per test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import Influxd, Redis


@pytest.fixture(scope="session")
def influxd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influxd]:
    """One influxd 1.x for the whole run; a test makes databases of its own in it."""
    with Influxd(tmp_path_factory.mktemp("influxd")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """One redis-server for the whole run."""
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


_databases = iter(range(1_000_000))


@pytest.fixture
def database(influxd: Influxd) -> str:
    """A fresh, empty database in ``influxd``."""
    name = f"test{next(_databases)}"
    influxd.query(f'CREATE DATABASE "{name}"')
    return name
