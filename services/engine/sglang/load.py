"""What the scheduler says of its load."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from services.engine.sglang import messages as m
from services.engine.sglang.reservations import Reservations
from services.engine.sglang.sends import Sends

# Between two reports while there is work; the last state before a rest is always told.
PERIOD_NS = 20_000_000


class LoadMeter:
    """Tells of the load at every change, but no more often than each PERIOD_NS."""

    def __init__(self, scheduler: Any, reservations: Reservations, sends: Sends, tell: Callable[[Any], None]) -> None:
        self._scheduler = scheduler
        self._reservations = reservations
        self._sends = sends
        self._tell = tell
        self._told: m.MeshLoad | None = None
        self._at = 0

    def update(self, plan: Any) -> None:
        """Between batches."""
        now = time.monotonic_ns()
        if plan.batch_to_run is not None and now - self._at < PERIOD_NS:
            return
        load = self._measure(plan)
        if load != self._told:
            self._told, self._at = load, now
            self._tell(load)

    def _measure(self, plan: Any) -> m.MeshLoad:
        s, batch = self._scheduler, plan.batch_to_run
        free = int(s.token_to_kv_pool_allocator.available_size())
        cached = int(s.tree_cache.evictable_size())
        held = int(s.tree_cache.held)
        # A prefill batch is not part of the running batch yet.
        reqs = [*plan.running_batch.reqs, *(batch.reqs if batch is not None else [])]
        waiting_tokens = sum(len(r.origin_input_ids) for r in s.waiting_queue)
        chunked = s.chunked_req
        if chunked is not None:
            waiting_tokens += max(0, len(chunked.origin_input_ids) - int(chunked.cache_protected_len))
        return m.MeshLoad(
            running=len({r.rid for r in reqs if not r.finished()} | ({chunked.rid} if chunked else set())),
            waiting=len(s.waiting_queue),
            waiting_reservations=self._reservations.waiting,
            waiting_tokens=waiting_tokens,
            sending=self._sends.count,
            free=free,
            cached=cached,
            in_use=max(0, int(s.max_total_num_tokens) - free - cached - held),
            reserved=held,
        )
