"""Balanced prefill-decode disaggregation: the decode engine prefills the end of the prompt itself."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from kvmesh.strategy import ENGINE_FAILURES, Chunks, Mesh, Range, Request, strategy

Engines = Annotated[int, Range(1, 1024)]
Share = Annotated[float, Range(0, 1)]


@strategy
async def balanced_prefill_decode(request: Request, mesh: Mesh, *, prefill: Engines = 1, ratio: Share = 0.2) -> Chunks:
    """As prefill_decode, but the decode engine prefills the last `ratio` of the prompt itself."""
    n = len(request.token_ids)
    p = mesh.least_loaded(mesh.prefill(prefill))
    d = mesh.least_loaded(mesh.decode(prefill))
    ticket = await d.prep_recv(request.token_ids, end=min(n - 1, round(n * (1 - ratio))))
    if p is not d:
        with suppress(*ENGINE_FAILURES):  # what was not sent, d prefills itself
            await p.remote_send(request.token_ids, ticket)
    async for chunk in d.start_generate(request.token_ids, ticket):
        yield chunk
