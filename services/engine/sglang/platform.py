"""SGLang's out-of-tree platform for machines without CUDA: torch-native attention, KV pool in shared memory."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class KvmeshCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Named `kvmesh_cpu`."""

    _enum = PlatformEnum.OOT

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is no device to pin for."""
        return False

    def empty_cache(self) -> None:
        """Nothing: there is no device memory to give back, and a full pass of gc would stop the scheduler for 0.6 s."""

    def get_default_attention_backend(self) -> str:
        """The only one that needs no kernels of its own."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Layers use their plain torch forms."""
        return "native"

    def get_mha_kv_pool_cls(self) -> type:
        """KV in shared memory."""
        from services.engine.sglang.pool import ShmKvPool

        return ShmKvPool

    def get_paged_allocator_cls(self) -> type:
        """For page sizes above 1."""
        from services.engine.sglang.pool import TorchPagedAllocator

        return TorchPagedAllocator
