"""What former requests began with, as block hashes; bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# 64 MiB or so; with blocks of 64 tokens these are 16 million tokens.
BLOCKS = 1 << 18


class Seen:
    """Remembers the `most` blocks last seen."""

    def __init__(self, most: int = BLOCKS) -> None:
        self._most = most
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, hashes: Sequence[int]) -> int:
        """Remembers them; how many of the first were known before."""
        known = next((i for i, block in enumerate(hashes) if block not in self._blocks), len(hashes))
        # Those further on are of no use without the first: they are forgotten sooner.
        for block in reversed(hashes):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
        return known
