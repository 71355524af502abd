"""What the store has: an entry for each block, in memory, on disk or both, in order of last use."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from services.kvstore.memory import BlockMemory


@dataclass(eq=False, slots=True)
class Entry:
    """One block. `used` and `pinned` (until when) are seconds since the epoch."""

    key: bytes
    # Block of the pool; None: not in memory.
    block: int | None
    # Bytes that its file takes; 0: not on disk.
    disk: int
    used: float
    # Waits to be written to disk, or is being written.
    unwritten: bool = False
    # Users that keep it where it is: reservations, sends, reads and writes of its file.
    locks: int = 0
    pinned: float = 0.0


@dataclass(slots=True)
class Counts:
    """Since the start; as in StoreStats."""

    stored: int = 0
    loaded: int = 0
    written: int = 0
    evicted: int = 0
    expired: int = 0
    damaged: int = 0
    disk_errors: int = 0
    asked_tokens: int = 0
    sent_tokens: int = 0


class Index:
    """All entries. For one thread. `ttl` 0: entries do not age; `clock` gives seconds since the epoch."""

    def __init__(self, pool: BlockMemory, ttl: float = 0.0, clock: Callable[[], float] = time.time) -> None:
        self.counts = Counts()
        self.disk_bytes = 0
        # Entries with locks.
        self.locked = 0
        # Files to be removed, with what they take; until then they count in `disk_bytes`.
        self.doomed: dict[bytes, int] = {}
        self._pool = pool
        self._ttl = ttl
        self._clock = clock
        self._entries: dict[bytes, Entry] = {}
        self._pins: dict[bytes, Entry] = {}
        # The least recently used first.
        self.memory: OrderedDict[bytes, Entry] = OrderedDict()
        self.disk: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Entry]:
        """All of them."""
        return list(self._entries.values())

    def chain(self, keys: Iterable[bytes]) -> list[Entry]:
        """The entries of `keys` up to the first that is missing."""
        found: list[Entry] = []
        now = self._clock()
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or self._over(entry, now):
                break
            found.append(entry)
        return found

    def touch(self, entries: Sequence[Entry]) -> None:
        """They are used now; of one chain the last goes first, as those behind it are of no use without it."""
        now = self._clock()
        for entry in reversed(entries):
            entry.used = now
            if entry.block is not None:
                self.memory.move_to_end(entry.key)
            if entry.disk:
                self.disk.move_to_end(entry.key)

    def lock(self, entries: Iterable[Entry]) -> None:
        """Keeps them where they are until `unlock`."""
        for entry in entries:
            self.locked += not entry.locks
            entry.locks += 1

    def unlock(self, entries: Iterable[Entry]) -> None:
        """The end of one `lock`."""
        for entry in entries:
            entry.locks -= 1
            self.locked -= not entry.locks

    def put(self, key: bytes, block: int) -> Entry:
        """A block with KV; one that is in memory already goes back to the pool."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key, None, 0, self._clock())
        if entry.block is None:
            self.placed(entry, block)
        else:
            self._pool.give(block)
        entry.used = self._clock()
        return entry

    def placed(self, entry: Entry, block: int) -> None:
        """Its KV is in that block of memory now."""
        entry.block = block
        self.memory[entry.key] = entry

    def on_disk(self, key: bytes, size: int, used: float) -> None:
        """A file that was there at the start, in order of use."""
        entry = self._entries[key] = Entry(key, None, size, used)
        self.disk[key] = entry
        self.disk_bytes += size

    def written(self, entry: Entry, size: int) -> None:
        """Its file, whose bytes are counted already, is on disk now."""
        entry.disk, entry.unwritten = size, False
        self.disk[entry.key] = entry
        self.counts.written += 1

    def pin(self, entries: Iterable[Entry], until: float) -> None:
        """Keeps them in the store until then; 0 ends a pin."""
        for entry in entries:
            entry.pinned = until
            if until:
                self._pins[entry.key] = entry
            else:
                self._pins.pop(entry.key, None)

    @property
    def pinned(self) -> int:
        """Entries that are pinned."""
        now = self._clock()
        for key in [key for key, entry in self._pins.items() if entry.pinned <= now]:
            del self._pins[key]
        return len(self._pins)

    def make_room(self, count: int) -> bool:
        """Whether `count` blocks of memory are free, after evicting the least recently used; else nothing is."""
        missing = count - self._pool.free
        if missing <= 0:
            return True
        now = self._clock()
        victims: list[Entry] = []
        for entry in self.memory.values():
            if not (entry.locks or entry.unwritten or (entry.pinned > now and not entry.disk)):
                victims.append(entry)
                if len(victims) == missing:
                    break
        if len(victims) < missing:
            return False
        for entry in victims:
            self._leave_memory(entry)
        return True

    def make_disk_room(self, size: int, limit: int) -> bool:
        """Whether a file of `size` fits under `limit` once `doomed` is gone; the least recently used make room."""
        now = self._clock()
        victims: list[Entry] = []
        room = limit - self.disk_bytes + sum(self.doomed.values()) - size
        for entry in self.disk.values():
            if room >= 0:
                break
            if not entry.locks and entry.pinned <= now:
                victims.append(entry)
                room += entry.disk
        if room < 0:
            return False
        for entry in victims:
            self._leave_disk(entry)
        return True

    def drop(self, entry: Entry) -> None:
        """Forgets it, in memory and on disk."""
        if entry.block is not None:
            self._pool.give(entry.block)
            entry.block = None
            del self.memory[entry.key]
        if entry.disk:
            self._doom(entry)
        self._entries.pop(entry.key, None)
        self._pins.pop(entry.key, None)

    def lose_file(self, entry: Entry) -> None:
        """Its file is no good: it is dropped, unless it is in memory too."""
        if entry.block is None:
            self.drop(entry)
        elif entry.disk:
            self._doom(entry)

    def expire(self) -> None:
        """Drops entries whose time is over."""
        if not self._ttl:
            return
        now = self._clock()
        for entry in [e for e in self._entries.values() if self._over(e, now) and not e.locks]:
            self.drop(entry)
            self.counts.expired += 1

    def _over(self, entry: Entry, now: float) -> bool:
        return bool(self._ttl) and entry.used + self._ttl < now and entry.pinned <= now

    def _leave_memory(self, entry: Entry) -> None:
        if entry.disk:
            assert entry.block is not None
            self._pool.give(entry.block)
            entry.block = None
            del self.memory[entry.key]
        else:
            self.drop(entry)
            self.counts.evicted += 1

    def _leave_disk(self, entry: Entry) -> None:
        if entry.block is None:
            self.drop(entry)
            self.counts.evicted += 1
        else:
            self._doom(entry)

    def _doom(self, entry: Entry) -> None:
        self.doomed[entry.key] = entry.disk
        entry.disk = 0
        del self.disk[entry.key]
