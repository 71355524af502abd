"""Context migration: a conversation stays where its context is, until the load shifts; then the context moves."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from kvmesh.strategy import ENGINE_FAILURES, Chunks, Engine, Mesh, Range, Request, strategy

Tokens = Annotated[int, Range(1)]


def holder_of(request: Request, mesh: Mesh, least: int) -> tuple[Engine, int]:
    """The engine that has most of the context cached, and how much; for what nobody has, the session's own engine."""
    home = mesh.pick(request, "session_sticky")
    best = mesh.engines.fullest(request.token_ids)
    held, most = home.cached(request.token_ids), best.cached(request.token_ids)
    return (best, most) if most >= held + least else (home, held)


@strategy
async def context_migration(request: Request, mesh: Mesh, *, slack: Tokens = 2048, least: Tokens = 64) -> Chunks:
    """Where the context is; moves `least` tokens of it or more when another engine has `slack` tokens less work."""
    holder, held = holder_of(request, mesh, least)
    lightest = mesh.least_loaded()
    engine = holder if holder.load.work <= lightest.load.work + slack else lightest
    ticket = None
    if engine is not holder and held >= least:
        ticket = await engine.prep_recv(request.token_ids, end=min(held, len(request.token_ids) - 1))
        if ticket.missing >= least:
            with suppress(*ENGINE_FAILURES):  # what was not sent, the engine prefills itself
                await holder.remote_send(request.token_ids, ticket)
    async for chunk in engine.start_generate(request.token_ids, ticket):
        yield chunk
