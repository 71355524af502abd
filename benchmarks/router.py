"""What a request and a token cost the router: its CPU time, what it adds to latency, its memory.

    python -m benchmarks router
    python -m benchmarks memory

Two stubs of engines, the router and the clients are processes of their own. CPU time is what the router's process used,
by the kernel's account: that others compete for the cores does not count there, but it does in the latencies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.stub import CLOCK_S, stamp
from kvmesh.grpcx import channel
from kvmesh.local.mesh import service_ready
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.engine_pb2 import StartGenerateRequest
from kvmesh.v1.engine_pb2_grpc import EngineStub
from kvmesh.v1.router_pb2 import GenerateRequest, TokenIds
from kvmesh.v1.router_pb2_grpc import RouterStub
from services.registry.memory import MemoryBackend
from services.registry.server import serving

PROMPT = list(range(1, 101))
START_S, REQUEST_S = 60.0, 120.0
ENGINES = 2
# CPU seconds a second of a router that rests.
IDLE = 0.05
SOAK, SOAK_PARTS, SOAK_AT_ONCE = 100_000, 10, 100


@dataclass(frozen=True)
class Load:
    """So many streams at once, with `pause_ms` before each token; requests of one token, then of `tokens`."""

    streams: int
    pause_ms: int
    short: int
    long: int
    tokens: int


# At 100 and 1,000 streams 2,000 tokens a second.
LOADS = (Load(1, 2, 500, 60, 64), Load(100, 50, 4000, 250, 64), Load(1000, 500, 6000, 1200, 16))


@dataclass
class Seen:
    """What the clients saw, in seconds."""

    first: list[float] = field(default_factory=list)
    # From the engine's sending of a token to the client's having it.
    trips: list[float] = field(default_factory=list)


class Bench:
    """The processes. `async with Bench(…)`: stopped at its end."""

    def __init__(self, *router: str) -> None:
        self._arguments = router
        self._stack = contextlib.AsyncExitStack()
        self.router = psutil.Process()
        self._stubs: list[Any] = []
        self._door: Any = None

    async def __aenter__(self) -> Bench:
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            registry = (await self._stack.enter_async_context(serving(MemoryBackend(), "127.0.0.1:0"))).address
            for name in (f"stub-{i}" for i in range(ENGINES)):
                words = ["benchmarks.stub", name, registry, str(folder / name)]
                await self._stack.enter_async_context(process(*words))
                self._stubs.append(EngineStub(await self._open(folder / name)))
            words = ["kvmesh.cli", "router", "--registry", registry, "--announce", str(folder / "router")]
            words += ["--listen", "127.0.0.1:0", "--trace-dir", str(folder), "--wait-engines", str(ENGINES)]
            words += ["--log-level", "warning", *self._arguments]
            self.router = psutil.Process(await self._stack.enter_async_context(process(*words)))
            self._door = RouterStub(await self._open(folder / "router"))
            await self._idle()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _open(self, announced: Path) -> Any:
        async with asyncio.timeout(START_S):
            address = await service_ready(announced)
        opened = channel(address)
        self._stack.push_async_callback(opened.close, None)
        return opened

    async def _idle(self) -> None:
        """Waits until the router has loaded what it loads in the background."""
        async with asyncio.timeout(START_S):
            used = 1.0
            while used > IDLE:
                begin = self.cpu()
                await asyncio.sleep(1.0)
                used = self.cpu() - begin

    def cpu(self) -> float:
        """Seconds of CPU time that the router has had."""
        times = self.router.cpu_times()
        return float(times.user + times.system)

    def rss(self) -> float:
        """MiB of its memory."""
        return float(self.router.memory_info().rss / 2**20)

    async def run(self, at_once: int, total: int, tokens: int, pause_ms: int, direct: bool = False) -> Seen:
        """`total` requests, `at_once` of them at any time."""
        seen, left = Seen(), iter(range(total))
        params = SamplingParams(
            max_new_tokens=tokens, temperature=0, ignore_eos=True, seed=pause_ms, logprobs=tokens > 1
        )

        async def worker(number: int) -> None:
            for _ in left:
                begin, began = time.monotonic(), False
                async for logprobs in self._ask(params, number if direct else None):
                    if not began:
                        began = True
                        seen.first.append(time.monotonic() - begin - pause_ms / 1000)
                    now = stamp()
                    seen.trips += [(now - sent) % CLOCK_S for sent in logprobs]

        async with asyncio.TaskGroup() as group:
            for number in range(at_once):
                group.create_task(worker(number))
        assert len(seen.first) == total
        return seen

    async def _ask(self, params: SamplingParams, direct: int | None) -> AsyncIterator[Sequence[float]]:
        """What comes with each token."""
        if direct is not None:
            asked = StartGenerateRequest(token_ids=PROMPT, sampling=params)
            async for message in self._stubs[direct % ENGINES].StartGenerate(asked, timeout=REQUEST_S):
                if message.HasField("chunk"):
                    yield message.chunk.logprobs
            return
        request = GenerateRequest(tokens=TokenIds(ids=PROMPT), sampling=params)
        async for message in self._door.Generate(request, timeout=REQUEST_S):
            if message.WhichOneof("event") == "delta":
                yield message.delta.logprobs


@asynccontextmanager
async def process(module: str, *arguments: str) -> AsyncIterator[int]:
    """Runs `python -m module`; its number. Ended at the end."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=asyncio.subprocess.DEVNULL, env={**os.environ}
    )
    try:
        yield child.pid
    finally:
        if child.returncode is None:
            child.terminate()
            try:
                await asyncio.wait_for(child.wait(), 10)
            except TimeoutError:
                child.kill()
                await child.wait()


