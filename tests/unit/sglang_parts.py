"""Parts of SGLang, and a little scheduler in its place: real pool, allocator and radix tree, but no model.

It does what kvmesh's agent sees of SGLang: chunked prefill of one request at a time, KV put into the tree after each
chunk, aborts of waiting and running requests. The KV of a token is that of `fake_runtime.kv`.
"""

from __future__ import annotations

import time
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fake_runtime import kv

with warnings.catch_warnings():
    # Of what SGLang misses on a machine without a GPU.
    warnings.simplefilter("ignore")
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.utils import TypeBasedDispatcher

    from services.engine.sglang import messages as m
    from services.engine.sglang import sampling
    from services.engine.sglang.agent import Agent
    from services.engine.sglang.cache import MeshRadixCache, factory
    from services.engine.sglang.copier import Copier, Stream
    from services.engine.sglang.plugin import ENGINE_VARIABLE
    from services.engine.sglang.pool import ShmKvPool, TorchPagedAllocator, layout_of
    from services.engine.sglang.reservations import Reservations
    from services.engine.sglang.runtime import _request

__all__ = [
    "ENGINE_VARIABLE",
    "FINISH_ABORT",
    "Agent",
    "Copier",
    "EvictParams",
    "InsertParams",
    "MatchPrefixParams",
    "MeshRadixCache",
    "MiniScheduler",
    "RadixKey",
    "Reservations",
    "ShmKvPool",
    "Stream",
    "TorchPagedAllocator",
    "_request",
    "allocator",
    "factory",
    "io_struct",
    "layout_of",
    "m",
    "pool",
    "sampling",
    "slots_of",
    "tree",
]

TOTAL = 256


def pool(total: int = TOTAL, page: int = 1, dtype: torch.dtype = torch.float32) -> ShmKvPool:
    """2 layers, 2 heads of 4 and 6. ENGINE_VARIABLE must be set."""
    return ShmKvPool(
        total, page, dtype, 2, 4, 2, "cpu", enable_memory_saver=False, v_head_dim=6, enable_alt_stream=False
    )


def allocator(total: int = TOTAL, page: int = 1, kvcache: Any = None) -> Any:
    """SGLang's, or ours for pages."""
    if page == 1:
        return TokenToKVPoolAllocator(total, torch.float32, "cpu", kvcache, need_sort=False)
    return TorchPagedAllocator(total, page, torch.float32, "cpu", kvcache, need_sort=False)


def tree(alloc: Any, req_to_token_pool: Any = None) -> MeshRadixCache:
    return MeshRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=req_to_token_pool,
            token_to_kv_pool_allocator=alloc,
            page_size=alloc.page_size,
        )
    )


def slots_of(cache: MeshRadixCache) -> list[int]:
    """All slots in the tree."""
    slots: list[int] = []
    stack = list(cache.root_node.children.values())
    while stack:
        node = stack.pop()
        slots += node.value.tolist()
        stack.extend(node.children.values())
    return slots


class _Rows:
    """SGLang's table of slots by request."""

    def __init__(self, requests: int, context: int) -> None:
        self.req_to_token = torch.zeros(requests, context, dtype=torch.int32)

    def write(self, where: Any, slots: torch.Tensor) -> None:
        self.req_to_token[where] = slots.to(torch.int32)


@dataclass
class _Range:
    end: int


class Req:
    """What kvmesh and the tree look at in SGLang's Req."""

    extra_key = None
    priority = 0

    def __init__(self, rid: str, ids: array[int], params: Any, index: int) -> None:
        self.rid, self.origin_input_ids, self.sampling_params, self.req_pool_idx = rid, ids, params, index
        self.output_ids: array[int] = array("q")
        self.cache_protected_len = self.filled = 0
        self.last_node: Any = None
        self.prefix_indices: Any = None
        self.finished_reason: Any = None

    @property
    def extend_range(self) -> _Range:
        """What the last pass computed; slots are there up to its end."""
        return _Range(self.filled)

    def finished(self) -> bool:
        return self.finished_reason is not None

    def get_fill_ids(self) -> array[int]:
        return self.origin_input_ids[: self.filled]


class _Batch:
    def __init__(self, req: Req, prefix: int, extend: int) -> None:
        self.reqs, self.prefix_lens, self.extend_lens = [req], [prefix], [extend]
        self.forward_mode = SimpleNamespace(is_extend=lambda: True)


