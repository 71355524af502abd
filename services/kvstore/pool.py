"""The memory tier for real KV: a pool in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmesh.dataplane.base import Transport
from kvmesh.dataplane.gloo import GlooLinks
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.pair import PairTransport, Patience
from kvmesh.dataplane.setup import open_all
from kvmesh.dataplane.shm import ShmTransport, create_pool
from services.kvstore.memory import BlockMemory, block_tokens, enough


class BlockPool(BlockMemory):
    """All of it is taken at the start.

    Raises InvalidArgument when `memory` bytes are too few, OSError or MemoryError when they cannot be had.
    """

    def __init__(self, layout: Layout, memory: int, name: str) -> None:
        tokens = block_tokens(layout)
        size = layout.bytes_per_token * tokens
        blocks = memory // size - 1
        while blocks > 0 and sum(layout.part_bytes((blocks + 1) * tokens)) > memory:
            blocks -= 1
        super().__init__(layout, enough(blocks, memory, size), size)
        self._memory, self.kv = create_pool(layout, (blocks + 1) * tokens, name)
        parts = [part for pair in zip(self.kv.keys, self.kv.values, strict=True) for part in pair]
        # Bytes of each layer's K and V, shape [rows, bytes of a row].
        self._parts = [_bytes(part) for part in parts]

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        return self._memory.size

    def transports(self, setting: str, host: str, patience: Patience | None = None) -> dict[str, Transport]:
        """Ways between this pool and others, best first, as the settings allow; the caller closes them.

        Raises CannotConnect, InvalidArgument.
        """
        import torch

        makers: dict[str, Callable[[], Transport]] = {
            "shm": lambda: ShmTransport(self._memory, self.kv),
            "gloo": lambda: PairTransport(self.kv, GlooLinks(host), host, patience),
        }
        if torch.cuda.is_available():
            from kvmesh.dataplane.cuda_ipc import CudaIpcTransport

            # The memory is pinned for engines on GPUs of this host (never run).
            makers["cuda_ipc"] = lambda: CudaIpcTransport(self.kv, shared=self._memory)
        return open_all(setting, makers)

    def views(self, block: int) -> list[memoryview]:
        """One view for K and V of each layer."""
        first = block * self.tokens
        return [memoryview(part[first : first + self.tokens].reshape(-1)) for part in self._parts]

    def close(self) -> None:
        """Gives the memory back."""
        self._parts.clear()
        self._memory.close()


def _bytes(part: Any) -> Any:
    import torch

    return part.view(part.shape[0], -1).view(torch.uint8).numpy()
