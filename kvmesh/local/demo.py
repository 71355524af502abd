"""`kvmesh demo`: the same prompts through all three strategies, side by side."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvmesh import grpcx
from kvmesh.client import AsyncClient, Result
from kvmesh.errors import DeadlineExceeded, FailedPrecondition, MeshError, from_rpc
from kvmesh.local.mesh import resolve_model
from kvmesh.local.options import MeshOptions
from kvmesh.local.serve import INTERRUPTED, interrupts, start, unless
from kvmesh.local.spans import settled_trace
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh, StartFailed
from kvmesh.local.waterfall import Waterfall, human_bytes

STRATEGIES = ("data_parallel", "prefill_decode", "balanced_prefill_decode")
NEW_TOKENS = 24
REQUEST_TIMEOUT = 120.0
LENGTHS = (24, 80, 160, 320, 560, 800)
LEGEND = (
    "TTFT: time to the first token. TPOT: time per token after it. JCT: time to the end. Engines that share one small "
    "machine gain nothing by sharing the work: what counts here is that the tokens are the same, and what moved."
)
STORY = (
    "A mesh of engines shares one memory. One of them reads the prompt, another one writes the answer, and between the "
    "two travel the keys and values of every token that was read. Who reads and who writes is not fixed: a few lines "
    "of Python decide it, for each request, while the mesh runs. "
)


def prompts() -> list[str]:
    """One prompt a length, no two with a common beginning, so that no cache helps."""
    return [f"{i + 1}. " + (STORY * 4)[37 * i :][: length - 3] for i, length in enumerate(LENGTHS)]


@dataclasses.dataclass
class Outcome:
    """What became of the prompts under each strategy, in the order of `prompts`."""

    results: dict[str, list[Result]] = dataclasses.field(default_factory=dict)

    def differences(self) -> list[str]:
        """One line for each prompt whose tokens are not the same under all strategies."""
        lines: list[str] = []
        reference = self.results[STRATEGIES[0]]
        for name in STRATEGIES[1:]:
            for i, (a, b) in enumerate(zip(reference, self.results[name], strict=True)):
                if a.token_ids != b.token_ids:
                    lines.append(_difference(i, name, a, b))
        return lines


def _difference(prompt: int, name: str, a: Result, b: Result) -> str:
    pairs = enumerate(zip(a.token_ids, b.token_ids, strict=False))
    at = next((i for i, (x, y) in pairs if x != y), min(len(a.token_ids), len(b.token_ids)))
    there = f"prompt {prompt + 1} ({a.usage.prompt_tokens} tokens), new token {at + 1}"
    if at >= min(len(a.token_ids), len(b.token_ids)):
        return f"{there}: {STRATEGIES[0]} gave {len(a.token_ids)} tokens, {name} {len(b.token_ids)}"
    chosen = f"{STRATEGIES[0]} chose {a.token_ids[at]}, {name} {b.token_ids[at]}"
    if len(a.logprobs) <= at or len(b.logprobs) <= at:
        return f"{there}: {chosen}"
    gap = abs(a.logprobs[at] - b.logprobs[at])
    kind = "a near tie, decided by rounding" if gap < 1e-3 else "no near tie"
    return f"{there}: {chosen}; their log-probabilities are {gap:.2g} apart: {kind}"


async def run(options: MeshOptions, keep: bool) -> int:
    """The whole demo; returns the exit status: 1 when tokens differ or something fails, 130 when interrupted."""
    console = Console(highlight=False)
    model, tiny = await asyncio.to_thread(resolve_model, options.model)
    what = "a tiny random Llama (its text is gibberish, its arithmetic is real)" if tiny else str(model)
    console.rule("[bold]kvmesh demo")
    console.print(f"Model: {what}.")
    console.print("Starting a mesh on this machine: etcd, registry, two SGLang engines (most of the wait), router.")
    code: list[int] = []
    async with interrupts() as stop, LocalMesh(MeshDir(options.name), str(model)) as mesh:
        shown = False
        try:
            begun = time.monotonic()
            if await unless(stop, start(mesh, options, model, [], console)):
                console.print(f"Ready after {time.monotonic() - begun:.0f} s.\n")
                shown = await unless(stop, _show(mesh, console, code))
                if shown and keep:
                    console.print("The mesh stays up (kvmesh status --name demo); Ctrl-C stops it.")
                    await stop.wait()
        except StartFailed as error:
            console.print(f"{error}\nStopping the rest.", markup=False, soft_wrap=True)
            return 1
        except MeshError as error:
            console.print(f"The demo failed: {error}\nLogs: {mesh.place.logs}", style="red", markup=False)
            return 1
        console.print("Stopping the mesh." if shown else "Interrupted; stopping the mesh.")
    if not shown:
        return INTERRUPTED
    console.print("Stopped: no process and no shared memory is left.")
    return code[0]


async def _show(mesh: LocalMesh, console: Console, code: list[int]) -> None:
    async with AsyncClient(mesh.state.address("router")) as client:
        engines = {c.spec.name: c.address for c in mesh.children if c.spec.role == "engine"}
        console.print("Warming up, so that first-time costs do not count.")
        for name in STRATEGIES:
            await asyncio.gather(*(_ask(client, name, f"Warm-up {i}. {STORY * 2}") for i in range(2)))
        outcome = Outcome()
        sizes = f"{len(LENGTHS)} prompts of {LENGTHS[0]} to {LENGTHS[-1]} tokens"
        for name in STRATEGIES:
            for address in engines.values():
                await flush(address)
            console.print(f"Sending {sizes} by {name}, caches empty.")
            outcome.results[name] = [await _ask(client, name, prompt) for prompt in prompts()]
    first = outcome.results[STRATEGIES[0]][0]
    console.print(f"\nFor example {prompts()[0]!r} goes on {first.text!r}\n", markup=False)
    console.print(_table(outcome, list(engines)))
    console.print(LEGEND, style="dim")
    differences = outcome.differences()
    total = sum(len(r.token_ids) for r in outcome.results[STRATEGIES[0]])
    if differences:
        console.print("\nTokens DIFFER between strategies:", style="bold red")
        for line in differences:
            console.print(f"  {line}", markup=False)
    else:
        console.print(f"\nAll three strategies gave the same {total} tokens.", style="bold green")
    longest = outcome.results["prefill_decode"][-1]
    console.print("\nWhere the time of the longest prompt went under prefill_decode, as `kvmesh trace` shows it:")
    spans = await asyncio.to_thread(settled_trace, longest.request_id, [mesh.place.traces], 5.0)
    if spans:
        console.print(Waterfall(spans))
    else:
        console.print("no spans were written", style="red")
    console.print()
    code.append(1 if differences or not spans else 0)


async def _ask(client: AsyncClient, strategy: str, prompt: str) -> Result:
    answer = client.generate(
        prompt,
        strategy=strategy,
        timeout=REQUEST_TIMEOUT,
        max_new_tokens=NEW_TOKENS,
        temperature=0,
        ignore_eos=True,
        logprobs=True,
    )
    return await answer.wait()


async def flush(address: str, patience: float = 10) -> None:
    """Empties an engine's prefix cache, waiting while its last request still winds up. Raises DeadlineExceeded."""
    import grpc.aio

    from kvmesh.v1.engine_pb2 import FlushRequest
    from kvmesh.v1.engine_pb2_grpc import EngineStub

    deadline = time.monotonic() + patience
    async with grpcx.channel(address) as channel:
        stub = EngineStub(channel)
        while True:
            try:
                await stub.Flush(FlushRequest(), timeout=patience)
                return
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc(rpc_error, address)
                if not isinstance(error, FailedPrecondition):
                    raise error from None
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"{error} (for {patience:g} s)") from None
            await asyncio.sleep(0.05)


def _table(outcome: Outcome, engines: list[str]) -> Table:
    table = Table(
        title=f"{len(LENGTHS)} prompts, one at a time: means of times, sums of tokens and bytes", title_justify="left"
    )
    table.add_column("strategy", no_wrap=True, min_width=max(map(len, STRATEGIES)))
    for column in ("TTFT ms", "TPOT ms", "JCT ms", *(f"prefilled on {e}" for e in engines), "KV moved"):
        table.add_column(column, justify="right")
    for name, results in outcome.results.items():
        means = [
            statistics.mean(getattr(r, field) for r in results) * 1000
            for field in ("ttft_seconds", "tpot_seconds", "jct_seconds")
        ]
        shares = [share for r in results for share in r.shares]
        prefilled = [sum(s.prefilled_tokens for s in shares if s.engine == e) for e in engines]
        moved = sum(s.sent_bytes for s in shares)
        table.add_row(Text(name), *(f"{m:.1f}" for m in means), *map(str, prefilled), human_bytes(moved))
    return table
