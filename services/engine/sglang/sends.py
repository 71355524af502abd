"""Send jobs, inside the scheduler: prefill what is missing, and hand each chunk to the copier once it is computed."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.mem_cache.radix_cache import TreeNode
from sglang.srt.sampling.sampling_params import SamplingParams

from kvmesh.dataplane.slots import Slots
from services.engine.sglang import messages as m
from services.engine.sglang.cache import MeshRadixCache
from services.engine.sglang.copier import Copier, Stream


@dataclass(slots=True)
class Job:
    """One MeshSend. Tokens [begin:sent) have been handed to the copier."""

    request: m.MeshSend
    ids: array[int]
    target: Slots
    stream: Stream
    sent: int
    # Tokens whose forward pass is done; those of passes under way follow in `ahead`.
    ready: int = 0
    ahead: deque[int] = field(default_factory=deque)
    cached: int = 0
    began: int = 0
    prefilled: int = 0
    # Locked from the end of the prefill to that of the copying.
    node: TreeNode | None = None
    # The prefill request is over, for better or worse.
    over: bool = False
    error: str = ""
    aborted: bool = False


class Sends:
    """All send jobs of this scheduler. `lock` locks a node, or does not when there is no memory to spare."""

    def __init__(
        self, scheduler: Any, copier: Copier, lock: Callable[[TreeNode], bool], tell: Callable[[Any], None]
    ) -> None:
        self._scheduler = scheduler
        self._tree: MeshRadixCache = scheduler.tree_cache
        self._copier = copier
        self._lock = lock
        self._tell = tell
        self._jobs: dict[str, Job] = {}
        # Whether a job's request may have been dropped.
        self._doubt = False

    @property
    def count(self) -> int:
        """Jobs under way."""
        return len(self._jobs)

    def start(self, request: m.MeshSend) -> None:
        """Begins a job: at once with the copying when all is cached, else with a prefill through SGLang's queue.

        Through the queue also where memory is short: there it waits its turn.
        """
        ids = array("q")
        ids.frombytes(request.ids)
        target = np.frombuffer(request.slots, np.int64)
        stream = Stream(request.transport, request.peer, request.checksum)
        job = Job(request, ids, target, stream, request.begin)
        self._jobs[request.rid] = job
        if request.begin < request.end:
            self._copier.open(stream)
        slots, node = self._tree.match(ids, request.end)
        if len(slots) == request.end and self._lock(node):
            job.node = node
            job.began = job.prefilled = time.monotonic_ns()
            job.cached = request.end
            self._end(job, slots, node)
            return
        self._scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=request.rid,
                input_text="",
                input_ids=ids[: request.end],
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                # Nothing is sampled: SGLang ends such a request after its prefill.
                sampling_params=SamplingParams(max_new_tokens=0, temperature=0.0),
                return_logprob=False,
                logprob_start_len=-1,
                top_logprobs_num=0,
                token_ids_logprob=None,
                stream=False,
            )
        )

    def cancel(self, request: m.MeshCancelSend) -> None:
        """Stops a job; it is answered when nothing is being written any more."""
        job = self._jobs.get(request.rid)
        if job is None:
            return
        self._fail(job, "cancelled")
        if not job.over:
            self._scheduler.abort_request(AbortReq(rid=request.rid))
            self._doubt = True
        self._settle(job)

    def running(self, batch: Any) -> None:
        """A batch goes to the model."""
        for i, req in enumerate(batch.reqs):
            job = self._jobs.get(req.rid)
            if job is not None and batch.forward_mode.is_extend():
                before = batch.prefix_lens[i]
                if not job.began:
                    job.began, job.cached = time.monotonic_ns(), before
                job.ahead.append(before + batch.extend_lens[i])

    def processed(self, batch: Any) -> None:
        """The model is done with a batch; of requests that ended with it, the KV is in the tree."""
        for req in batch.reqs:
            job = self._jobs.get(req.rid)
            if job is None or job.over:
                continue
            if job.ahead:
                job.ready = job.ahead.popleft()
            if not req.finished():
                continue
            job.prefilled = time.monotonic_ns()
            if type(req.finished_reason).__name__ != "FINISH_LENGTH":
                self._fail(job, str(req.finished_reason.to_json().get("message", "aborted")))
            slots, node = self._tree.match(job.ids, job.request.end)
            if not job.error and len(slots) != job.request.end:
                self._fail(job, f"only {len(slots)} of {job.request.end} tokens stayed in the cache")
            self._end(job, slots, node)

    def scheduled(self, plan: Any) -> None:
        """Between batches: hands over what is computed and in the tree, where the running request has it locked.

        Before that, SGLang may still replace a request's slots by equal ones of somebody else.
        """
        batch = plan.batch_to_run
        if batch is not None and batch.forward_mode.is_extend():
            for req in batch.reqs:
                job = self._jobs.get(req.rid)
                if job is not None and not job.error:
                    self._progress(job, req)
        self._drop_lost(plan)

    def _progress(self, job: Job, req: Any) -> None:
        protected = int(req.cache_protected_len)
        if not job.began:
            # Found in the cache, before any pass of its own.
            job.ready = protected
        upto = min(job.ready, protected, job.request.end)
        if upto > job.sent:
            row = self._scheduler.req_to_token_pool.req_to_token[req.req_pool_idx, job.sent : upto]
            self._hand_over(job, row, upto)

    def copied(self) -> None:
        """Answers the jobs whose last copy has ended."""
        for stream in self._copier.finished():
            for job in [j for j in self._jobs.values() if j.stream is stream]:
                self._settle(job)

    def aborted(self) -> None:
        """SGLang has aborted something: it may drop requests of ours without a result, now or a little later."""
        self._doubt = True

    def _drop_lost(self, plan: Any) -> None:
        if not self._doubt:
            return
        s = self._scheduler
        batches = [b for b in (plan.running_batch, plan.batch_to_run, s.last_batch) if b is not None]
        known = [*s.waiting_queue, *(r for b in batches for r in b.reqs), *([s.chunked_req] if s.chunked_req else [])]
        alive = {r.rid for r in known if not r.finished()}
        for job in [job for rid, job in self._jobs.items() if not job.over and rid not in alive]:
            self._fail(job, "aborted")
            job.over = True
            self._settle(job)
        self._doubt = any(job.error and not job.over for job in self._jobs.values())

    def _fail(self, job: Job, error: str) -> None:
        job.error = job.error or error
        job.aborted = True
        self._copier.cancel(job.stream)

    def _end(self, job: Job, slots: torch.Tensor, node: TreeNode) -> None:
        """The prefill is over: the rest goes to the copier."""
        job.over = True
        if not job.error:
            job.node = job.node or self._tree.lock(node)
            if job.request.end > job.sent:
                self._hand_over(job, slots[job.sent : job.request.end], job.request.end)
        self._settle(job)

    def _hand_over(self, job: Job, slots: torch.Tensor, upto: int) -> None:
        first = job.request.begin
        source = slots.to("cpu", torch.int64).numpy().copy()
        self._copier.submit(job.stream, source, job.target[job.sent - first : upto - first])
        job.sent = upto

    def _settle(self, job: Job) -> None:
        """Answers, once the prefill is over and nothing is being written."""
        if not job.over or not job.stream.idle or self._jobs.pop(job.request.rid, None) is None:
            return
        if job.node is not None:
            self._tree.unlock(job.node)
        self._copier.close(job.stream)
        error = job.error or job.stream.error
        self._tell(
            m.MeshSent(
                rid=job.request.rid,
                cached=job.cached,
                computed=max(0, job.ready - job.cached),
                began=job.began,
                prefilled=job.prefilled,
                pieces=job.stream.pieces,
                sums=job.stream.sums,
                error=error,
                aborted=job.aborted,
                unconnected=job.stream.unconnected,
            )
        )
