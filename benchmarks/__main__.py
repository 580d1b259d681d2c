"""``python -m benchmarks [part ...]``: measure, and print the tables; parts: see ``PARTS``."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.table import show_machine

PARTS = {
    "send_data": "send_data",
    "task": "task",
    "relay": "relay",
    "batcher": "batcher",
    "spool": "spool",
    "stalls": "stalls",
    "influxd": "influxd",
    "udp": "udp",
    "worker": "worker",
    "threads": "threads",
    "import": "import_time",
}


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS) + "; default all")
    parser.add_argument("--rounds", type=int, help="interleaved rounds; each part has its default")
    parser.add_argument("--size", type=int, help="points or tasks in each round of each variant")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; expected one of {', '.join(PARTS)}")
    options = {"rounds": given.rounds, "size": given.size}
    options = {name: value for name, value in options.items() if value is not None}
    show_machine()
    for part in given.parts or PARTS:
        importlib.import_module(f"benchmarks.{PARTS[part]}").run(**options)


if __name__ == "__main__":
    main()
