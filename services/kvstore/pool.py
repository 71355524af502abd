"""The memory tier: a pool in shared memory, given out by blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvmesh.blocks import BLOCK_TOKENS
from kvmesh.dataplane.base import Transport
from kvmesh.dataplane.gloo import GlooLinks
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.pair import PairTransport, Patience
from kvmesh.dataplane.setup import open_all
from kvmesh.dataplane.shm import ShmTransport, create_pool
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import InvalidArgument


def block_tokens(layout: Layout) -> int:
    """Tokens in a block: whole pages, and whole blocks of the mesh's cache events."""
    return math.lcm(BLOCK_TOKENS, layout.page_size)


class BlockPool:
    """`blocks` blocks of `tokens` tokens. Those taken are the taker's until given back.

    Raises InvalidArgument when `memory` bytes are too few, OSError or MemoryError when they cannot be had.
    """

    def __init__(self, layout: Layout, memory: int, name: str) -> None:
        self.layout = layout
        self.tokens = block_tokens(layout)
        # The first block is padding, as the first page is in an engine's pool.
        self.blocks = memory // (layout.bytes_per_token * self.tokens) - 1
        while self.blocks > 0 and sum(layout.part_bytes(self._rows)) > memory:
            self.blocks -= 1
        if self.blocks < 2:
            need = 3 * layout.bytes_per_token * self.tokens
            raise InvalidArgument(
                f"memory = {memory} bytes has no room for two blocks of this model: {need} are needed"
            )
        self._memory, pool = create_pool(layout, self._rows, name)
        self.kv = pool
        self._free = list(range(self.blocks, 0, -1))
        parts = [part for pair in zip(pool.keys, pool.values, strict=True) for part in pair]
        # Bytes of each layer's K and V, shape [rows, bytes of a row].
        self._parts = [_bytes(part) for part in parts]
        self.block_bytes = self.tokens * layout.bytes_per_token

    @property
    def _rows(self) -> int:
        return (self.blocks + 1) * self.tokens

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        return self._memory.size

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def transports(self, setting: str, host: str, patience: Patience | None = None) -> dict[str, Transport]:
        """Ways between this pool and others, best first, as the settings allow; the caller closes them.

        Raises CannotConnect, InvalidArgument.
        """
        return open_all(
            setting,
            {
                "shm": lambda: ShmTransport(self._memory, self.kv),
                "gloo": lambda: PairTransport(self.kv, GlooLinks(host), host, patience),
            },
        )

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

    def views(self, block: int) -> list[memoryview]:
        """The bytes of a block, one flat writable view for K and V of each layer."""
        first = block * self.tokens
        return [memoryview(part[first : first + self.tokens].reshape(-1)) for part in self._parts]

    def close(self) -> None:
        """Gives the memory back."""
        self._parts.clear()
        self._memory.close()


def _bytes(part: Any) -> Any:
    import torch

    return part.view(part.shape[0], -1).view(torch.uint8).numpy()
