"""The optional extension in C: ``extension`` is the module, or ``None``.

It is missing where it could not be built. ``CELERY_INFLUX_PURE`` in the environment, set to more
than the empty string when the package is first imported, leaves it out. Python can do all it does.
"""

from __future__ import annotations

import os
from contextlib import suppress
from types import ModuleType

extension: ModuleType | None = None
if not os.environ.get("CELERY_INFLUX_PURE"):
    with suppress(ImportError):
        from celery_influx import _speedups

        extension = _speedups
