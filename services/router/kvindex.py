"""What one engine's prefix cache holds, by what the engine tells: hashes of blocks, each naming a whole prefix."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.blocks import block_hashes
from kvmesh.v1.engine_pb2 import CacheChange

# 8 million tokens in blocks of 64; about 10 MB. More than that is not remembered, and counts as not cached.
MOST_BLOCKS = 1 << 17


class CacheIndex:
    """Follows CacheChange messages."""

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most = most_blocks
        self._blocks: set[int] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, change: CacheChange) -> None:
        """Takes one change in."""
        if change.snapshot:
            self._blocks.clear()
        self._blocks.difference_update(change.removed)
        for block in change.stored:
            if len(self._blocks) >= self._most:
                break
            self._blocks.add(block)

    def matched(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, from the first on, are there."""
        return next((i for i, block in enumerate(hashes) if block not in self._blocks), len(hashes))


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
