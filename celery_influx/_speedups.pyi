import builtins
from collections.abc import Callable, Sequence
from typing import Any

from celery_influx.point import Point
from celery_influx.task_points import Facts

class Stamps:
    slot: int
    def __init__(self, slot: int, clock: Callable[[], int] | None = None) -> None: ...
    def __call__(self) -> int: ...

class Buffer:
    max_lines: int
    max_bytes: int
    bytes: int
    put_lines: int
    taken: int
    dropped: int
    def __init__(self, max_lines: int, max_bytes: int) -> None: ...
    def put(self, lines: Sequence[builtins.bytes]) -> int: ...
    def take(self, max_lines: int, max_bytes: int) -> tuple[list[builtins.bytes], int]: ...
    def clear(self) -> int: ...
    def __len__(self) -> int: ...

class Run:
    influx: Any
    id: str
    facts: Facts
    request: Any
    began: int
    clock: int
    is_eager: bool
    over: bool
    def __init__(self, influx: Any, task_id: str, facts: Facts, began: int) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> tuple[int | None, int | None]: ...

def encoder(
    constant: dict[str, str],
    constant_text: bytes,
    unit: int,
    clock: Callable[[], int] | None,
    on_left_out: Callable[[int], None] | None,
    encode: Callable[[Point], bytes],
    slow: Callable[[Point], bytes],
    types: dict[str, dict[str, type]] | None = None,
) -> Callable[[Point], bytes]: ...
def sender(
    encode: Callable[[Point], bytes],
    buffer: Buffer,
    points: memoryview,
    due_lines: int,
    due_bytes: int,
    send: Callable[[Point], None],
    wake: Callable[[int], None],
) -> Callable[[Point], None]: ...
def relay_sender(
    encode: Callable[[Point], bytes],
    pipe: int,
    database: int,
    points: memoryview,
    send: Callable[[Point], None],
    put: Callable[[builtins.bytes], bool],
    handler_of: Callable[[int], object],
) -> Callable[[Point], None]: ...
def method(
    function: Callable[..., Any], point: type[Point], slot: object
) -> Callable[..., Any]: ...
def take_lines(data: builtins.bytes, position: int) -> tuple[int, int, list[builtins.bytes]]: ...
def run_line(
    head: str,
    facts: Facts,
    runtime: int,
    cpu: int | None,
    stamps: Callable[[], int],
    unit: int,
) -> builtins.bytes: ...
def task_init(
    runs: dict[int, Any],
    slow: Callable[[str, Any], None],
    tasks: dict[int, Any],
    app: Any,
    go_on: Callable[[str, Any], None],
    passing: tuple[type[Exception], ...],
) -> Callable[[str, Any], None]: ...
def task_end(
    runs: dict[int, Any],
    slow: Callable[..., None],
    again: Callable[..., None],
    ended: Callable[[str], None],
) -> Callable[..., None]: ...
