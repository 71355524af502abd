"""The disk tier's folder: one file a block, and what the store that wrote them was for."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmesh.dataplane.layout import Layout, refusal
from kvmesh.errors import FailedPrecondition, InvalidArgument
from services.kvstore import blockfile
from services.kvstore.blockfile import DamagedError, Found

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32}\.(kv|tmp)")
# Files take whole pages of the disk.
_PAGE = 4096


@dataclass(frozen=True)
class Served:
    """The model that a store keeps KV of. `vocab_size` 0: not known; `simulated`: its engines are."""

    layout: Layout
    model: str
    path: str
    vocab_size: int
    context_length: int
    simulated: bool = False

    @property
    def kind(self) -> str:
        """In a word."""
        return "simulated" if self.simulated else "real"


class DiskFolder:
    """One folder, `limit` bytes at most. Its methods block, and are for threads.

    Raises InvalidArgument when the folder cannot be used, FailedPrecondition when another store has it open.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit = limit
        try:
            (self.folder / "blocks").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidArgument(f"disk = {folder!r} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise FailedPrecondition(f"disk = {folder!r} is in use by another store") from None
        self._fingerprint = b""

    def served(self) -> Served | None:
        """The model of the blocks that are there already; None for a new folder. Raises InvalidArgument."""
        file = self.folder / "store.json"
        try:
            content = json.loads(file.read_text())
            return Served(Layout(**content.pop("layout")), **content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"{file} cannot be read ({error}): give the store another folder") from error

    def claim(self, served: Served) -> None:
        """The folder is for this model from now on. Raises FailedPrecondition when it holds another one's blocks."""
        before = self.served()
        if before is not None and before.simulated != served.simulated:
            raise FailedPrecondition(
                f"disk = {str(self.folder)!r} holds {before.kind} KV, and this store is for {served.kind} engines: "
                "give the store another folder, or empty this one"
            )
        if before is not None and (difference := refusal(served.layout, before.layout)):
            raise FailedPrecondition(
                f"disk = {str(self.folder)!r} holds the KV of {before.model} in another layout "
                f"({difference}): give the store another folder, or empty this one"
            )
        scratch = self.folder / "store.json.tmp"
        scratch.write_text(json.dumps(dataclasses.asdict(served), indent=1))
        os.replace(scratch, self.folder / "store.json")
        self._fingerprint = bytes.fromhex(served.layout.fingerprint)

    def scan(self) -> tuple[list[Found], int]:
        """(whole blocks, the least recently used first; files that were damaged and are gone now)."""
        found: list[Found] = []
        damaged = 0
        for path in (self.folder / "blocks").glob("*/*"):
            if not _NAME.fullmatch(path.name):
                continue
            try:
                block = blockfile.look(path)
                if path.suffix != ".kv" or block.key.hex() != path.stem or block.fingerprint != self._fingerprint:
                    raise DamagedError("it is not this store's")
            except (DamagedError, OSError) as error:
                log.warning("%s is dropped: %s", path, error)
                damaged += path.suffix == ".kv"
                path.unlink(missing_ok=True)
            else:
                found.append(dataclasses.replace(block, size=self.cost(block.size)))
        return sorted(found, key=lambda block: block.used), damaged

    def cost(self, size: int) -> int:
        """What a file of `size` bytes takes of the disk."""
        return -(-size // _PAGE) * _PAGE

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / "blocks" / name[:2] / f"{name}.kv"

    def write(self, key: bytes, views: Sequence[memoryview]) -> None:
        """Writes a block. Raises OSError."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        blockfile.write(path, self._fingerprint, key, views)

    def read(self, key: bytes, views: Sequence[memoryview]) -> None:
        """Reads a block, and sees that it is what was written. Raises DamagedError, OSError."""
        blockfile.read(self._path(key), self._fingerprint, key, views)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Removes blocks. Raises OSError."""
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets others have the folder."""
        os.close(self._lock)
