"""Speculative prefill: twice the work, for the shorter of two waits."""

import asyncio

from kvmesh.strategy import Chunks, Mesh, Request, strategy


@strategy
async def first_of_two(request: Request, mesh: Mesh) -> Chunks:
    """Starts on the two engines with the least work, and goes on with the first that has a token."""
    engines = sorted(mesh.engines, key=lambda e: e.load.work)[:2]
    runs = [engine.start_generate(request.token_ids) for engine in engines]
    firsts = {asyncio.create_task(run.__anext__()): run for run in runs}
    try:
        waiting, winner = set(firsts), None
        while winner is None:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task for task in done if task.exception() is None), None)
            if winner is None and not waiting:
                done.pop().result()  # both failed: raises
        for task in waiting:
            task.cancel()
        for run in runs:
            if run is not firsts[winner]:
                run.cancel()
        yield winner.result()
        async for chunk in firsts[winner]:
            yield chunk
    finally:
        for task in firsts:
            task.cancel()
        await asyncio.gather(*firsts, return_exceptions=True)
