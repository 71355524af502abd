"""The transports of one scheduler process: those that its pool can have, and the settings allow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from kvmesh.dataplane.base import Pool, Transport
from kvmesh.dataplane.choice import AUTO
from kvmesh.dataplane.setup import open_all
from services.engine.sglang.plugin import DATA_VARIABLE
from services.engine.sglang.pool import ShmKvPool, layout_of


def data_settings(transport: str, host: str) -> str:
    """For DATA_VARIABLE."""
    return json.dumps({"transport": transport, "host": host})


def kv_pool(pool: Any) -> Pool:
    """SGLang's pool as transports see it."""
    return (
        pool.shared if isinstance(pool, ShmKvPool) else Pool(layout_of(pool), list(pool.k_buffer), list(pool.v_buffer))
    )


def make(pool: Any) -> tuple[Pool, dict[str, Transport]]:
    """(pool, transports, best first), as the settings in the environment say. Raises as `open_all`."""
    settings = json.loads(os.environ.get(DATA_VARIABLE, "") or data_settings(AUTO, "127.0.0.1"))
    ours = kv_pool(pool)
    return ours, open_all(settings["transport"], _makers(pool, ours, settings["host"]))


def _makers(pool: Any, ours: Pool, host: str) -> dict[str, Callable[[], Transport]]:
    from kvmesh.dataplane.gloo import GlooLinks
    from kvmesh.dataplane.pair import PairTransport
    from kvmesh.dataplane.shm import ShmTransport

    if isinstance(pool, ShmKvPool):
        return {
            "shm": lambda: ShmTransport(pool.memory, ours),
            "gloo": lambda: PairTransport(ours, GlooLinks(host), host),
        }
    if ours.keys[0].device.type != "cuda":
        return {}
    from kvmesh.dataplane.cuda_ipc import CudaIpcTransport
    from kvmesh.dataplane.nccl import NcclLinks

    device = ours.keys[0].device
    return {
        "cuda_ipc": lambda: CudaIpcTransport(ours),
        "nccl": lambda: PairTransport(ours, NcclLinks(device), host, device=device),
        # By way of the host's memory.
        "gloo": lambda: PairTransport(ours, GlooLinks(host), host),
    }
