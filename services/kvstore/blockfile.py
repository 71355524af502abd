"""One block in one file: a header, then K and V of each layer. A file that is not whole is never taken for one."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

MAGIC = b"KVMBLK01"
# Magic, fingerprint of the layout, key, bytes of the payload; then a checksum over these and the payload.
_HEAD = struct.Struct("<8s16s16sQ")
_CHECK_BYTES = 32
HEADER_BYTES = _HEAD.size + _CHECK_BYTES


class DamagedError(Exception):
    """The file is not what was written."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a file's header and size say; its payload is not looked at."""

    key: bytes
    fingerprint: bytes
    size: int
    # Seconds since the epoch.
    used: float


def write(path: Path, fingerprint: bytes, key: bytes, views: Sequence[memoryview]) -> int:
    """Writes the file in one step; its size. Raises OSError, then there is none."""
    head = _HEAD.pack(MAGIC, fingerprint, key, sum(len(view) for view in views))
    scratch = path.with_suffix(".tmp")
    try:
        with open(scratch, "wb", buffering=0) as file:
            for part in (memoryview(head + _checksum(head, views)), *views):
                _write_all(file.fileno(), part)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return HEADER_BYTES + sum(len(view) for view in views)


def read(path: Path, fingerprint: bytes, key: bytes, views: Sequence[memoryview]) -> None:
    """Fills `views`. Raises DamagedError, whatever is wrong with the file, OSError when it cannot be read."""
    with open(path, "rb", buffering=0) as file:
        header = file.read(HEADER_BYTES)
        head, check = header[: _HEAD.size], header[_HEAD.size :]
        if head != _HEAD.pack(MAGIC, fingerprint, key, sum(len(view) for view in views)):
            raise DamagedError("its header is of another block")
        for view in views:
            at = 0
            while at < len(view):
                count = file.readinto(view[at:])
                if not count:
                    raise DamagedError("it is too short")
                at += count
        if file.read(1):
            raise DamagedError("it is too long")
    if _checksum(head, views) != check:
        raise DamagedError("its checksum is wrong")
    os.utime(path)


def look(path: Path) -> Found:
    """The header of a file. Raises DamagedError, OSError."""
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        header = file.read(_HEAD.size)
    if len(header) != _HEAD.size:
        raise DamagedError("it is too short")
    magic, fingerprint, key, payload = _HEAD.unpack(header)
    if magic != MAGIC or status.st_size != HEADER_BYTES + payload:
        raise DamagedError("its header is no header")
    return Found(key, fingerprint, status.st_size, status.st_mtime)


def _checksum(head: bytes, views: Sequence[memoryview]) -> bytes:
    digest = blake2b(head, digest_size=_CHECK_BYTES)
    for view in views:
        digest.update(view)
    return digest.digest()


def _write_all(fd: int, part: memoryview) -> None:
    while part:
        part = part[os.write(fd, part) :]
