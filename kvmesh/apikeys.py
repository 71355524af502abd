"""API keys: who may use a door, for what, and how much at once. The file holds digests, never the keys.

[alice]
sha256 = "9f86d0…"              # of the key; `kvmesh key` makes both
scopes = ["generate"]           # or "admin", which is everything
max_running = 8                 # requests at once; 0: no limit
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.config import read_toml
from kvmesh.errors import InvalidArgument, PermissionDenied, ResourceExhausted, Unauthenticated

log = logging.getLogger(__name__)

GENERATE, ADMIN = "generate", "admin"
SCOPES = (GENERATE, ADMIN)
# How often it is looked whether the file has changed, seconds.
LOOK_S = 1.0
# What a caller over its limit is told to wait, seconds.
RETRY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ApiKey:
    """One key, by its name."""

    name: str
    scopes: frozenset[str]
    max_running: int = 0

    def check(self, scope: str, what: str) -> None:
        """Raises PermissionDenied unless the key has `scope`, which `what` needs; `admin` has all."""
        if scope not in self.scopes and ADMIN not in self.scopes:
            raise PermissionDenied(f"{what} needs a key with the scope {scope!r}; {self.name!r} does not have it")


class ApiKeys:
    """The keys of a file, read again when it changes. Raises InvalidArgument when it cannot be read at the start."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._stamp = self._stat()
        self._keys = read(self._path)
        self._looked = time.monotonic()
        self._running: Counter[str] = Counter()

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read(self._path)
            log.info("%s: %d API keys", self._path, len(self._keys))
        except InvalidArgument as error:
            log.warning("the API keys stay as they were: %s", error)

    def find(self, authorization: str) -> ApiKey:
        """The key of an `authorization` header. Raises Unauthenticated."""
        self._look()
        kind, _, given = authorization.partition(" ")
        if kind.lower() != "bearer" or not given:
            raise Unauthenticated("an API key is needed: authorization: Bearer KEY")
        # Looked up by digest: how long it takes tells nothing of the keys there are.
        key = self._keys.get(digest(given.strip()))
        if key is None:
            raise Unauthenticated("the API key is unknown")
        return key

    @contextlib.contextmanager
    def running(self, key: ApiKey, count: int) -> Iterator[None]:
        """Holds `count` of the key's requests. Raises ResourceExhausted when that is over its limit."""
        if key.max_running and self._running[key.name] + count > key.max_running:
            error = ResourceExhausted(
                f"the key {key.name!r} has {self._running[key.name]} requests running, and may have {key.max_running}"
            )
            error.retry_after = RETRY_S
            raise error
        self._running[key.name] += count
        try:
            yield
        finally:
            self._running[key.name] -= count


def digest(key: str) -> str:
    """What the file holds of a key. Keys have 256 random bits: nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> dict[str, ApiKey]:
    """Keys by digest. Raises InvalidArgument naming file and entry."""
    keys: dict[str, ApiKey] = {}
    for name, entry in read_toml(path).items():
        where = f"{path}: [{name}]"
        if not isinstance(entry, dict):
            raise InvalidArgument(f"{path}: {name} is no table")
        if unknown := set(entry) - {"sha256", "scopes", "max_running"}:
            raise InvalidArgument(f"{where}: there is no setting {sorted(unknown)[0]!r}")
        if not _DIGEST.fullmatch(str(entry.get("sha256", ""))):
            raise InvalidArgument(f"{where}: sha256 is not 64 hexadecimal digits")
        keys[entry["sha256"]] = ApiKey(name, _scopes(where, entry.get("scopes")), _limit(where, entry))
    return keys


def _scopes(where: str, given: Any) -> frozenset[str]:
    if not isinstance(given, list) or not given or not set(map(str, given)) <= set(SCOPES):
        raise InvalidArgument(f"{where}: scopes is not a list of {', '.join(SCOPES)}")
    return frozenset(given)


def _limit(where: str, entry: dict[str, Any]) -> int:
    limit = entry.get("max_running", 0)
    if type(limit) is not int or limit < 0:
        raise InvalidArgument(f"{where}: max_running = {limit!r} is no number of requests")
    return limit


def add(path: Path, name: str, scopes: Sequence[str], max_running: int = 0) -> str:
    """Adds a new key to the file, made if there is none; the key. Raises InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"name = {name!r} is not [A-Za-z0-9_-], 1 to 63 characters")
    if path.exists() and name in {key.name for key in read(path).values()}:
        raise InvalidArgument(f"name = {name!r} is in {path} already")
    key = f"kvmesh-{secrets.token_urlsafe(32)}"
    names = ", ".join(f'"{scope}"' for scope in scopes)
    entry = f'[{name}]\nsha256 = "{digest(key)}"\nscopes = [{names}]\nmax_running = {max_running}\n\n'
    path.touch(mode=0o600)
    with path.open("a") as file:
        file.write(entry)
    return key
