"""Prefill-decode disaggregation, cache-aware: only what the decode engine lacks is sent."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from kvmesh.strategy import ENGINE_FAILURES, Chunks, Mesh, Placement, Range, Request, strategy

Engines = Annotated[int, Range(1, 1024)]
Tokens = Annotated[int, Range(1)]


@strategy
async def prefill_decode(
    request: Request, mesh: Mesh, *, prefill: Engines = 1, min_remote: Tokens = 16, policy: Placement = "least_load"
) -> Chunks:
    """Prefill on one of `prefill` engines, decode on another; no transfer when under min_remote tokens are missing."""
    p = mesh.pick(request, policy, mesh.prefill(prefill))
    d = mesh.pick(request, policy, mesh.decode(prefill))
    ticket = await d.prep_recv(request.token_ids, end=-1)
    if p is not d and ticket.missing >= min_remote:
        with suppress(*ENGINE_FAILURES):  # what was not sent, d prefills itself
            await p.remote_send(request.token_ids, ticket)
    async for chunk in d.start_generate(request.token_ids, ticket):
        yield chunk
