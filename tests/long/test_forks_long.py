"""A thousand forks, each with every lock held and a thread in each place that takes time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.python_only import python_only
from tests.test_forks import KINDS, SCHEMES, Scene, fork_with_all_held

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and Linux's pipes"),
    pytest.mark.filterwarnings("ignore:This process"),
    pytest.mark.timeout(900),
]

FORKS = int(os.environ.get("FORKS", "1000"))


@pytest.fixture
def scene(kind: str, scheme: str) -> Iterator[Scene]:
    with python_only():
        made = Scene(kind, scheme)
        yield made
        made.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_a_thousand_forks_with_every_lock_held_each_child_sends(
    kind: str, scheme: str, scene: Scene
) -> None:
    fork_with_all_held(scene, FORKS)

    assert scene.forks == FORKS
