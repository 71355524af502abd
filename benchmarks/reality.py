"""The simulator against reality: one small workload on two real SGLang engines, and on two simulated ones.

    python -m benchmarks.reality

Starts a mesh of two engines with the tiny model on this machine's processors. In each round it measures an engine, as
`kvmesh profile` does, and puts the load on the mesh by each strategy, so that a machine that is busy with other things
is as busy for all of them. Then the same load runs on the simulator, with the profile fitted to all of the rounds. What
is compared are times of each request, each the median over the rounds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from pathlib import Path
from statistics import median

import click
import numpy as np

from kvmesh.bench import arrivals
from kvmesh.bench.records import Record
from kvmesh.bench.run import Load
from kvmesh.bench.run import run as run_load
from kvmesh.bench.targets import RouterTarget
from kvmesh.bench.workloads import Ask, Length, synthetic
from kvmesh.local.mesh import resolve_model, stages
from kvmesh.local.options import MeshOptions
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh
from kvmesh.sim.profile import Profile
from services.engine.sim.measure import Measured, Plan, Probe, fit, measure
from simulator.mesh import Around
from simulator.run import Choice, simulate

STRATEGIES = ("data_parallel", "prefill_decode")
CHUNK_TOKENS, KV_TOKENS = 512, 16384
PLAN = Plan((64, 256, 512, 1024, 1536), (1, 2, 4, 8), repeats=1, chunk_tokens=CHUNK_TOKENS)
# Before each request that measures what the way to the engines takes, in seconds.
PAUSE_S = 0.3
# Requests, one after the other, that measure what two engines take from each other.
SHARING = 10
# Requests of a round that come before those that count.
WARMUP = 5


@dataclasses.dataclass
class Reality:
    """What was measured: a profile; by strategy, what came of the requests, one list a round."""

    profile: Profile
    records: dict[str, list[list[Record]]]
    # What was measured of the ways, on an idle mesh.
    around: Around


def load_of(count: int, rate: float, seed: int, round_: int = 0) -> Load:
    """The same lengths and arrivals in each round, and other prompts."""
    asks = synthetic(count + WARMUP, Length(700, 0.5), Length(48, 0.3), seed=seed)
    fresh: list[Ask] = []
    for ask in asks:
        size = min(ask.prompt_tokens, 2000)
        blocks = tuple((number + (round_ << 44), min(length, size)) for number, length in ask.blocks)
        fresh.append(dataclasses.replace(ask, prompt_tokens=size, blocks=blocks))
    return Load(fresh, arrivals.poisson(rate, len(fresh), seed), warmup=WARMUP, timeout=120)


async def overhead(target: RouterTarget, probe: Probe, seed: int) -> float:
    """Seconds that a lone request takes to its first token through the router beyond the engine's passes."""
    found = []
    for i in range(7):
        ask = Ask(256, 2, (((seed << 48) + i, 256),))
        # As between the requests of a light load: what has slept takes its time to wake.
        await asyncio.sleep(PAUSE_S)
        record = Record(i, 256, asyncio.get_running_loop().time())
        await target.ask(ask, record, 60)
        own = await probe.generate(probe.prompt(256), 2)
        found.append(record.ttft - own.prefill_seconds)
    return max(0.0, median(found))


async def sharing(target: RouterTarget, seed: int) -> list[float]:
    """How many times as long a request takes when the other engine serves one as well; router and client work for both.

    `target` sends two requests at once to different engines.
    """

    async def whole(at_once: int) -> float:
        numbers = range(SHARING * at_once)
        asks = [Ask(512, 48, ((((seed << 8) + at_once << 40) + i, 512),)) for i in numbers]
        records = await run_load(target, Load(asks, concurrency=at_once, timeout=60))
        return median(r.jct for r in records)

    return [await whole(2) / await whole(1) for _ in range(2)]


