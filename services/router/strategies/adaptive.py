"""Adaptive: for each request the cheapest of all ways to serve it, for it and for the others, by measured speeds."""

from __future__ import annotations

from contextlib import suppress

from kvmesh.sampling import DEFAULT_MAX_NEW_TOKENS
from kvmesh.strategy import ENGINE_FAILURES, Chunks, Mesh, Request, strategy
from services.router.strategies.outlook import Outlook, Plan, foresee, plans

# Engines looked at for each role: the cost of choosing is bounded.
CANDIDATES = 8


def best_plan(request: Request, mesh: Mesh) -> Plan:
    """The cheapest."""
    tokens, sampling = request.token_ids, request.sampling
    n, asked = len(tokens), sampling.max_new_tokens if sampling.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS
    calm = mesh.engines.calmest(CANDIDATES)
    near = mesh.engines.nearest(tokens, CANDIDATES)
    known = {e.name: Outlook(e, min(e.cached(tokens), n - 1)) for e in (*near, *calm)}
    engines = list(known.values())
    foresee(engines)
    return min(plans(engines, n, asked), key=lambda plan: plan.cost)


@strategy
async def adaptive(request: Request, mesh: Mesh) -> Chunks:
    """Whole or split, wherever it costs least: the time to its end, and what all others lose by it."""
    plan = best_plan(request, mesh)
    ticket = None
    if plan.prefiller is not None:
        plan.prefiller.expect(plan.end)  # or a burst would run to one engine before the first of it is sent
        ticket = await plan.decoder.prep_recv(request.token_ids, end=plan.end)
        with suppress(*ENGINE_FAILURES):  # what was not sent, the decoder prefills itself
            await plan.prefiller.remote_send(request.token_ids, ticket)
    async for chunk in plan.decoder.start_generate(request.token_ids, ticket):
        yield chunk
