"""Memory between a pool and a network: a frame's rows, gathered from the pool or to be scattered into it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmesh.dataplane.base import Pool
from kvmesh.dataplane.layout import ITEM_BYTES, Layout
from kvmesh.dataplane.slots import Slots, joint_runs
from kvmesh.errors import Unavailable

if TYPE_CHECKING:
    import torch

FRAME_BYTES = 4 << 20
# As in shm: below this many rows a stretch, one indexed copy beats a copy for each stretch.
SHORT_RUN = 4
# How often one that waits for a frame looks whether it still wants it.
LOOK_S = 0.1


def frame_rows(layout: Layout, frame_bytes: int = FRAME_BYTES) -> int:
    """Rows of a whole frame."""
    return max(1, frame_bytes // layout.bytes_per_token)


class Frame:
    """Room for `rows` rows: K of layer 0 for all rows of the frame, V of it, K of layer 1, and so on."""

    def __init__(self, layout: Layout, rows: int, device: torch.device | str = "cpu", pinned: bool = False) -> None:
        import torch

        self.layout = layout
        self.rows = rows
        size = rows * layout.bytes_per_token
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._dtype: torch.dtype = getattr(torch, layout.dtype)

    def bytes(self, rows: int) -> torch.Tensor:
        """The first `rows` rows, as they travel."""
        return self._bytes[: rows * self.layout.bytes_per_token]

    def parts(self, rows: int) -> list[torch.Tensor]:
        """K and V of each layer in turn, shape [rows, heads, dim], when the frame has `rows` rows."""
        parts: list[torch.Tensor] = []
        at = 0
        for _ in range(self.layout.layers):
            for dim in (self.layout.k_dim, self.layout.v_dim):
                size = rows * self.layout.heads * dim * ITEM_BYTES[self.layout.dtype]
                parts.append(self._bytes[at : at + size].view(self._dtype).view(rows, self.layout.heads, dim))
                at += size
        return parts

    def gather(self, pool: Pool, slots: Slots) -> torch.Tensor:
        """Copies rows `slots` of `pool` into the frame; the bytes to send."""
        _copy(pool, slots, self.parts(len(slots)), into_pool=False)
        return self.bytes(len(slots))

    def scatter(self, pool: Pool, slots: Slots) -> None:
        """Copies the frame's rows to rows `slots` of `pool`."""
        _copy(pool, slots, self.parts(len(slots)), into_pool=True)

    def settle(self, pool: Pool) -> None:
        """Returns when a scatter is done that went from the host's memory to a device (never run)."""
        import torch

        if self._bytes.device.type == "cpu" and (device := pool.keys[0].device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _copy(pool: Pool, slots: Slots, parts: list[torch.Tensor], into_pool: bool) -> None:
    import numpy as np
    import torch

    tensors = [tensor for pair in zip(pool.keys, pool.values, strict=True) for tensor in pair]
    runs = joint_runs(slots, np.arange(len(slots)))
    if len(runs) * SHORT_RUN <= len(slots):
        for tensor, part in zip(tensors, parts, strict=True):
            for row, at, count in runs:
                if into_pool:
                    tensor[row : row + count].copy_(part[at : at + count])
                else:
                    part[at : at + count].copy_(tensor[row : row + count])
        return
    index = torch.tensor(slots, device=tensors[0].device)
    for tensor, part in zip(tensors, parts, strict=True):
        if into_pool:
            tensor.index_copy_(0, index, part.to(tensor.device))
        elif part.device == tensor.device:
            torch.index_select(tensor, 0, index, out=part)
        else:
            part.copy_(tensor.index_select(0, index))


class FramePool:
    """A bounded number of pairs of frames, made when first needed and used again. `pinned`: for copies to a GPU."""

    def __init__(
        self, layout: Layout, rows: int, pairs: int, device: torch.device | str = "cpu", pinned: bool = False
    ) -> None:
        self.rows = rows
        self._pinned = pinned
        self._layout = layout
        self._device = device
        # None stands for a pair that is yet to be made.
        self._free: queue.LifoQueue[tuple[Frame, Frame] | None] = queue.LifoQueue()
        for _ in range(pairs):
            self._free.put(None)

    @contextmanager
    def borrow(self, deadline: float, given_up: Callable[[], bool] = lambda: False) -> Iterator[tuple[Frame, Frame]]:
        """A pair of frames, by monotonic `deadline`. Raises Unavailable when all are in use until then.

        Also once `given_up`, which is looked at now and then.
        """
        while True:
            left = deadline - time.monotonic()
            try:
                pair = self._free.get(timeout=min(LOOK_S, max(0.0, left)))
                break
            except queue.Empty:
                if left <= LOOK_S:
                    raise Unavailable("too many transfers at once: no staging memory came free in time") from None
                if given_up():
                    raise Unavailable("it was cancelled") from None
        try:
            if pair is None:
                pair = tuple(Frame(self._layout, self.rows, self._device, self._pinned) for _ in range(2))  # type: ignore[assignment]
            assert pair is not None
            yield pair
        finally:
            self._free.put(pair)
