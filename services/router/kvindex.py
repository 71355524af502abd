"""What prefix caches hold, by what the engines tell: hashes of blocks, each naming a whole prefix."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.blocks import block_hashes
from kvmesh.v1.engine_pb2 import CacheChange

# Of one engine: 8 million tokens in blocks of 64; about 20 MB. What is beyond counts as not cached.
MOST_BLOCKS = 1 << 17


class BlockMap:
    """Which engines have which blocks, all engines in one place. An engine is a bit: `join` gives it one.

    So what it takes to find who has most of a prompt depends on the prompt, and hardly on the engines.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._used = 0

    def join(self) -> int:
        """A bit that nobody else has."""
        bit = ~self._used & (self._used + 1)
        self._used |= bit
        return bit

    def leave(self, bit: int) -> None:
        """Gives a bit back; its blocks have been removed."""
        self._used &= ~bit

    def add(self, block: int, bit: int) -> None:
        """That engine has it now."""
        held = self._holders.get(block)
        # Mostly one engine alone has it: then `bit` is kept itself, and takes no memory of its own.
        self._holders[block] = bit if held is None else held | bit

    def remove(self, block: int, bit: int) -> None:
        """That engine has it no more."""
        if left := self._holders[block] & ~bit:
            self._holders[block] = left
        else:
            del self._holders[block]

    def levels(self, hashes: Sequence[int], among: int) -> list[tuple[int, int]]:
        """(blocks, bits): which of the engines `among` have at least the first so many; more blocks, fewer engines."""
        found: list[tuple[int, int]] = []
        get, before = self._holders.get, among
        for depth, block in enumerate(hashes):
            held = before & get(block, 0)
            if held != before and depth and before:
                found.append((depth, before))
            if not held:
                return found
            before = held
        if hashes and before:
            found.append((len(hashes), before))
        return found


class CacheIndex:
    """One engine's part of a BlockMap: follows its CacheChange messages."""

    def __init__(self, most_blocks: int = MOST_BLOCKS, blocks: BlockMap | None = None) -> None:
        self._most = most_blocks
        self._map = BlockMap() if blocks is None else blocks
        self._blocks: set[int] = set()
        self.bit = self._map.join()

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, change: CacheChange) -> None:
        """Takes one change in."""
        if change.snapshot:
            self._clear()
        for block in change.removed:
            if block in self._blocks:
                self._blocks.remove(block)
                self._map.remove(block, self.bit)
        for block in change.stored:
            if len(self._blocks) >= self._most:
                break
            if block not in self._blocks:
                self._blocks.add(block)
                self._map.add(block, self.bit)

    def matched(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, from the first on, are there."""
        return next((i for i, block in enumerate(hashes) if block not in self._blocks), len(hashes))

    def _clear(self) -> None:
        for block in self._blocks:
            self._map.remove(block, self.bit)
        self._blocks.clear()

    def close(self) -> None:
        """The engine is listened to no more."""
        self._clear()
        self._map.leave(self.bit)


class PromptBlocks:
    """Block hashes of the prompts of one attempt, computed once for all engines."""

    def __init__(self) -> None:
        self._known: tuple[Sequence[int], int, list[int]] | None = None

    def of(self, token_ids: Sequence[int], block_tokens: int) -> list[int]:
        """The hashes of all whole blocks."""
        if self._known is None or self._known[0] is not token_ids or self._known[1] != block_tokens:
            # Kept with the tokens: as long as they are here, no other prompt is at their address.
            self._known = token_ids, block_tokens, block_hashes(token_ids, block_tokens)
        return self._known[2]
