"""Adaptive: for each request the cheapest of all ways to serve it, by how fast each engine was measured to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated
from zlib import crc32

from kvmesh.sampling import DEFAULT_MAX_NEW_TOKENS
from kvmesh.strategy import ENGINE_FAILURES, Chunks, Engine, Mesh, Range, Request, strategy

# Parts of what is missing that may be prefilled elsewhere.
SPLITS = (0.25, 0.5, 0.75, 1.0)
# Engines looked at for each role: the cost of choosing is bounded.
CANDIDATES = 6


@dataclass(frozen=True, slots=True)
class Plan:
    """One way: `decoder` generates; if there is a `prefiller`, it sends the KV up to `end`."""

    decoder: Engine
    prefiller: Engine | None
    end: int
    # Until the request is over, and what others lose beyond their target, together.
    seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """What things take, by the engines' measured paces. `target`: seconds between tokens that others are to keep."""

    token_ids: Sequence[int]
    new_tokens: int
    target: float

    def plans(self, decoders: Sequence[Engine], prefillers: Sequence[Engine]) -> Iterator[Plan]:
        """Every way worth a thought; first the simplest."""
        n = len(self.token_ids)
        cached = {e.name: min(e.cached(self.token_ids), n - 1) for e in {*decoders, *prefillers}}
        for d in decoders:
            own = self._decode(d)
            held = cached[d.name]
            yield Plan(d, None, held, own + self._prefill(d, n - held))
            for p in prefillers:
                if p is d:
                    continue
                for share in SPLITS:
                    end = held + round((n - 1 - held) * share)
                    if end > held:
                        sent = p.pace.send.at(end - held)
                        computed = self._prefill(p, max(0, end - cached[p.name]))
                        # Sending overlaps with computing but for its last part.
                        arrival = max(computed, sent) + p.pace.send.fixed
                        yield Plan(d, p, end, own + arrival + self._prefill(d, n - end))

    def _prefill(self, engine: Engine, tokens: int) -> float:
        """Waiting, prefilling, and what those who decode there lose by it."""
        if not tokens:
            return 0.0
        load, line = engine.load, engine.pace.prefill
        took = line.at(tokens)
        queue = line.each * (load.waiting_tokens + load.credit_tokens)
        # A stall that keeps the others inside their target is free.
        stalls = took + engine.pace.step.at(load.running) > self.target
        return queue + took + (load.running * took if stalls else 0.0)

    def _decode(self, engine: Engine) -> float:
        """Decoding, and what the others there lose by one more."""
        running = engine.load.running + engine.load.waiting + engine.load.credit_requests
        step = engine.pace.step.at(running + 1) / (1 - engine.pace.busy)
        return self.new_tokens * (step + running * max(0.0, step - self.target))


def best_plan(request: Request, mesh: Mesh, target: float, explore: float) -> Plan:
    """The cheapest; for a share of the requests an engine drawn by request id, so that no measurement is for ever."""
    drawn = crc32(request.request_id.encode())
    if drawn % 10_000 < explore * 10_000:
        return Plan(mesh.engines[drawn // 10_000 % len(mesh.engines)], None, 0, 0.0)
    asked = request.sampling.max_new_tokens if request.sampling.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS
    near, calm = mesh.engines.nearest(request.token_ids, CANDIDATES), mesh.engines.calmest(CANDIDATES)
    plans = Model(request.token_ids, asked, target).plans(near, calm)
    return min(plans, key=lambda plan: plan.seconds)


@strategy
async def adaptive(
    request: Request,
    mesh: Mesh,
    *,
    target_ms: Annotated[float, Range(1, 10_000)] = 50.0,
    explore: Annotated[float, Range(0, 0.5)] = 0.02,
) -> Chunks:
    """What ends the request first, split or whole, by measured speeds; others keep `target_ms` between tokens."""
    plan = best_plan(request, mesh, target_ms / 1000, explore)
    ticket = None
    if plan.prefiller is not None:
        ticket = await plan.decoder.prep_recv(request.token_ids, end=plan.end)
        with suppress(*ENGINE_FAILURES):  # what was not sent, the decoder prefills itself
            await plan.prefiller.remote_send(request.token_ids, ticket)
    async for chunk in plan.decoder.start_generate(request.token_ids, ticket):
        yield chunk
