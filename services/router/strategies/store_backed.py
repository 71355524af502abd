"""Restores prefixes from the KV store, and saves finished ones there."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from kvmesh.stores import Held
from kvmesh.strategy import ENGINE_FAILURES, Chunks, Mesh, Placement, Range, Request, WriteBack, strategy

Tokens = Annotated[int, Range(1)]
Seconds = Annotated[float, Range(0.01, 600)]
Share = Annotated[float, Range(0, 1)]


@strategy
async def store_backed(
    request: Request,
    mesh: Mesh,
    *,
    write_back: WriteBack = "always",
    min_restore: Tokens = 64,
    patience: Seconds = 10.0,
    per_tenant: bool = False,
    policy: Placement = "least_load",
    memory: Share = 0.1,
    disk: Share = 0.3,
) -> Chunks:
    """On one engine; the KV store gives the prefix that it lacks, and keeps what was computed."""
    tokens = request.token_ids
    store = mesh.store_for(tokens)
    salt = request.tenant if per_tenant else ""
    held = Held()
    if store is not None and policy == "kv_aware":
        with suppress(*ENGINE_FAILURES):  # then an engine's own cache counts in full
            held = await store.held(tokens, salt=salt)
    if held.tokens:
        # What the store can give, an engine that has it already is spared little by.
        engine = mesh.engines.nearest(tokens, worth=lambda cached: held.worth(cached, memory, disk))[0]
    else:
        engine = mesh.pick(request, policy)
    ticket = None
    if store is not None:
        with suppress(*ENGINE_FAILURES):  # what was not restored, the engine prefills itself
            ticket = await engine.prep_recv(tokens, end=-1, wait=patience)
            if ticket.missing >= min_restore:
                await store.remote_send(tokens, ticket, timeout=patience, salt=salt)
    answer: list[int] = []
    async for chunk in engine.start_generate(tokens, ticket):
        answer += chunk.token_ids
        if chunk.finished is not None and store is not None:
            # The last token has been chosen, but has no KV yet.
            store.save(engine, [*tokens, *answer[:-1]], when=write_back, salt=salt)
        yield chunk