async def real(count: int, rate: float, rounds: int, seed: int) -> Reality:
    """Starts the mesh, measures, and stops it."""
    options = MeshOptions(name="reality", engines=2, trace_ratio=0.0, http="", kv_tokens=KV_TOKENS)
    model, _ = await asyncio.to_thread(resolve_model, "")
    records: dict[str, list[list[Record]]] = {strategy: [] for strategy in STRATEGIES}
    measured = Measured()
    async with LocalMesh(MeshDir(options.name), str(model)) as mesh:
        arguments = ["--chunk-tokens", str(CHUNK_TOKENS)]
        await mesh.start(stages(options, Path(model), arguments), options.start_timeout)
        probes = [Probe(c.address, seed + i) for i, c in enumerate(c for c in mesh.children if c.spec.role == "engine")]
        targets = {s: RouterTarget(mesh.state.address("router"), s) for s in STRATEGIES}
        try:
            for probe in probes:
                await probe.open()
            for target in targets.values():
                await target.prepare()
            # The first passes of each shape are slow, in any of the processes.
            for probe in probes:
                await measure(probe, None, dataclasses.replace(PLAN, batches=(1, 4)), lambda said: None)
            fronts: list[float] = []
            shares: list[float] = []
            for round_ in range(rounds):
                part = await measure(probes[0], probes[1], PLAN, lambda said: None)
                measured.add(part)
                fronts.append(await overhead(targets["data_parallel"], probes[0], round_ + 1))
                shares += await sharing(targets["data_parallel"], 1000 + round_)
                for n, (strategy, target) in enumerate(targets.items()):
                    got = await run_load(target, load_of(count, rate, seed, 1 + n + round_ * len(targets)))
                    records[strategy].append(got[WARMUP:])
                    failed = [r.error for r in got if r.error]
                    click.echo(f"round {round_ + 1}, {strategy}: {len(failed)} failed {set(failed) or ''}", err=True)
            # In place of what engines alone take from each other.
            measured.together = shares
            profile = fit("this-machine", probes[0].info, measured, PLAN)
        finally:
            for probe in probes:
                await probe.close()
            for target in targets.values():
                await target.close()
    latency = median(measured.calls) / 2
    return Reality(profile, records, Around(latency, front=max(0.0, median(fronts) - latency)))


def times(rounds: list[list[Record]], measure_: str) -> np.ndarray:  # type: ignore[type-arg]
    """Of each request, the median over the rounds in which it ended well."""
    values = [[getattr(r, measure_) if not r.error else np.nan for r in records] for records in rounds]
    found: np.ndarray = np.nanmedian(np.array(values), axis=0)  # type: ignore[type-arg]
    return found


def compare(reality: Reality, count: int, rate: float, seed: int) -> list[str]:
    """The table."""
    rows = [
        f"{'':<16}{'':<6}{'real p50':>10}{'simulated':>11}{'differ':>8}{'real p90':>10}{'simulated':>11}  correlation"
    ]
    for strategy, rounds in reality.records.items():
        load = load_of(count, rate, seed)
        outcome = simulate(reality.profile, 2, Choice.parse(strategy), load, seed, reality.around)
        for name in ("ttft", "tpot", "jct"):
            ours, theirs = times([outcome.records[WARMUP:]], name), times(rounds, name)
            good = ~np.isnan(theirs)
            ours, theirs = 1000 * ours[good], 1000 * theirs[good]
            a, b = np.median(theirs), np.median(ours)
            rows.append(
                f"{strategy:<16}{name.upper():<6}{a:>7.1f} ms{b:>8.1f} ms{100 * (b / a - 1):>+6.0f} %"
                f"{np.percentile(theirs, 90):>7.1f} ms{np.percentile(ours, 90):>8.1f} ms"
                f"{np.corrcoef(ours, theirs)[0, 1]:>13.2f}"
            )
    return rows


@click.command()
@click.option("--requests", default=60, show_default=True, type=click.IntRange(10), help="Of a round.")
@click.option("--rate", default=2.0, show_default=True, help="Requests a second.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=1, show_default=True)
@click.option("--profile", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write the profile there.")
def main(requests: int, rate: float, rounds: int, seed: int, output: Path | None) -> None:
    """Prints the comparison."""
    logging.disable(logging.WARNING)
    busy = os.getloadavg()[0]
    reality = asyncio.run(real(requests, rate, rounds, seed))
    if output is not None:
        output.write_text(reality.profile.dump())
    p = reality.profile
    click.echo(
        f"load of the machine before and after: {busy:.1f}, {os.getloadavg()[0]:.1f}; {os.cpu_count()} processors"
    )
    click.echo(
        f"fitted: prefills within {100 * p.fitted['prefill_error']:.0f} %, steps within "
        f"{100 * p.fitted['decode_error']:.0f} %; {100 * p.contention:.0f} % longer beside another engine; "
        f"a send {1000 * p.transfer.latency:.1f} ms and its bytes; "
        f"a call {1000 * reality.around.latency:.1f} ms one way; "
        f"{1000 * reality.around.front:.1f} ms in front of the engines"
    )
    click.echo("\n".join(compare(reality, requests, rate, seed)))


if __name__ == "__main__":
    main()
