"""SGLang's KV pool and allocator on the CPU: the pool lies in shared memory, the allocator needs no Triton."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvmesh.dataplane.base import Pool
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.shm import SharedMemory, create_pool
from services.engine.sglang.plugin import ENGINE_VARIABLE


class ShmKvPool(MHATokenToKVPool):  # type: ignore[misc]
    """Each layer's K and V are views of one piece of shared memory."""

    memory: SharedMemory
    shared: Pool

    def _create_buffers_normal(self) -> None:
        k_shape, v_shape = self._kv_buffer_shapes()
        layout = layout_of(self)
        self.memory, self.shared = create_pool(layout, k_shape[0], f"kvmesh-{os.environ[ENGINE_VARIABLE]}")
        self.k_buffer, self.v_buffer = self.shared.keys, self.shared.values
        assert tuple(self.k_buffer[0].shape) == tuple(k_shape) and tuple(self.v_buffer[0].shape) == tuple(v_shape)


def layout_of(pool: Any) -> Layout:
    """The layout of an SGLang MHA pool. `model_digest` is what the front said of the model.

    Raises TypeError for another kind of pool.
    """
    if not isinstance(pool, MHATokenToKVPool):
        raise TypeError(f"kvmesh moves the KV of multi-head and grouped-query attention, not of {type(pool).__name__}")
    return Layout(
        model_digest=os.environ[ENGINE_VARIABLE].partition(":")[0],
        dtype=str(pool.store_dtype).removeprefix("torch."),
        layers=pool.layer_num,
        heads=pool.head_num,
        k_dim=pool.head_dim,
        v_dim=pool.v_head_dim,
        page_size=pool.page_size,
    )


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """The stock one launches Triton kernels for page sizes above 1; this one uses torch operations."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens that each sequence grows by; None when there are not enough pages."""
        size = self.page_size
        pages = int((((seq_lens_cpu + size - 1) // size) - ((prefix_lens_cpu + size - 1) // size)).sum())
        if pages > len(self.free_pages):
            self.merge_and_sort_free()
        if pages > len(self.free_pages):
            return None
        out = torch.empty((extend_num_tokens,), dtype=torch.int64)
        alloc_extend_naive(
            prefix_lens_cpu, seq_lens_cpu, last_loc.to(torch.int64), self.free_pages, out, size, self.device
        )
        self.free_pages = self.free_pages[pages:]
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot for each sequence; None when there are not enough pages."""
        begins = (seq_lens_cpu - 1) % self.page_size == 0
        pages = int(begins.sum())
        if pages > len(self.free_pages):
            self.merge_and_sort_free()
        if pages > len(self.free_pages):
            return None
        out = last_loc.to(torch.int64) + 1
        out[begins] = self.free_pages[:pages] * self.page_size
        self.free_pages = self.free_pages[pages:]
        return out
