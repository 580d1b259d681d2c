"""What a call comes to where there is no memory for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def without_memory(number: int, call: Callable[[], Any]) -> Any:
    """Call it where the piece of memory asked for as the ``number``-th is missing; or MemoryError."""
    testcapi = pytest.importorskip("_testcapi")
    testcapi.set_nomemory(number, number + 1)
    try:
        return call()
    except MemoryError as error:
        return error
    finally:
        testcapi.remove_mem_hooks()
