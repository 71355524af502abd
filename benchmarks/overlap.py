"""How much of sending a prompt's KV is hidden behind its prefill, chunk by chunk; and so what is left to be gained.

`left` is the time from the end of the prefill to the last byte: sending layer by layer inside of the last chunk could
save at most that, and less for all layers but the last must still be sent behind their own computation.
"""

from __future__ import annotations

import asyncio
import random
import statistics

from rich.console import Console
from rich.table import Table

from benchmarks.peers import TRANSPORTS, Peer, peers_of
from kvmesh.local.options import MeshOptions
from kvmesh.local.tiny_model import Recipe, tiny_model
from kvmesh.v1.kv_pb2 import RemoteSendResponse

LENGTHS = (256, 512, 1024, 2048, 4096)
CHUNK_TOKENS = 512
CONTEXT = 8192
REPEATS = 7


async def measure(sender: Peer, receiver: Peer, length: int) -> list[RemoteSendResponse]:
    """What the sender says of prompts that no cache has."""
    replies = []
    for turn in range(REPEATS):
        draw = random.Random(f"overlap {length} {turn}")
        prompt = [draw.randrange(256) for _ in range(length)]
        ticket = await receiver.prepare(prompt, length)
        try:
            replies.append(await sender.send(prompt, ticket, length))
        finally:
            await receiver.release(ticket)
    return replies


async def run(transport: str, console: Console) -> None:
    """One mesh, one table."""
    options = MeshOptions(name=f"overlap-{transport}", engines=2, trace_ratio=0.0, http="")
    model = await asyncio.to_thread(tiny_model, Recipe(context=CONTEXT))
    arguments = ["--kv-tokens", "65536", "--chunk-tokens", str(CHUNK_TOKENS), "--transport", transport]
    async with peers_of(options, model, arguments) as ((sender, receiver), _):
        title = f"{transport}: milliseconds of a RemoteSend, in chunks of {CHUNK_TOKENS} tokens; medians of {REPEATS}"
        table = Table(title=title, title_justify="left")
        for column in ("tokens", "KV MB", "computing", "sending", "of that left", "left / computing"):
            table.add_column(column, justify="right")
        await measure(sender, receiver, 384)
        for length in LENGTHS:
            replies = await measure(sender, receiver, length)
            parts = [(r.compute_seconds * 1e3, r.send_seconds * 1e3, r.tail_seconds * 1e3) for r in replies]
            compute, send, left = (statistics.median(column) for column in zip(*parts, strict=True))
            row = [f"{compute:.1f}", f"{send:.2f}", f"{left:.2f}", f"{left / compute:.1%}"]
            table.add_row(str(length), f"{replies[0].sent_bytes / 1e6:.1f}", *row)
        console.print(table)


def main() -> None:
    """Measures."""
    console = Console(highlight=False)
    for transport in TRANSPORTS:
        asyncio.run(run(transport, console))


if __name__ == "__main__":
    main()
