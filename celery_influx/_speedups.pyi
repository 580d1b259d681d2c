from collections.abc import Callable

from celery_influx.point import Point

def encoder(
    constant: dict[str, str],
    constant_text: bytes,
    unit: int,
    clock: Callable[[], int] | None,
    on_left_out: Callable[[int], None] | None,
    encode: Callable[[Point], bytes],
    slow: Callable[[Point], bytes],
) -> Callable[[Point], bytes]: ...
