"""Two pools: long prompts do not stand in the way of short ones.

Engines are labelled: `kvmesh engine --labels pool=long`.
"""

from typing import Annotated

from kvmesh.strategy import Chunks, Mesh, Placement, Range, Request, strategy


@strategy
async def by_length(
    request: Request, mesh: Mesh, *, long: Annotated[int, Range(1)] = 1024, policy: Placement = "least_load"
) -> Chunks:
    """Prompts of `long` tokens or more go to engines labelled pool=long, others to the rest."""
    longs = mesh.labelled(pool="long")
    rest = [engine for engine in mesh.engines if engine not in longs]
    pool = longs if len(request.token_ids) >= long else rest
    engine = mesh.pick(request, policy, pool or mesh.engines)
    async for chunk in engine.start_generate(request.token_ids):
        yield chunk
