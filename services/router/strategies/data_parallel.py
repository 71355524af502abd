"""Data parallel: every request whole on one engine."""

from __future__ import annotations

from kvmesh.strategy import Chunks, Mesh, Placement, Request, strategy


@strategy
async def data_parallel(request: Request, mesh: Mesh, *, policy: Placement = "least_load") -> Chunks:
    """Each request whole on one engine, by default the one with the least load."""
    engine = mesh.pick(request, policy)
    async for chunk in engine.start_generate(request.token_ids):
        yield chunk
