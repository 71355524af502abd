"""Measures a running engine, and fits a profile to it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt

from kvmesh.errors import FailedPrecondition, Internal, from_rpc
from kvmesh.grpcx import channel
from kvmesh.sim.profile import Batching, Decode, ModelShape, Prefill, Profile, Transfer
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, kv_pb2, kv_pb2_grpc
from kvmesh.v1.common_pb2 import GenerateUsage, SamplingParams

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
    """Times in seconds.

    `prefill`: of tokens (begin, end, seconds) of a prompt; `decode`: of a step of (requests, tokens of their contexts,
    seconds); `sends`: of the KV of cached prompts, (bytes, seconds); `calls`: of the shortest call there and back;
    `together`: how many times as long something takes while another engine computes.
    """

    prefill: list[tuple[int, int, float]] = field(default_factory=list)
    decode: list[tuple[int, float, float]] = field(default_factory=list)
    sends: list[tuple[int, float]] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """What was measured at another time."""
        for entry in fields(Measured):
            getattr(self, entry.name).extend(getattr(other, entry.name))


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

    async def send(self, prompt: Sequence[int], receiver: Probe) -> tuple[int, float, float]:
        """Sends the KV of the whole prompt: (bytes, seconds, seconds of a call without work). Raises MeshError."""
        try:
            ready = kv_pb2.PrepRecvRequest(token_ids=prompt, end=len(prompt), wait_ms=5000)
            ticket = (await receiver._kv.PrepRecv(ready, timeout=CALL_S)).ticket
            request = kv_pb2.RemoteSendRequest(token_ids=prompt, begin=ticket.matched, end=len(prompt), ticket=ticket)
            try:
                began = time.monotonic()
                reply = await self._kv.RemoteSend(request, timeout=CALL_S)
                took = time.monotonic() - began
            finally:
                began = time.monotonic()
                await receiver._kv.Release(kv_pb2.ReleaseRequest(ticket=ticket), timeout=10)
                call = time.monotonic() - began
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error
        return reply.sent_bytes, took, call


async def measure(probe: Probe, receiver: Probe | None, plan: Plan, say: Callable[[str], None]) -> Measured:
    """Runs the plan on an engine that nobody else uses.

    `receiver` is another such engine, for the rate of transfers and for what two take from each other.
    """
    result = Measured()
    await probe.generate(probe.prompt(min(plan.lengths)), 4)
    for length in plan.lengths:
        whole, one = [], []
        for _ in range(plan.repeats):
            prompt = probe.prompt(length)
            whole.append((await probe.generate(prompt, 1)).prefill_seconds)
            # With all of the prompt in the cache.
            one.append((await probe.generate([*prompt, *probe.prompt(1)], 1)).prefill_seconds)
        result.prefill += [(0, length, median(whole)), (length, length + 1, median(one))]
        say(f"prefill of {length} tokens: {1000 * median(whole):.1f} ms, of one more: {1000 * median(one):.1f} ms")
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
                size, took, call = await probe.send(prompt, receiver)
                # There, back, and to the receiver: what the services between them cost is counted as calls.
                result.sends.append((size, max(0.0, took - 1.5 * call)))
                result.calls.append(call)
        say(f"{len(result.sends)} transfers of up to {max(b for b, _ in result.sends) / 1e6:.1f} MB")
        for _ in range(plan.repeats):
            result.together += await _together(probe, receiver, plan)
        say(f"beside another engine that computes: {median(result.together):.2f} times as long")
    return result


async def _together(probe: Probe, other: Probe, plan: Plan) -> list[float]:
    """How many times as long a prefill and a decode step of `probe` take while `other` prefills, and decodes."""
    length, short = plan.lengths[len(plan.lengths) // 2], plan.lengths[0]

    async def prefill() -> float:
        return median([(await probe.generate(probe.prompt(length), 1)).prefill_seconds for _ in range(3)])

    async def decode() -> float:
        return (await probe.generate(probe.prompt(short), 2 * STEPS)).decode_seconds

    async def busy(tokens: int) -> None:
        while True:
            await other.generate(other.prompt(length if tokens == 1 else short), tokens)

    ratios = []
    for measured in (prefill, decode):
        alone = await measured()
        for tokens in (1, STEPS):
            load = asyncio.ensure_future(busy(tokens))
            try:
                ratios.append(await measured() / max(alone, 1e-9))
            finally:
                load.cancel()
                await asyncio.wait({load})
            # A failure of the other engine is one of the measurement.
            if not load.cancelled():
                load.result()
    return ratios


def fit(name: str, info: engine_pb2.EngineInfo, measured: Measured, plan: Plan) -> Profile:
    """The profile that comes closest, no part of it negative. Raises FailedPrecondition when it fits nothing."""
    sizes = np.array([_sizes(begin, end, plan.chunk_tokens) for begin, end, _ in measured.prefill], float)
    times = [t for *_, t in measured.prefill]
    base, each, square, end_square = nonnegative(sizes, times)
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
        prefill=Prefill(base, each, square, end_square),
        decode=Decode(step, one, kv),
        batching=Batching(info.total_slots, plan.chunk_tokens, plan.max_running),
        transfer=Transfer(rate, latency),
        contention=max(0.0, float(median(measured.together)) - 1) if measured.together else 0.0,
        fitted={
            "prefill_error": _error(times, sizes @ [base, each, square, end_square]),
            "decode_error": _error([t for _, _, t in measured.decode], requests @ [step, one, kv]),
        },
    )


def _sizes(begin: int, end: int, chunk: int) -> list[int]:
    """What stands beside each number of Prefill, of a prefill in passes of `chunk` tokens."""
    ends = [*range(begin + chunk, end, chunk), end]
    return [len(ends), end - begin, end**2 - begin**2, sum(e**2 for e in ends)]


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
