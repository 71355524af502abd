"""What SGLang finds through the entry points `sglang.srt.platforms` and `sglang.srt.plugins`.

Both do nothing unless the process was started by `kvmesh engine`, which sets ENGINE_VARIABLE.
"""

from __future__ import annotations

import os
import threading
from typing import Any

# Set by the front for its scheduler processes; the value names the memory of the KV pool.
ENGINE_VARIABLE = "KVMESH_ENGINE_POOL"
# Likewise: which transports it has, and the address that peers reach it at.
DATA_VARIABLE = "KVMESH_ENGINE_DATA"
PLATFORM = "kvmesh_cpu"
CACHE = "kvmesh"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def platform() -> str | None:
    """The CPU platform, where there is no CUDA."""
    import torch

    if ENGINE_VARIABLE not in os.environ or torch.cuda.is_available():
        return None
    return "services.engine.sglang.platform.KvmeshCpuPlatform"


def register() -> None:
    """Puts the agent into the scheduler, and ours in place of what SGLang lets plugins replace."""
    if ENGINE_VARIABLE not in os.environ:
        return
    import torch
    from sglang.srt.managers import io_struct
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from tqdm import tqdm

    from services.engine.sglang import cache, form, messages, sampling

    io_struct.hook_custom_types(*messages.ALL)
    # Its own lock is a named semaphore, which a process that is killed leaves in /dev/shm.
    tqdm.set_lock(threading.RLock())
    if CACHE not in registered_radix_cache_backends():
        register_radix_cache_backend(CACHE, cache.factory)
    for method, hook, kind in (
        ("init_request_dispatcher", _attach, HookType.AFTER),
        ("get_init_info", _describe, HookType.AFTER),
        ("get_next_batch_to_run", _scheduled, HookType.AFTER),
        ("run_batch", _run, HookType.BEFORE),
        ("process_batch_result", _processed, HookType.AFTER),
        ("abort_request", _aborted, HookType.AFTER),
        ("flush_cache", _flush, HookType.AROUND),
    ):
        HookRegistry.register(f"{_SCHEDULER}.{method}", hook, kind)
    if not torch.cuda.is_available():
        from services.engine.sglang import attention

        attention.register()
    sampling.register(HookRegistry, HookType)
    form.register(HookRegistry, HookType)


def _attach(_result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from services.engine.sglang.agent import Agent

    scheduler.kvmesh = Agent(scheduler)


def _describe(info: dict[str, Any], scheduler: Any, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
    info["kvmesh"] = scheduler.kvmesh.describe()
    return info


def _scheduled(plan: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    scheduler.kvmesh.scheduled(plan)


def _run(scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    scheduler.kvmesh.running(batch)


def _processed(_result: Any, scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    scheduler.kvmesh.processed(batch)


def _aborted(_result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    scheduler.kvmesh.aborted()


def _flush(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    return not scheduler.kvmesh.busy and original(scheduler, *args, **kwargs)