def quantiles(values: list[float]) -> tuple[float, float]:
    """(p50, p99) in ms."""
    ordered = sorted(values)
    return 1000 * ordered[len(ordered) // 2], 1000 * ordered[len(ordered) * 99 // 100]


async def measure(bench: Bench, load: Load) -> list[str]:
    """One row."""
    await bench.run(load.streams, 2 * load.streams + 50, 2, 1)
    begin = bench.cpu()
    await bench.run(load.streams, load.short, 1, 0)
    short = (bench.cpu() - begin) / load.short
    direct = await bench.run(load.streams, load.long, load.tokens, load.pause_ms, direct=True)
    begin = bench.cpu()
    routed = await bench.run(load.streams, load.long, load.tokens, load.pause_ms)
    long = (bench.cpu() - begin) / load.long
    token = (long - short) / (load.tokens - 1)
    row = [f"{load.streams:,}", f"{1e3 * (short - token):.2f}", f"{1e6 * token:.0f}"]
    for name in ("first", "trips"):
        with_router, without = (quantiles(getattr(seen, name)) for seen in (routed, direct))
        row += [f"{a - b:+.2f}" for a, b in zip(with_router, without, strict=True)]
    return [*row, f"{bench.rss():.0f}"]


async def figures(console: Console) -> None:
    """The table."""
    table = Table(title=f"{len(PROMPT)} prompt tokens; added: with the router less without, ms", title_justify="left")
    names = ("streams", "CPU ms a request", "CPU µs a token", "first token p50", "p99", "a token p50", "p99", "RSS MiB")
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left")
    for what, ratio in (("tracing off", "0"), ("tracing all", "1")):
        async with Bench("--trace-ratio", ratio) as bench:
            for load in LOADS:
                table.add_row(what, *await measure(bench, load))
                what = ""
    console.print(table)


async def memory(console: Console) -> None:
    """Memory over many requests."""
    async with Bench("--trace-ratio", "0") as bench:
        sizes = []
        for part in range(SOAK_PARTS + 1):
            # The first part is not counted: it fills what is kept of the last requests.
            await bench.run(SOAK_AT_ONCE, SOAK // SOAK_PARTS, 4, 0)
            sizes.append(bench.rss())
            if part:
                console.print(f"after {part * SOAK // SOAK_PARTS:,} requests: {sizes[-1]:.1f} MiB")
        per_request = (sizes[-1] - sizes[0]) * 2**20 / SOAK
        console.print(f"{per_request:+.0f} bytes a request from {sizes[0]:.1f} to {sizes[-1]:.1f} MiB")


def main() -> None:
    """Measures time."""
    asyncio.run(figures(Console(highlight=False, width=140)))


def soak() -> None:
    """Measures memory."""
    asyncio.run(memory(Console(highlight=False)))


if __name__ == "__main__":
    main()
