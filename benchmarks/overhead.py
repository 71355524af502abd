"""What the router adds: the same prompts to an engine directly and through the router, turn by turn, on a real mesh.

Starts a mesh of one SGLang engine with the tiny model, and stops it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvmesh import grpcx
from kvmesh.client import AsyncClient
from kvmesh.local.mesh import resolve_model, stages
from kvmesh.local.options import MeshOptions
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.engine_pb2 import StartGenerateRequest
from kvmesh.v1.engine_pb2_grpc import EngineStub

PROMPT, NEW, ROUNDS = 64, 64, 60
CONCURRENT = (1, 8)


async def direct(stub: Any, prompt: list[int]) -> tuple[float, float]:
    """(seconds to the first token, seconds to the end) of a generation on the engine itself."""
    sampling = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_eos=True)
    begin, first = time.perf_counter(), 0.0
    async for message in stub.StartGenerate(StartGenerateRequest(token_ids=prompt, sampling=sampling), timeout=60):
        if message.HasField("chunk"):
            first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin


async def routed(client: AsyncClient, prompt: list[int]) -> tuple[float, float]:
    """The same through the router."""
    begin, first = time.perf_counter(), 0.0
    answer = client.generate(
        prompt, strategy="data_parallel", timeout=60, max_new_tokens=NEW, temperature=0, ignore_eos=True
    )
    async with aclosing(aiter(answer)) as deltas:
        async for _ in deltas:
            first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin


def prompts(round_: int, count: int) -> list[list[int]]:
    """Prompts that nobody has seen: no cache helps either side."""
    return [[(round_ * 131 + i * 17 + j * j) % 251 for j in range(PROMPT)] for i in range(count)]


async def measure(client: AsyncClient, stub: Any, concurrent: int) -> list[str]:
    """One row: medians over ROUNDS turns of both ways."""
    ways: dict[str, list[tuple[float, float]]] = {"direct": [], "routed": []}
    for turn in range(2 * ROUNDS // concurrent):
        for way, ask, target in (("direct", direct, stub), ("routed", routed, client)):
            asks = (ask(target, p) for p in prompts(turn * 2 + (way == "routed") + 7919 * concurrent, concurrent))
            results = await asyncio.gather(*asks)
            if turn:
                ways[way] += results
    ttft, jct = ({way: statistics.median(r[i] for r in ways[way]) * 1000 for way in ways} for i in (0, 1))
    per_token = {way: (jct[way] - ttft[way]) / (NEW - 1) for way in ways}
    row = [str(concurrent)]
    for values in (ttft, per_token, jct):
        added = values["routed"] - values["direct"]
        row += [f"{values['direct']:.2f}", f"{added:+.2f}", f"{values['routed'] / values['direct']:.2f}"]
    return row


async def run() -> None:
    """Starts the mesh, measures, prints."""
    console = Console(highlight=False)
    options = MeshOptions(name="bench", engines=1, trace_ratio=0.0, http="")
    model, _ = await asyncio.to_thread(resolve_model, "")
    async with LocalMesh(MeshDir(options.name), str(model)) as mesh:
        begin = time.perf_counter()
        await mesh.start(stages(options, Path(model), []), options.start_timeout)
        console.print(f"a mesh of one engine was ready after {time.perf_counter() - begin:.1f} s")
        engine = next(c.address for c in mesh.children if c.spec.role == "engine")
        table = Table(
            title=f"{PROMPT} prompt tokens, {NEW} new, tracing off: milliseconds directly, what the router adds, ratio",
            title_justify="left",
        )
        for column in ("at once", "TTFT", "added", "ratio", "per token", "added", "ratio", "JCT", "added", "ratio"):
            table.add_column(column, justify="right")
        async with AsyncClient(mesh.state.address("router")) as client, grpcx.channel(engine) as channel:
            for concurrent in CONCURRENT:
                table.add_row(*await measure(client, EngineStub(channel), concurrent))
        console.print(table)


def main() -> None:
    """Measures."""
    asyncio.run(run())


if __name__ == "__main__":
    main()
