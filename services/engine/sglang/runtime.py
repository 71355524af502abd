"""The SGLang runtime: sub-requests as messages to the scheduler, and its answers as results."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Arrival, Destination
from kvmesh.endpoint.pairs import Pair, Pairs
from kvmesh.errors import Aborted, DataLoss, FailedPrecondition, MeshError, NotFound, ResourceExhausted, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.sampling import MAX_SEED
from kvmesh.v1.common_pb2 import KvLayout, SamplingParams
from kvmesh.v1.kv_pb2 import KvPool
from services.engine.base import (
    Ending,
    HotContext,
    Model,
    Output,
    Outputs,
    Piece,
    Reservation,
    Runtime,
    RuntimeLoad,
    SendReport,
)
from services.engine.sglang.form import GENERATED
from services.engine.sglang.frontend import Frontend, SglangOptions

log = logging.getLogger(__name__)

# How long the scheduler may take to answer what needs no waiting: a forward pass may be in between.
ANSWER_S = 60.0
SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("json_schema", "regex", "ebnf"),
)


class SglangRuntime(Runtime):
    """One SGLang instance of one rank."""

    def __init__(self, options: SglangOptions, model_digest: str, run_dir: Path, name: str) -> None:
        self._frontend = Frontend(options, model_digest, run_dir, name)
        self._frontend.on_message = self._received
        self._numbers = itertools.count(1)
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._streams: dict[str, Outputs] = {}
        self._watched = False
        self._pairs: dict[str, Pairs] = {}
        self.load = RuntimeLoad()
        self.on_load = lambda: None
        self.on_cache = lambda stored, removed, snapshot: None

    async def start(self) -> None:
        """Loads the model and waits until the scheduler is ready."""
        import sglang
        import torch

        infos = await self._frontend.start()
        first = infos[0]
        if first["tp_size"] != 1:
            raise FailedPrecondition(f"tensor-parallel degree {first['tp_size']}: this engine works with one rank")
        self.layout = Layout.of(KvLayout.FromString(first["layout"]))
        self.pools = {name: [KvPool.FromString(i["pools"][name]) for i in infos] for name in first["pools"]}
        self._pairs = {name: Pairs(pools) for name, pools in self.pools.items() if pools[0].HasField("meeting")}
        self.writers = [ProcessRef(*info["process"]) for info in infos]
        self.total_slots = first["total_slots"]
        # SGLang keeps a few tokens of the context to itself.
        self.model = Model(first["vocab_size"], first["max_prompt"], tuple(first["eos_token_ids"]))
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.version = f"sglang {sglang.__version__}"
        self.load = RuntimeLoad(free=self.total_slots)

    async def stop(self) -> None:
        """Ends SGLang; calls under way raise Unavailable."""
        await self._frontend.stop()
        gone = Unavailable("the engine is stopping")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(gone)
        for rid in list(self._streams):
            self._end(rid, Ending("failed", message="the engine is stopping"))

    async def died(self) -> str:
        """Returns when the scheduler process has ended."""
        return await self._frontend.died()

    def _id(self) -> str:
        # Of one length: SGLang aborts every request whose id begins with the one given.
        return f"{next(self._numbers):016d}"

    async def _ask(self, message: Any, timeout: float = ANSWER_S) -> Any:
        rid = message.rid
        answer = self._answers[rid] = asyncio.get_running_loop().create_future()
        try:
            self._frontend.send(message)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise Unavailable(f"the scheduler did not answer within {timeout:g} s") from None
        finally:
            self._answers.pop(rid, None)

    def _received(self, message: Any) -> None:
        kind = type(message).__name__
        if kind == "BatchTokenIDOutput":
            self._tokens(message)
        elif kind == "MeshLoad":
            fields = ("running", "waiting", "waiting_reservations", "waiting_tokens", "sending", "free", "cached")
            values = {f: getattr(message, f) for f in (*fields, "in_use", "reserved")}
            self.load = RuntimeLoad(**values)
            self.on_load()
        elif kind == "MeshBegan":
            for rid in message.rids:
                if (stream := self._streams.get(rid)) is not None and not stream.began_ns:
                    stream.began_ns = message.at
        elif kind == "MeshCacheChange":
            self.on_cache(_hashes(message.stored), _hashes(message.removed), message.snapshot)
        elif kind == "AbortReq":
            text = (message.finished_reason or {}).get("message") or message.abort_message
            self._end(message.rid, Ending("failed", message=str(text or "the request was aborted")))
        elif (answer := self._answers.get(message.rid)) is not None and not answer.done():
            answer.set_result(message)
        elif kind == "MeshReserved" and not message.error:
            # Nobody waits for it any more.
            self._free_later(message.ticket)

    def _tokens(self, message: Any) -> None:
        for i, rid in enumerate(message.rids):
            stream = self._streams.get(rid)
            if stream is None:
                continue
            logprobs = message.output_token_logprobs_val[i] if message.output_token_logprobs_val else ()
            stream.cached_tokens = message.cached_tokens[i]
            ids = message.output_ids[i]
            if len(ids):
                stream.put(Output(token_ids=ids.tolist(), logprobs=list(logprobs or ())))
            if (reason := message.finished_reasons[i]) is not None:
                retractions = message.retraction_counts[i] if message.retraction_counts else 0
                self._end(rid, _ending(reason, retractions))

    async def reserve(self, token_ids: Sequence[int], end: int, wait: float) -> Reservation:
        """As the base says; a reservation that comes after nobody waits is freed."""
        from services.engine.sglang import messages as m

        rid = self._id()
        request = m.MeshReserve(rid=rid, ids=array("q", token_ids).tobytes(), end=end, wait=wait > 0)
        answer = self._answers[rid] = asyncio.get_running_loop().create_future()
        try:
            self._frontend.send(request)
            done, _ = await asyncio.wait([answer], timeout=wait if wait > 0 else ANSWER_S)
            if not done:
                self._frontend.send(m.MeshCancelReserve(rid=rid))
                done, _ = await asyncio.wait([answer], timeout=ANSWER_S)
            if not done:
                raise Unavailable(f"the scheduler did not answer within {ANSWER_S:g} s")
            reply = answer.result()
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None and not answer.result().error:
                self._free_later(answer.result().ticket)
            elif not answer.done():
                self._frontend.send(m.MeshCancelReserve(rid=rid))
            raise
        finally:
            self._answers.pop(rid, None)
        if reply.error:
            raise ResourceExhausted(reply.error)
        return Reservation(reply.ticket, reply.matched, np.frombuffer(reply.slots, np.int64))

    async def publish(self, reservation: int, upto: int) -> None:
        """As the base says."""
        from services.engine.sglang import messages as m

        reply = await self._ask(m.MeshPublish(rid=self._id(), ticket=reservation, upto=upto))
        if reply.error:
            raise NotFound(reply.error)

    async def free(self, reservation: int) -> None:
        """As the base says."""
        from services.engine.sglang import messages as m

        await self._ask(m.MeshFree(rid=self._id(), ticket=reservation))

    def _free_later(self, reservation: int) -> None:
        from services.engine.sglang import messages as m

        self._frontend.send(m.MeshFree(rid=self._id(), ticket=reservation))

    def generate(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        max_new: int,
        reservation: int | None,
        generated: int = 0,
    ) -> Outputs:
        """As the base says."""
        from services.engine.sglang import messages as m

        rid = self._id()
        request = _request(rid, token_ids, sampling, max_new, generated)
        if reservation is None:
            self._frontend.send(request)
        else:
            self._frontend.send(m.MeshGenerate(rid=rid, ticket=reservation, request=request))
        stream = self._streams[rid] = Outputs(lambda: self._abort(rid))
        return stream

    def _abort(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        if self._streams.pop(rid, None) is not None:
            try:
                self._frontend.send(AbortReq(rid=rid))
            except MeshError as error:
                log.debug("request %s is not aborted: %s", rid, error)

    def _end(self, rid: str, ending: Ending) -> None:
        if (stream := self._streams.pop(rid, None)) is not None:
            stream.put(Output(ending=ending))

    async def send(self, token_ids: Sequence[int], begin: int, end: int, to: Destination) -> SendReport:
        """As the base says."""
        from services.engine.sglang import messages as m

        rid = self._id()
        answer = self._answers[rid] = asyncio.get_running_loop().create_future()
        try:
            self._frontend.send(
                m.MeshSend(
                    rid=rid,
                    ids=array("q", token_ids).tobytes(),
                    begin=begin,
                    end=end,
                    transport=to.transport,
                    peer=to.pools[0].SerializeToString(deterministic=True),
                    slots=to.slots.astype(np.int64).tobytes(),
                    checksum=to.checksum,
                )
            )
            try:
                reply = await asyncio.shield(answer)
            except asyncio.CancelledError:
                if not answer.done():
                    self._frontend.send(m.MeshCancelSend(rid=rid))
                    # Not cancelled itself, so that who cancelled knows when nothing is written any more.
                    await asyncio.wait([answer])
                raise
        finally:
            self._answers.pop(rid, None)
        if reply.error:
            if reply.aborted:
                raise Aborted(f"the send was ended: {reply.error}")
            if reply.unconnected:
                raise CannotConnect(f"the receiver is not reached through {to.transport}: {reply.error}")
            raise Unavailable(f"the copy to the receiver failed: {reply.error}")
        quads = [iter(reply.pieces)] * 4
        pieces = [Piece(*quad) for quad in zip(*quads, strict=True)]
        if reply.sums:
            pieces = [replace(piece, sums=(value,)) for piece, value in zip(pieces, reply.sums, strict=True)]
        return SendReport(reply.cached, reply.computed, reply.began, reply.prefilled, pieces)

    def two_sided(self, transport: str) -> bool:
        """As the base says."""
        return transport in self._pairs

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        """As the base says."""
        from services.engine.sglang import messages as m

        pairs, rid = self._pairs[transport], self._id()
        pair = pairs.take(sender, fresh)
        pools = pairs.grant(pair)
        self._frontend.send(
            m.MeshAccept(
                rid=rid,
                transport=transport,
                meeting=pools[0].meeting.SerializeToString(),
                slots=slots.astype(np.int64).tobytes(),
                seconds=seconds,
            )
        )
        answer = self._answers[rid] = asyncio.get_running_loop().create_future()
        return Arrival(pools, asyncio.create_task(self._arriving(rid, answer, pairs, pair)))

    async def _arriving(self, rid: str, answer: asyncio.Future[Any], pairs: Pairs, pair: Pair) -> None:
        from services.engine.sglang import messages as m

        try:
            try:
                reply = await asyncio.shield(answer)
            except asyncio.CancelledError:
                if not answer.done():
                    self._frontend.send(m.MeshCancelAccept(rid=rid))
                    await asyncio.wait([answer])
                raise
        finally:
            self._answers.pop(rid, None)
        if reply.error:
            raise Unavailable(f"the KV did not arrive: {reply.error}")
        pairs.put(pair)

    async def verify(self, slots: Slots, sums: Sequence[tuple[int, Sequence[int]]]) -> None:
        """As the base says."""
        from services.engine.sglang import messages as m

        if any(len(ranks) != 1 for _, ranks in sums):
            raise DataLoss("checksums are not of one rank")
        tokens, values = [tokens for tokens, _ in sums], [ranks[0] for _, ranks in sums]
        request = m.MeshVerify(rid=self._id(), slots=slots.astype(np.int64).tobytes(), tokens=tokens, sums=values)
        if error := (await self._ask(request)).error:
            raise DataLoss(error)

    def forget(self, peers: Sequence[KvPool]) -> None:
        """As the base says."""
        from services.engine.sglang import messages as m

        for peer in peers:
            self._frontend.send(m.MeshForgetPeer(rid=self._id(), peer=peer.SerializeToString(deterministic=True)))

    async def flush(self) -> None:
        """As the base says."""
        from services.engine.sglang import messages as m

        reply = await self._ask(m.MeshFlush(rid=self._id()))
        if reply.error:
            raise FailedPrecondition(f"the cache is not emptied: {reply.error}")

    async def hottest(self, count: int) -> list[HotContext]:
        """As the base says."""
        from services.engine.sglang import messages as m

        reply = await self._ask(m.MeshHottest(rid=self._id(), count=count))
        return [
            HotContext(np.frombuffer(ids, np.int64).tolist(), idle)
            for ids, idle in zip(reply.ids, reply.idle, strict=True)
        ]

    def watch_cache(self) -> None:
        """As the base says."""
        from services.engine.sglang import messages as m

        if not self._watched:
            self._watched = True
            self._frontend.send(m.MeshWatchCache(rid=self._id()))


def _hashes(raw: bytes) -> Sequence[int]:
    values = array("Q")
    values.frombytes(raw)
    return values


def _ending(reason: dict[str, Any], retractions: int) -> Ending:
    kind = reason["type"]
    if kind == "abort":
        message = str(reason.get("message") or "the request was aborted")
        refused = reason.get("status_code") == HTTPStatus.BAD_REQUEST
        return Ending("failed", message=message, retractions=retractions, refused=refused)
    matched = reason.get("matched")
    token = matched if isinstance(matched, int) else None
    return Ending("stop" if kind == "stop" else "length", token, retractions=retractions)


def _request(rid: str, token_ids: Sequence[int], sampling: SamplingParams, max_new: int, generated: int = 0) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    return TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", token_ids),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=_sampling(sampling, max_new, generated),
        return_logprob=sampling.logprobs,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=True,
    )


def _sampling(given: SamplingParams, max_new: int, generated: int) -> Any:
    from sglang.srt.sampling import sampling_params as sglang

    given_fields = {field.name for field, _ in given.ListFields()}
    params = sglang.SamplingParams(
        max_new_tokens=max_new,
        # The end is part of the form.
        ignore_eos=given.ignore_eos and given.WhichOneof("form") is None,
        stop_token_ids=set(given.stop_token_ids) or None,
        sampling_seed=given.seed if given.HasField("seed") else random.randint(0, MAX_SEED),
        custom_params={GENERATED: generated} if generated else None,
        **{f: getattr(given, f) for f in SAME_NAMES if f in given_fields},
    )
    params.normalize(None)
    return params
