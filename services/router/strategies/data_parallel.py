"""Data parallel: every request whole on one engine."""

from __future__ import annotations

from kvmesh.strategy import Chunks, Mesh, Request, strategy


@strategy
async def data_parallel(request: Request, mesh: Mesh) -> Chunks:
    """Each request whole on the engine with the least load."""
    engine = mesh.least_loaded()
    async for chunk in engine.start_generate(request.token_ids):
        yield chunk
