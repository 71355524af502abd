"""What the memory tier is: blocks of a pool, given out and taken back."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import numpy as np

from kvmesh.blocks import BLOCK_TOKENS
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import InvalidArgument


def block_tokens(layout: Layout) -> int:
    """Tokens in a block: whole pages, and whole blocks of the mesh's cache events."""
    return math.lcm(BLOCK_TOKENS, layout.page_size)


def enough(blocks: int, memory: int, block_bytes: int) -> int:
    """`blocks`, beside the padding, fit into `memory` bytes. Raises InvalidArgument when they are too few."""
    if blocks < 2:
        raise InvalidArgument(
            f"memory = {memory} bytes has no room for two blocks of this model: {3 * block_bytes} are needed"
        )
    return blocks


class BlockMemory(abc.ABC):
    """`blocks` blocks of `tokens` tokens. Those taken are the taker's until given back.

    Block 0 is padding, as the first page is in an engine's pool. `block_bytes` of KV are in a block, all ranks.
    """

    def __init__(self, layout: Layout, blocks: int, block_bytes: int) -> None:
        self.layout = layout
        self.tokens = block_tokens(layout)
        self.blocks = blocks
        self.block_bytes = block_bytes
        self._free = list(range(blocks, 0, -1))

    @property
    @abc.abstractmethod
    def bytes(self) -> int:
        """Of KV in all."""

    @abc.abstractmethod
    def views(self, block: int) -> Sequence[memoryview]:
        """The bytes of a block, as flat writable views: what a file of it has."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the memory back."""

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many blocks; the caller has seen that they are free."""
        return [self._free.pop() for _ in range(count)]

    def give(self, block: int) -> None:
        """Takes a block back."""
        self._free.append(block)

    def rows(self, blocks: list[int]) -> Slots:
        """The rows of these blocks, in order."""
        starts = np.asarray(blocks, np.int64) * self.tokens
        rows: Slots = (starts[:, None] + np.arange(self.tokens)).reshape(-1)
        return rows
