"""Reserved slots, inside the scheduler: every change of the pool and the tree that tickets cause is here."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from services.engine.sglang import messages as m
from services.engine.sglang.cache import MeshRadixCache

# What a running request is counted with at most, as SGLang itself does.
DECODE_TOKENS = 4096


@dataclass(slots=True)
class Reservation:
    """Tokens [0:filled) are in the tree and locked by `node`; `slots` are those of [filled:end)."""

    ids: array[int]
    end: int
    matched: int
    filled: int
    node: TreeNode
    slots: torch.Tensor


class Reservations:
    """All reservations of this scheduler, and those that wait for room, in order of arrival."""

    def __init__(self, scheduler: Any, tell: Callable[[Any], None]) -> None:
        self._scheduler = scheduler
        self._tree: MeshRadixCache = scheduler.tree_cache
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._tell = tell
        self._tickets: dict[int, Reservation] = {}
        self._waiting: OrderedDict[str, m.MeshReserve] = OrderedDict()
        self._last = 0
        # What was free when the first waiting one did not fit: no use in trying before that changes.
        self._tried = -1
        # The batch that runs, or ran last: a prefill is not part of SGLang's running batch yet.
        self._batch: Any = None

    @property
    def count(self) -> int:
        """Reservations held."""
        return len(self._tickets)

    @property
    def waiting(self) -> int:
        """Reservations that wait."""
        return len(self._waiting)

    def reserve(self, request: m.MeshReserve) -> None:
        """Reserves, or lets it wait behind the others."""
        if not self._waiting and self._try(request):
            return
        if not request.wait:
            self._refuse(request, "no room now")
            return
        self._waiting[request.rid] = request
        self._tried = -1

    def cancel(self, request: m.MeshCancelReserve) -> None:
        """The front does not wait any more; one that has been answered meanwhile is the front's to free."""
        if (waiting := self._waiting.pop(request.rid, None)) is not None:
            self._tried = -1
            self._refuse(waiting, "no room within the time given")

    def scheduled(self, batch: Any) -> None:
        """`batch` is next, or None. Serves those that wait, first come first served, if anything became free."""
        self._batch = batch
        while self._waiting:
            free = self._room()
            if free == self._tried:
                return
            rid, request = next(iter(self._waiting.items()))
            if not self._try(request):
                self._tried = free
                return
            del self._waiting[rid]
            # The next one may need less.
            self._tried = -1

    def _room(self) -> int:
        return int(self._allocator.available_size()) + int(self._tree.evictable_size())

    def _try(self, request: m.MeshReserve) -> bool:
        ids = array("q")
        ids.frombytes(request.ids)
        prefix, node = self._tree.match(ids, request.end)
        matched = len(prefix)
        need = request.end - matched
        # Locked before anything is evicted.
        if not self.lock(node):
            return False
        slots = torch.empty(0, dtype=torch.int64)
        if need:
            taken = self._take(need)
            if taken is None:
                self._tree.unlock(node)
                return False
            slots = taken
        self._last += 1
        self._tickets[self._last] = Reservation(ids[: request.end], request.end, matched, matched, node, slots)
        self._tree.held += need
        self._tell(
            m.MeshReserved(
                rid=request.rid, ticket=self._last, matched=matched, slots=slots.numpy().astype(np.int64).tobytes()
            )
        )
        return True

    def lock(self, node: TreeNode) -> bool:
        """Locks `node`, unless that keeps from eviction what those that run will need."""
        before = self._room()
        self._tree.lock(node)
        if before > self._room() < self._headroom():
            self._tree.unlock(node)
            return False
        return True

    def _take(self, need: int) -> torch.Tensor | None:
        if self._room() < need + self._headroom():
            return None
        evict_from_tree_cache(self._tree, need)
        taken = self._allocator.alloc(need)
        return None if taken is None else taken.to("cpu", torch.int64).clone()

    def _headroom(self) -> int:
        """What running requests will probably still need: without it one of them runs out of memory.

        And what a prompt still needs that is prefilled in chunks: without that SGLang itself ends.
        """
        s, page = self._scheduler, self._tree.page_size
        reqs = {r.rid: r for batch in (s.running_batch, self._batch) if batch is not None for r in batch.reqs}
        tokens = 0
        for req in reqs.values():
            left = min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), DECODE_TOKENS)
            tokens += 0 if req.finished() else int(left * s.new_token_ratio_tracker.current) + page
        if (chunked := s.chunked_req) is not None:
            tokens += len(chunked.origin_input_ids) + len(chunked.output_ids) - chunked.extend_range.end + page
        return tokens

    def publish(self, request: m.MeshPublish) -> None:
        """Moves the slots of [filled:upto) into the tree, where from now on everybody finds them."""
        held = self._tickets.get(request.ticket)
        if held is None or not held.filled <= request.upto <= held.end:
            self._tell(m.MeshDone(rid=request.rid, error=f"reservation {request.ticket} is not there"))
            return
        count = request.upto - held.filled
        if count:
            prefix, _ = self._tree.match(held.ids, held.filled)
            arrived, held.slots = held.slots[:count], held.slots[count:]
            values = torch.cat([prefix, arrived.to(prefix.device)])
            key = RadixKey(held.ids[: request.upto], None)
            known = self._tree.insert(InsertParams(key=key, value=values)).prefix_len
            # Somebody else inserted these meanwhile: ours are not needed.
            twice = values[held.filled : max(held.filled, known)]
            if len(twice):
                self._allocator.free(twice)
            self._tree.held -= count
            _, node = self._tree.match(held.ids, request.upto)
            self._tree.lock(node)
            self._tree.unlock(held.node)
            held.node, held.filled = node, request.upto
            self.unblock()
        self._tell(m.MeshDone(rid=request.rid))

    def take(self, ticket: int) -> TreeNode | None:
        """Ends a reservation: the locked node of what is filled, for the caller to unlock; None if it is not there."""
        held = self._tickets.pop(ticket, None)
        if held is None:
            return None
        if len(held.slots):
            self._allocator.free(held.slots.to(self._tree.device))
            self._tree.held -= len(held.slots)
        self.unblock()
        return held.node

    def free(self, request: m.MeshFree) -> None:
        """Gives everything back; what is filled stays in the tree, as cache."""
        if (node := self.take(request.ticket)) is not None:
            self._tree.unlock(node)
        self._tell(m.MeshDone(rid=request.rid))

    def unblock(self) -> None:
        """Memory came free, or less is needed, behind SGLang's back: its flag that all is in use must not stay set."""
        self._tried = -1
        self._scheduler.running_batch.batch_is_full = False

    def _refuse(self, request: m.MeshReserve, why: str) -> None:
        need = request.end
        room = self._room()
        self._tell(m.MeshReserved(rid=request.rid, error=f"{why}: up to {need} slots needed, {room} free or cached"))
