import builtins
from collections.abc import Callable, Sequence

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

def encoder(
    constant: dict[str, str],
    constant_text: bytes,
    unit: int,
    clock: Callable[[], int] | None,
    on_left_out: Callable[[int], None] | None,
    encode: Callable[[Point], bytes],
    slow: Callable[[Point], bytes],
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
def take_lines(data: builtins.bytes, position: int) -> tuple[int, int, list[builtins.bytes]]: ...
def run_line(
    head: str,
    facts: Facts,
    runtime: int,
    cpu: int | None,
    stamps: Callable[[], int],
    unit: int,
) -> builtins.bytes: ...
