"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from kvmesh.errors import InvalidArgument

# Largest gRPC message taken, where nothing else is said.
MESSAGE_BYTES = 64 << 20
_UNITS = {
    "": 1,
    **{f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)},
    **{f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)?")


def parse_size(text: str, field: str) -> int:
    """Bytes of "8GiB", "500MB" or "4096". Raises InvalidArgument naming `field`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidArgument(f"{field} = {text!r} is no size such as 8GiB, 500MB or 4096")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def parse_place(text: str, field: str) -> tuple[str, int]:
    """(folder, bytes) of "PATH:100GiB". Raises InvalidArgument naming `field`."""
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise InvalidArgument(f"{field} = {text!r} is not PATH:SIZE, such as /data/kv:100GiB")
    return path, parse_size(size, field)
