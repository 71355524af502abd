"""Runs the measurements that are named, or all but the long ones."""

from __future__ import annotations

import sys

from benchmarks import attention, decisions, gloo, overhead, overlap, restore, router, transport

PARTS = {
    "attention": attention.main,
    "transport": transport.main,
    "gloo": gloo.main,
    "restore": restore.main,
    "overhead": overhead.main,
    "overlap": overlap.main,
    "decisions": decisions.main,
    "router": router.main,
    "memory": router.soak,
}
# Those that take minutes, or are no part of what kvmesh costs, are run only when they are named.
LONG = ("attention", "memory", "overlap", "restore")


def main() -> None:
    """`python -m benchmarks [NAME...]`."""
    names = sys.argv[1:] or [name for name in PARTS if name not in LONG]
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"there is no {unknown[0]!r}; there is: {', '.join(PARTS)}")
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main()
