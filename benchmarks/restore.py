"""Time to the first token when a prompt's KV is computed, pulled from another engine, or restored from a KV store.

Starts a mesh of two SGLang engines with a tiny model of a long context, and a store; once for each transport; stops it.
The model is small, and so is its KV: a big model's prefill costs more per byte of KV than this one's.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import TRANSPORTS, Peer, peers_of
from kvmesh.local.options import MeshOptions
from kvmesh.local.tiny_model import Recipe, tiny_model

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
CONTEXT = 33_000
BLOCK = 64
# Longer prompts are left out once a prefill has taken so long, in seconds.
ENOUGH_S = 30.0
# SGLang's attention on processors computes that of all tokens before a chunk again: few chunks.
CHUNK_TOKENS = 8192


async def pull(source: Peer, target: Peer, prompt: list[int], end: int) -> int:
    """The first token at `target`, with KV of `source`; bytes moved."""
    ticket = await target.prepare(prompt, end)
    report = await source.send(prompt, ticket, end)
    await target.generate(prompt, ticket, end)
    return int(report.sent_bytes)


async def measure(engines: list[Peer], store: Peer, length: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds by way, and the bytes of the prompt's KV."""
    other, engine = engines
    seconds: dict[str, list[float]] = {"recompute": [], "peer": [], "store": []}
    size = 0

    async def timed(way: str, work: Callable[[], Awaitable[Any]]) -> Any:
        await engine.flush()
        begin = time.perf_counter()
        result = await work()
        seconds[way].append(time.perf_counter() - begin)
        return result

    for turn in range(repeats):
        draw = random.Random(f"{length} {turn}")
        prompt = [draw.randrange(256) for _ in range(length)]
        await timed("recompute", lambda: engine.generate(prompt))  # noqa: B023
        # The KV comes to the other engine, and from there to the store.
        ticket = await other.prepare(prompt, length)
        await engine.send(prompt, ticket, length)
        await other.release(ticket)
        whole = length // BLOCK * BLOCK
        ticket = await store.prepare(prompt, whole)
        await other.send(prompt, ticket, ticket.end)
        await store.release(ticket)
        size = await timed("peer", lambda: pull(other, engine, prompt, length - 1))  # noqa: B023
        await timed("store", lambda: pull(store, engine, prompt, whole - BLOCK))  # noqa: B023
        await other.flush()
    return seconds, size


async def run(transport: str, console: Console) -> None:
    """One mesh, one table."""
    options = MeshOptions(
        name=f"bench-{transport}", engines=2, stores=1, trace_ratio=0.0, http="", store_memory="512MiB"
    )
    model = await asyncio.to_thread(tiny_model, Recipe(context=CONTEXT))
    arguments = ["--kv-tokens", str(CONTEXT + 4096), "--chunk-tokens", str(CHUNK_TOKENS), "--transport", transport]
    async with peers_of(options, model, arguments) as (engines, (store,)):
        title = f"{transport}: milliseconds to the first token; a model of 4 layers x 2 heads x 32, float32"
        table = Table(title=title, title_justify="left")
        for column in ("tokens", "KV MB", "recompute", "from an engine", "ratio", "from the store", "ratio"):
            table.add_column(column, justify="right")
        await measure(engines, store, 512, 1)
        for length in LENGTHS:
            seconds, size = await measure(engines, store, length, 3 if length < 16384 else 1)
            compute, peer, restored = (statistics.median(seconds[way]) for way in ("recompute", "peer", "store"))
            values = [compute * 1e3, peer * 1e3, restored * 1e3]
            row = [f"{values[0]:.0f}", f"{values[1]:.0f}", f"{peer / compute:.2f}"]
            row += [f"{values[2]:.0f}", f"{restored / compute:.2f}"]
            table.add_row(str(length), f"{size / 1e6:.1f}", *row)
            if compute > ENOUGH_S:
                break
        console.print(table)


def main() -> None:
    """Measures."""
    console = Console(highlight=False)
    for transport in TRANSPORTS:
        asyncio.run(run(transport, console))


if __name__ == "__main__":
    main()
