"""Runs the measurements that are named, or all."""

from __future__ import annotations

import sys

from benchmarks import decisions, overhead, transport

PARTS = {"transport": transport.main, "overhead": overhead.main, "decisions": decisions.main}


def main() -> None:
    """`python -m benchmarks [NAME...]`."""
    names = sys.argv[1:] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"there is no {unknown[0]!r}; there is: {', '.join(PARTS)}")
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main()
