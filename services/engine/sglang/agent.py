"""kvmesh's part of SGLang's scheduler: takes the front's messages, and is called between batches."""

from __future__ import annotations

import os
import queue
import time
from array import array
from typing import Any

import numpy as np
import zmq
from sglang.srt.mem_cache.radix_cache import TreeNode
from sglang.utils import TypeBasedDispatcher

from kvmesh.dataplane.base import Reception, TwoSidedTransport
from kvmesh.process import ProcessRef
from kvmesh.v1.kv_pb2 import Meeting
from services.engine.sglang import messages as m
from services.engine.sglang.copier import Copier
from services.engine.sglang.load import LoadMeter
from services.engine.sglang.pool import layout_of
from services.engine.sglang.reservations import Reservations
from services.engine.sglang.sends import Sends
from services.engine.sglang.transports import make

# Running requests that are remembered as begun.
BEGUN = 10_000


class Agent:
    """One for each scheduler process; all of it runs on the scheduler's thread, but for copying and receiving."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tree = scheduler.tree_cache
        self._pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        pool, self._transports = make(self._pool)
        # The scheduler sleeps on its sockets when idle; our threads wake it through this.
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if scheduler.idle_sleeper is not None:
            scheduler.idle_sleeper.poller.register(self._alarm, zmq.POLLIN)
        self._copier = Copier(self._transports, pool, self._wake)
        # Writes that come in through two-sided transports; and (rid, what went wrong) that threads have to tell.
        self._receptions: dict[str, Reception] = {}
        self._news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._reservations = Reservations(scheduler, self._tell)
        self._sends = Sends(scheduler, self._copier, self._reservations.lock, self._tell)
        self._load = LoadMeter(scheduler, self._reservations, self._sends, self._tell)
        # Requests that used a ticket: what they matched stays locked until they hold a lock of their own.
        self._pins: dict[str, TreeNode] = {}
        self._begun: set[str] = set()
        # Blocks of the prefix cache that came (True) or went since the front was told.
        self._changes: dict[int, bool] = {}
        self._cleared = False
        scheduler._request_dispatcher += TypeBasedDispatcher(
            [
                (m.MeshReserve, self._reservations.reserve),
                (m.MeshCancelReserve, self._reservations.cancel),
                (m.MeshPublish, self._reservations.publish),
                (m.MeshFree, self._reservations.free),
                (m.MeshGenerate, self._generate),
                (m.MeshSend, self._sends.start),
                (m.MeshCancelSend, self._sends.cancel),
                (m.MeshAccept, self._accept),
                (m.MeshCancelAccept, self._cancel_accept),
                (m.MeshVerify, self._verify),
                (m.MeshForgetPeer, lambda request: self._copier.forget(request.peer)),
                (m.MeshFlush, self._flush),
                (m.MeshHottest, self._hottest),
                (m.MeshWatchCache, self._watch_cache),
            ]
        )

    def describe(self) -> dict[str, Any]:
        """For the front: our pool as peers can reach it, and what SGLang makes of the model."""
        s = self._scheduler
        me = ProcessRef.current()
        return {
            "pools": {name: t.describe().SerializeToString() for name, t in self._transports.items()},
            "layout": layout_of(self._pool).message().SerializeToString(),
            "process": (me.pid, me.start_ticks),
            "total_slots": int(s.max_total_num_tokens),
            "max_prompt": int(s.max_req_input_len),
            "vocab_size": int(s.model_config.vocab_size),
            "eos_token_ids": sorted(s.model_config.hf_eos_token_id or ()),
            "tp_size": int(s.ps.attn_tp_size),
        }

    @property
    def busy(self) -> bool:
        """The cache may not be emptied: somebody holds parts of it."""
        return bool(self._reservations.count or self._sends.count or self._pins)

    def scheduled(self, plan: Any) -> None:
        """The next batch has been put together."""
        if self._alarmed():
            self._sends.copied()
            self._tell_news()
        if self._sends.count:
            self._sends.scheduled(plan)
        if self._pins:
            self._sweep_pins(plan)
        self._reservations.scheduled(plan.batch_to_run)
        self._flush_changes()
        self._load.update(plan)

    def running(self, batch: Any) -> None:
        """A batch goes to the model."""
        if batch.forward_mode.is_extend():
            fresh = [r.rid for r in batch.reqs if r.rid not in self._begun]
            if fresh:
                if len(self._begun) > BEGUN:
                    # Those whose end was not seen; the front does not mind being told twice.
                    self._begun.clear()
                self._begun.update(fresh)
                self._tell(m.MeshBegan(rids=fresh, at=time.monotonic_ns()))
        if self._sends.count:
            self._sends.running(batch)

    def processed(self, batch: Any) -> None:
        """The model is done with a batch, and so is SGLang."""
        if self._sends.count:
            self._sends.processed(batch)
        for req in batch.reqs:
            if req.finished():
                self._begun.discard(req.rid)

    def aborted(self) -> None:
        """SGLang has aborted something."""
        if self._sends.count:
            self._sends.aborted()

    def _tell(self, output: Any) -> None:
        self._scheduler.ipc_channels.send_to_tokenizer.send_output(output)

    def _alarmed(self) -> bool:
        try:
            return bool(os.eventfd_read(self._alarm))
        except BlockingIOError:
            return False

    def _wake(self) -> None:
        os.eventfd_write(self._alarm, 1)

    def _accept(self, request: m.MeshAccept) -> None:
        slots = np.frombuffer(request.slots, np.int64)
        meeting, rid = Meeting.FromString(request.meeting), request.rid
        transport = self._transports[request.transport]
        assert isinstance(transport, TwoSidedTransport)
        try:
            self._receptions[rid] = transport.accept(
                meeting, slots, request.seconds, lambda error: self._report(rid, error)
            )
        except RuntimeError as error:
            # No thread is to be had: this write fails, and nothing else.
            self._tell(m.MeshDone(rid=rid, error=str(error)))

    def _cancel_accept(self, request: m.MeshCancelAccept) -> None:
        if (reception := self._receptions.pop(request.rid, None)) is not None:
            reception.cancel()
            self._tell(m.MeshDone(rid=request.rid, error="it was cancelled"))

    def _verify(self, request: m.MeshVerify) -> None:
        slots, rid = np.frombuffer(request.slots, np.int64), request.rid
        self._copier.verify(slots, request.tokens, request.sums, lambda error: self._report(rid, error))

    def _report(self, rid: str, error: str) -> None:
        """From any thread."""
        self._news.put((rid, error))
        self._wake()

    def _tell_news(self) -> None:
        while True:
            try:
                rid, error = self._news.get_nowait()
            except queue.Empty:
                return
            self._receptions.pop(rid, None)
            self._tell(m.MeshDone(rid=rid, error=error))

    def _generate(self, request: m.MeshGenerate) -> None:
        node = self._reservations.take(request.ticket)
        if node is not None:
            self._pins[request.rid] = node
        request.request.unwrap_pickle_fields()
        self._scheduler.handle_generate_request(request.request)

    def _sweep_pins(self, plan: Any) -> None:
        waiting = [r.rid for r in self._scheduler.waiting_queue]
        keep = set(waiting)
        if plan.batch_to_run is None and waiting and plan.running_batch.is_empty():
            # Nothing runs and nothing can: pinned prefixes of those behind must give way, else all would wait for ever.
            first = next((rid for rid in waiting if rid in self._pins), None)
            keep = {first} if first is not None and len(self._pins) > 1 else set()
        for rid in [rid for rid in self._pins if rid not in keep]:
            self._tree.unlock(self._pins.pop(rid))
            self._reservations.unblock()

    def _flush(self, request: m.MeshFlush) -> m.MeshDone:
        done = self._scheduler.flush_cache()
        return m.MeshDone(rid=request.rid, error="" if done else "requests run, or tickets are held")

    def _hottest(self, request: m.MeshHottest) -> m.MeshContexts:
        now = time.monotonic()
        found = self._tree.hottest(request.count)
        ids = [array("q", tokens).tobytes() for tokens, _ in found]
        return m.MeshContexts(rid=request.rid, ids=ids, idle=[now - used for _, used in found])

    def _watch_cache(self, _request: m.MeshWatchCache) -> None:
        self._tree.on_change = self._cache_changed
        self._cache_changed(self._tree.blocks(), [], True)

    def _cache_changed(self, stored: list[int], removed: list[int], cleared: bool) -> None:
        if cleared:
            self._changes = {}
            self._cleared = True
        # The last word on a block counts.
        self._changes.update(dict.fromkeys(stored, True))
        self._changes.update(dict.fromkeys(removed, False))

    def _flush_changes(self) -> None:
        if not self._changes and not self._cleared:
            return
        changes, self._changes = self._changes, {}
        cleared, self._cleared = self._cleared, False
        stored = array("Q", (block for block, there in changes.items() if there))
        removed = array("Q", (block for block, there in changes.items() if not there and not cleared))
        self._tell(m.MeshCacheChange(snapshot=cleared, stored=stored.tobytes(), removed=removed.tobytes()))
