"""A warm standby: when the engine dies, another has the prompt's KV already."""

import asyncio
from contextlib import suppress
from typing import Annotated

from kvmesh.strategy import ENGINE_FAILURES, Chunks, Engine, Mesh, Range, Request, strategy


async def warm(request: Request, source: Engine, standby: Engine) -> None:
    """Copies the prompt's KV; what has arrived stays in the standby's cache when the ticket is given back."""
    with suppress(*ENGINE_FAILURES):
        ticket = await standby.prep_recv(request.token_ids, end=-1, wait=1.0)
        try:
            await source.remote_send(request.token_ids, ticket)
        finally:
            await standby.release(ticket)


@strategy
async def warm_standby(request: Request, mesh: Mesh, *, least: Annotated[int, Range(1)] = 64) -> Chunks:
    """One engine answers; after its first token it sends prompts of `least` tokens or more to the next best engine."""
    engine, *others = sorted(mesh.engines, key=lambda e: e.load.work)
    copy = None
    try:
        async for chunk in engine.start_generate(request.token_ids):
            if copy is None and others and len(request.token_ids) >= least:
                copy = asyncio.create_task(warm(request, engine, others[0]))
            yield chunk
    finally:
        if copy is not None:
            copy.cancel()
            await asyncio.wait([copy])
