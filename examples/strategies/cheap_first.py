"""A cascade: a cheap engine (quantised, say) answers when it is sure of itself.

The cheap ones are labelled tier=cheap; all serve the model under one name.
"""

from typing import Annotated

from kvmesh.strategy import Chunk, Chunks, Mesh, Range, Request, SamplingParams, strategy


@strategy
async def cheap_first(
    request: Request, mesh: Mesh, *, look: Annotated[int, Range(1, 64)] = 4, sure: Annotated[float, Range(-20, 0)] = -1
) -> Chunks:
    """Takes a cheap engine's answer if its first `look` tokens have a mean log-probability of `sure` or more."""
    cheap = mesh.labelled(tier="cheap")
    dear = [engine for engine in mesh.engines if engine not in cheap]
    asked = SamplingParams()
    asked.CopyFrom(request.sampling)
    asked.logprobs = True
    run = mesh.least_loaded(cheap or dear).start_generate(request.token_ids, sampling=asked)
    held, logprobs, decided = [], [], not (cheap and dear)
    async for chunk in run:
        logprobs += chunk.logprobs
        held.append(
            Chunk(chunk.token_ids, chunk.engine, chunk.logprobs if request.sampling.logprobs else (), chunk.finished)
        )
        decided = decided or len(logprobs) >= look or chunk.finished is not None
        if decided and dear and cheap and sum(logprobs[:look]) < sure * len(logprobs[:look]):
            run.cancel()
            break
        while decided and held:
            yield held.pop(0)
    if held:
        async for chunk in mesh.least_loaded(dear).start_generate(request.token_ids):
            yield chunk
