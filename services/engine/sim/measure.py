"""Measures a running engine, and fits a profile to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt

from kvmesh.errors import FailedPrecondition, Internal, from_rpc
from kvmesh.grpcx import channel
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, kv_pb2, kv_pb2_grpc
from kvmesh.v1.common_pb2 import GenerateUsage, SamplingParams
from services.engine.sim.profile import Batching, Decode, ModelShape, Prefill, Profile, Transfer

CALL_S = 120.0
# Tokens of each generation that measures decode steps; the first is the prefill's.
STEPS = 33


@dataclass(frozen=True)
class Plan:
    """What to measure: prompts of these `lengths`, `batches` of requests at once, each `repeats` times."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int = 3
    chunk_tokens: int = 512
    max_running: int = 256


@dataclass
class Measured:
    """Prefills: (tokens, seconds); steps: (requests, tokens of their contexts, seconds); sends: (bytes, seconds)."""

    prefill: list[tuple[int, float]] = field(default_factory=list)
    decode: list[tuple[int, float, float]] = field(default_factory=list)
    sends: list[tuple[int, float]] = field(default_factory=list)


class Probe:
    """One running engine; prompts that no cache has seen."""

    def __init__(self, address: str, seed: int) -> None:
        self._channel = channel(address)
        self._kv: Any = kv_pb2_grpc.KvEndpointStub(self._channel)
        self._engine: Any = engine_pb2_grpc.EngineStub(self._channel)
        self._rng = random.Random(seed)
        self._address = address
        self.info = engine_pb2.EngineInfo()

    async def open(self) -> None:
        """Reads what the engine says of itself. Raises MeshError."""
        call = self._engine.WatchStatus(engine_pb2.WatchStatusRequest(), timeout=10)
        try:
            message = await call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error
        finally:
            call.cancel()
        self.info = message.info

    async def close(self) -> None:
        """Hangs up."""
        await self._channel.close(None)

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens, never the same."""
        return [self._rng.randrange(self.info.model.vocab_size) for _ in range(tokens)]

    async def generate(self, prompt: Sequence[int], tokens: int) -> GenerateUsage:
        """Generates greedily, past every end. Raises MeshError."""
        sampling = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
        request = engine_pb2.StartGenerateRequest(token_ids=prompt, sampling=sampling)
        try:
            async for message in self._engine.StartGenerate(request, timeout=CALL_S):
                if message.HasField("finished"):
                    return GenerateUsage.FromString(message.finished.usage.SerializeToString())
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error
        raise Internal(f"{self._address} ended a generation without a last word")

    async def send(self, prompt: Sequence[int], receiver: Probe) -> kv_pb2.RemoteSendResponse:
        """Sends the KV of the whole prompt. Raises MeshError."""
        try:
            ready = kv_pb2.PrepRecvRequest(token_ids=prompt, end=len(prompt), wait_ms=5000)
            ticket = (await receiver._kv.PrepRecv(ready, timeout=CALL_S)).ticket
            request = kv_pb2.RemoteSendRequest(token_ids=prompt, begin=ticket.matched, end=len(prompt), ticket=ticket)
            try:
                return await self._kv.RemoteSend(request, timeout=CALL_S)  # type: ignore[no-any-return]
            finally:
                await receiver._kv.Release(kv_pb2.ReleaseRequest(ticket=ticket), timeout=10)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error


async def measure(probe: Probe, receiver: Probe | None, plan: Plan, say: Callable[[str], None]) -> Measured:
    """Runs the plan on an engine that nobody else uses; `receiver` is another engine, for the rate of transfers."""
    result = Measured()
    await probe.generate(probe.prompt(min(plan.lengths)), 4)
    for length in plan.lengths:
        times = [(await probe.generate(probe.prompt(length), 1)).prefill_seconds for _ in range(plan.repeats)]
        result.prefill.append((length, median(times)))
        say(f"prefill of {length} tokens: {1000 * median(times):.1f} ms")
    for batch in plan.batches:
        for length in (plan.lengths[0], plan.lengths[len(plan.lengths) // 2]):
            prompts = [probe.prompt(length) for _ in range(batch)]
            # Cached first, so that no step is held up by a prefill.
            for prompt in prompts:
                await probe.generate(prompt, 1)
            usages = await asyncio.gather(*(probe.generate(p, STEPS) for p in prompts))
            step = median(u.decode_seconds for u in usages) / (STEPS - 1)
            result.decode.append((batch, batch * (length + STEPS / 2), step))
            say(f"step of {batch} requests after {length} tokens each: {1000 * step:.2f} ms")
    if receiver is not None:
        for length in plan.lengths:
            for _ in range(plan.repeats):
                prompt = probe.prompt(length)
                await probe.generate(prompt, 1)
                reply = await probe.send(prompt, receiver)
                result.sends.append((reply.sent_bytes, reply.send_seconds))
        say(f"{len(result.sends)} transfers of up to {max(b for b, _ in result.sends) / 1e6:.1f} MB")
    return result


def fit(name: str, info: engine_pb2.EngineInfo, measured: Measured, plan: Plan) -> Profile:
    """The profile that comes closest, no part of it negative. Raises FailedPrecondition when it fits nothing."""
    lengths = np.array([n for n, _ in measured.prefill], float)
    passes = np.ceil(lengths / plan.chunk_tokens)
    sizes = np.stack([passes, lengths, lengths**2], 1)
    base, each, square = nonnegative(sizes, [t for _, t in measured.prefill])
    requests = np.array([(1, b, kv) for b, kv, _ in measured.decode], float)
    step, one, kv = nonnegative(requests, [t for _, _, t in measured.decode])
    if base + each <= 0 or step + one <= 0:
        raise FailedPrecondition("what was measured took no time")
    rate, latency = 1e9, 0.0
    if measured.sends:
        moved = np.array([(1, size) for size, _ in measured.sends], float)
        latency, per_byte = nonnegative(moved, [t for _, t in measured.sends])
        rate = 1 / per_byte if per_byte else rate
    layout = info.layout
    return Profile(
        name=name,
        device=f"simulated {info.device}",
        note=f"Fitted to {info.runtime} serving {info.model.name}.",
        model=ModelShape(
            name=info.model.name,
            vocab_size=info.model.vocab_size,
            context_length=info.model.context_length,
            layers=layout.layers,
            heads=layout.heads,
            head_dim=layout.k_dim,
            dtype=layout.dtype,
            ranks=layout.ranks,
            eos_token_ids=tuple(info.model.eos_token_ids),
        ),
        prefill=Prefill(base, each, square),
        decode=Decode(step, one, kv),
        batching=Batching(info.total_slots, plan.chunk_tokens, plan.max_running),
        transfer=Transfer(rate, latency),
        fitted={
            "prefill_error": _error([t for _, t in measured.prefill], sizes @ [base, each, square]),
            "decode_error": _error([t for _, _, t in measured.decode], requests @ [step, one, kv]),
        },
    )


def _error(values: Sequence[float], fitted: npt.NDArray[np.float64]) -> float:
    """Median relative error."""
    return round(float(median(abs(fitted - values) / np.maximum(values, 1e-9))), 4)


def nonnegative(terms: npt.NDArray[np.float64], values: Sequence[float]) -> list[float]:
    """Least squares of relative errors, no coefficient below 0: the most negative one is left out, again and again."""
    target = np.array(values, float)
    weight = 1 / np.maximum(target, 1e-9)
    used = list(range(terms.shape[1]))
    while used:
        found, *_ = np.linalg.lstsq(terms[:, used] * weight[:, None], target * weight, rcond=None)
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    result = [0.0] * terms.shape[1]
    for i, value in zip(used, found if used else [], strict=True):
        result[i] = float(value)
    return result