class _Running:
    def __init__(self) -> None:
        self.reqs: list[Any] = []
        self.batch_is_full = False

    def is_empty(self) -> bool:
        return not self.reqs


class MiniScheduler:
    """`step` is one turn of the loop. `told` is what went to the front, in order."""

    def __init__(self, total: int = TOTAL, page: int = 1, chunk: int = 32) -> None:
        self.chunk, self.page_size = chunk, page
        self.max_total_num_tokens, self.max_req_input_len = total, 500
        self.pool = pool(total, page)
        self.token_to_kv_pool_allocator = allocator(total, page, self.pool)
        self.req_to_token_pool = _Rows(64, 1024)
        self.tree_cache = tree(self.token_to_kv_pool_allocator, self.req_to_token_pool)
        self.new_token_ratio_tracker = SimpleNamespace(current=0.5)
        self.model_config = SimpleNamespace(vocab_size=320, hf_eos_token_id={257})
        self.ps = SimpleNamespace(attn_tp_size=1)
        self.idle_sleeper = None
        self.told: list[Any] = []
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=self.told.append))
        self._request_dispatcher = TypeBasedDispatcher([])
        self.waiting_queue: list[Req] = []
        self.running_batch = _Running()
        self.last_batch: Any = None
        self.chunked_req: Req | None = None
        # Aborted requests that run end without a result, as SGLang's sometimes do.
        self.drop_aborted = False
        self._aborting: set[str] = set()
        self._indices = deque(range(64))
        self.agent = Agent(self)

    def close(self) -> None:
        """Gives the pool's memory back."""
        self.pool.shared.keys.clear()
        self.pool.shared.values.clear()
        self.pool.k_buffer, self.pool.v_buffer = [], []
        self.pool.memory.close()

    # What the agent calls

    def handle_generate_request(self, request: Any) -> None:
        ids = array("q", request.input_ids)
        self.waiting_queue.append(Req(request.rid, ids, request.sampling_params, self._indices.popleft()))

    def abort_request(self, request: Any) -> None:
        for req in [r for r in self.waiting_queue if r.rid.startswith(request.rid)]:
            self.waiting_queue.remove(req)
            self._indices.append(req.req_pool_idx)
            self.told.append(io_struct.AbortReq(rid=req.rid))
        if self.chunked_req is not None and self.chunked_req.rid.startswith(request.rid):
            self._aborting.add(self.chunked_req.rid)
        self.agent.aborted()

    def flush_cache(self) -> bool:
        if self.agent.busy or self.waiting_queue or self.chunked_req is not None:
            return False
        self.tree_cache.reset()
        self.token_to_kv_pool_allocator.clear()
        return True

    # What the test calls

    def receive(self, message: Any) -> None:
        """A message of the front, as it comes over the wire."""
        answer = self._request_dispatcher(io_struct.msgpack_decode(io_struct.msgpack_encode(message)))
        if answer is not None:
            self.told.append(answer)

    def plan(self) -> Any:
        """The next batch, as SGLang puts it together."""
        req = self.chunked_req
        if req is not None and req.rid in self._aborting and self.drop_aborted:
            self._finish(req, FINISH_ABORT("Aborted"))
            self.chunked_req = req = None
        if req is not None:
            self.tree_cache.cache_unfinished_req(req, chunked=True)
        elif self.waiting_queue and self._fits(self.waiting_queue[0]):
            req = self.waiting_queue.pop(0)
            self._admit(req)
        batch = None
        if req is not None:
            have = len(req.prefix_indices)
            count = min(self.chunk, len(req.origin_input_ids) - have)
            slots = self._alloc(req, have, count)
            if slots is None:
                # SGLang's process ends.
                raise MemoryError("Prefill out of memory")
            self.req_to_token_pool.write((req.req_pool_idx, slice(have, have + count)), slots)
            req.filled = have + count
            self.chunked_req = req if req.filled < len(req.origin_input_ids) else None
            batch = _Batch(req, have, count)
        return SimpleNamespace(batch_to_run=batch, running_batch=self.running_batch)

    def _fits(self, req: Req) -> bool:
        matched, node = self.tree_cache.match(req.origin_input_ids, len(req.origin_input_ids) - 1)
        # Locked while it is looked at: what it will use cannot give way to it.
        self.tree_cache.inc_lock_ref(node)
        room = self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size()
        self.tree_cache.dec_lock_ref(node)
        return room >= len(req.origin_input_ids) - len(matched) + self.page_size

    def _admit(self, req: Req) -> None:
        matched, node = self.tree_cache.match(req.origin_input_ids, len(req.origin_input_ids) - 1)
        self.tree_cache.inc_lock_ref(node)
        req.last_node, req.prefix_indices, req.cache_protected_len = node, matched, len(matched)
        self.req_to_token_pool.write((req.req_pool_idx, slice(0, len(matched))), matched)

    def _alloc(self, req: Req, have: int, count: int) -> torch.Tensor:
        alloc, size = self.token_to_kv_pool_allocator, self.page_size
        need = (-(-(have + count) // size) - -(-have // size)) * size
        if (short := need - alloc.available_size()) > 0:
            self.tree_cache.evict(EvictParams(num_tokens=short))
        if size == 1:
            return alloc.alloc(count)
        last = self.req_to_token_pool.req_to_token[req.req_pool_idx, have - 1 : have] if have else torch.tensor([-1])
        prefix, whole = torch.tensor([have]), torch.tensor([have + count])
        return alloc.alloc_extend(prefix, prefix, whole, whole, last.to(torch.int64), count)

    def run(self, batch: Any) -> None:
        """The model: writes KV."""
        (req,), (have,), (count,) = batch.reqs, batch.prefix_lens, batch.extend_lens
        rows = self.req_to_token_pool.req_to_token[req.req_pool_idx, have : have + count].tolist()
        for i, (k, v) in enumerate(kv(layout_of(self.pool), req.origin_input_ids, have, have + count)):
            self.pool.k_buffer[i][rows], self.pool.v_buffer[i][rows] = k, v

    def process(self, batch: Any) -> None:
        """The results."""
        (req,) = batch.reqs
        if req.rid in self._aborting:
            self._finish(req, FINISH_ABORT("Aborted"))
            self.chunked_req = None
        elif self.chunked_req is None:
            self._finish(req, FINISH_LENGTH(0))

    def _finish(self, req: Req, reason: Any) -> None:
        req.finished_reason = reason
        self._aborting.discard(req.rid)
        self.tree_cache.cache_finished_req(req, kv_len_to_handle=req.filled)
        self._indices.append(req.req_pool_idx)

    def step(self) -> bool:
        """One turn; whether there was anything to run."""
        plan = self.plan()
        self.agent.scheduled(plan)
        batch = plan.batch_to_run
        if batch is not None:
            self.agent.running(batch)
            self.run(batch)
            self.process(batch)
            self.agent.processed(batch)
        self.last_batch = batch
        return batch is not None

    def until(self, predicate: Any, timeout: float = 10.0) -> None:
        """Turns until `predicate` holds."""
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, self.told
            if not self.step():
                time.sleep(0.0005)

    def answer(self, rid: str) -> Any:
        """What was said to `rid`; waits for it."""
        self.until(lambda: any(getattr(t, "rid", None) == rid for t in self.told))
        (found,) = [t for t in self.told if getattr(t, "rid", None) == rid]
        return found

    def all_free(self) -> None:
        """Raises AssertionError unless each slot is free or in the tree, once, and nothing is locked."""
        alloc, cache = self.token_to_kv_pool_allocator, self.tree_cache
        assert cache.held == 0 and cache.protected_size() == 0
        assert alloc.available_size() + cache.evictable_size() == self.max_total_num_tokens
        pages = alloc.free_pages.tolist() + alloc.release_pages.tolist()
        free = [p * self.page_size + i for p in pages for i in range(self.page_size)]
        counts = Counter(free + slots_of(cache))
        assert set(counts.values()) <= {1} and sum(counts.values()) == self.max_total_num_tokens

    def holds(self, ids: Sequence[int], upto: int) -> bool:
        """Whether ids[:upto] is in the tree, and its slots have its KV."""
        slots, _ = self.tree_cache.match(array("q", ids), upto)
        rows = slots.tolist()
        return len(rows) == upto and all(
            torch.equal(self.pool.k_buffer[i][rows], k) and torch.equal(self.pool.v_buffer[i][rows], v)
            for i, (k, v) in enumerate(kv(layout_of(self.pool), ids, 0, upto))
        )
