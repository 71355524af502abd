"""NEVER RUN: there was no GPU where this was written. Read against torch 2.11 and sgl_kernel of SGLang 0.5.17.

Many rows of all layers in one kernel: SGLang's own, made for its hierarchical cache. They take tables of device
pointers, one a layer, and row numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvmesh.dataplane.layout import ITEM_BYTES, Layout
from kvmesh.dataplane.slots import Slots

if TYPE_CHECKING:
    import torch

# The kernel copies words of 8 bytes.
WORD = 8


def row_bytes(layout: Layout) -> tuple[int, int]:
    """Bytes of one row of one layer's K, and of its V. Raises ValueError for rows that the kernel cannot copy."""
    sizes = tuple(layout.heads * dim * ITEM_BYTES[layout.dtype] for dim in (layout.k_dim, layout.v_dim))
    for size in sizes:
        if size % WORD:
            raise ValueError(f"rows of {size} bytes are no multiple of {WORD}")
    return sizes[0], sizes[1]


def table(tensors: Sequence[torch.Tensor], device: torch.device | str) -> torch.Tensor:
    """The tensors' addresses, uint64, on `device`."""

    return pointers([t.data_ptr() for t in tensors], device)


def pointers(addresses: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Addresses as a tensor of uint64 on `device`."""
    import torch

    # By way of int64, of which conversions are sure to exist: addresses above 2^63 do not.
    return torch.tensor(addresses, dtype=torch.int64).view(torch.uint64).to(device)


def part_addresses(base: int, layout: Layout, rows: int) -> tuple[list[int], list[int]]:
    """Addresses of K, and of V, of each layer in a frame at `base` that has `rows` rows (as Frame.parts has them)."""
    k_size, v_size = (rows * layout.heads * dim * ITEM_BYTES[layout.dtype] for dim in (layout.k_dim, layout.v_dim))
    keys = [base + layer * (k_size + v_size) for layer in range(layout.layers)]
    return keys, [key + k_size for key in keys]


class RowCopier:
    """Copies rows of all layers between pools on one device, on the current stream: one launch, or two."""

    def __init__(self, layout: Layout, device: torch.device | str, kernels: Any = None) -> None:
        self._kernels = importlib.import_module("sgl_kernel.kvcacheio") if kernels is None else kernels
        self._layers = layout.layers
        self._device = device
        self._k_bytes, self._v_bytes = row_bytes(layout)

    def index(self, slots: Slots) -> torch.Tensor:
        """Row numbers on the device. The copy is ordered by the current stream, and needs no synchronisation."""
        import torch

        host = torch.from_numpy(slots.copy())
        if torch.device(self._device).type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def copy(
        self,
        source: tuple[torch.Tensor, torch.Tensor],
        target: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
        into: torch.Tensor,
    ) -> None:
        """`source`, `target`: pointer tables of K and V; rows `rows` of the one go to rows `into` of the other."""
        if self._k_bytes == self._v_bytes:
            self._kernels.transfer_kv_all_layer(
                src_k_layers=source[0],
                dst_k_layers=target[0],
                src_v_layers=source[1],
                dst_v_layers=target[1],
                src_indices=rows,
                dst_indices=into,
                item_size=self._k_bytes,
                num_layers=self._layers,
            )
            return
        # Keys and values of different sizes: the kernel for one pool only, twice.
        for i, size in enumerate((self._k_bytes, self._v_bytes)):
            self._kernels.transfer_kv_all_layer_mla(
                src_layers=source[i],
                dst_layers=target[i],
                src_indices=rows,
                dst_indices=into,
                item_size=size,
                num_layers=self._layers,
            )
