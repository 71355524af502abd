"""`kvmesh sim`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmesh.bench.options import asks_of, load_of, load_options, slo_of

if TYPE_CHECKING:
    from kvmesh.v1.kvstore_pb2 import StoreStats


@click.command()
@click.option("--engines", default=2, show_default=True, type=click.IntRange(1, 1000), help="Simulated engines.")
@click.option("--profile", default="tiny-cpu", show_default=True, help="Theirs: a profile's name or TOML file.")
@click.option(
    "--strategy", "strategies", multiple=True, required=True, metavar="NAME[,KEY=VALUE]...", help="May be repeated."
)
@click.option("--stores", default=0, show_default=True, type=click.IntRange(0, 100), help="Simulated KV stores.")
@click.option("--store-memory", default="64GiB", show_default=True, metavar="SIZE", help="Of KV that each keeps.")
@load_options
@click.option("--latency", default=0.5, show_default=True, type=click.FloatRange(0), help="Of a call, one way, in ms.")
@click.option("--json", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write a report each there.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture: .png, .svg or .pdf.")
def sim(
    engines: int,
    profile: str,
    strategies: tuple[str, ...],
    stores: int,
    store_memory: str,
    latency: float,
    folder: Path | None,
    plot: Path | None,
    **given: Any,
) -> None:
    """Runs strategies on simulated engines, in virtual time."""
    import logging
    import resource

    from kvmesh.bench import plots
    from kvmesh.bench.cli import fitting
    from kvmesh.bench.report import comparison, summarise, table
    from kvmesh.sim.profile import load_profile
    from kvmesh.sizes import parse_size
    from simulator.mesh import Around
    from simulator.run import Choice, simulate

    logging.disable(logging.INFO)
    if plot is not None:
        plots.check(plot)
    engine = load_profile(profile)
    asks = fitting(asks_of(given), engine.model.context_length)
    around = Around(latency / 1000, stores=stores, store_memory=parse_size(store_memory, "store_memory"))
    choices = [Choice.parse(text) for text in strategies]
    reports = []
    for choice in choices:
        load = load_of(given, asks)
        load.on_progress = _progress(choice.text)
        outcome = simulate(engine, engines, choice, load, given["seed"], around)
        about = {key: str(value) for key, value in given.items() if value}
        about |= {"target": "simulator", "engines": str(engines), "profile": engine.name}
        about |= {"stores": str(stores), "store_memory": store_memory} if stores else {}
        report = summarise(choice.text, outcome.records, warmup=given["warmup"], slo=slo_of(given), about=about)
        reports.append(report)
        click.echo(table(report))
        if stores:
            click.echo(_kept(outcome.stores))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        click.echo(
            f"  simulated    {outcome.virtual:.1f} s of {engines} engines in {outcome.real:.1f} s, "
            f"{memory:.1f} GB of memory at most"
        )
    if len(reports) > 1:
        click.echo("\n" + comparison(reports))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for report in reports:
            (folder / f"{report.name.replace(',', '_')}.json").write_text(report.json() + "\n")
    if plot is not None:
        plots.distributions(reports, plot)


def _kept(stats: StoreStats) -> str:
    """What the stores did."""
    share = stats.sent_tokens / max(1, stats.asked_tokens)
    return (
        f"  stores       gave {stats.sent_tokens} of {stats.asked_tokens} tokens that were looked for ({share:.0%}); "
        f"blocks: {stats.stored_blocks} saved, {stats.evicted_blocks} evicted"
    )


def _progress(name: str) -> Any:
    """Shows how far a run is, on a terminal."""
    import sys

    from kvmesh.bench.run import Progress

    if not sys.stderr.isatty():
        return lambda progress: None

    def show(progress: Progress) -> None:
        if progress.ended == progress.total:
            click.echo("\r\033[K", nl=False, err=True)
        elif progress.ended % max(1, progress.total // 200) == 0:
            text = f"\r{name}: {progress.ended}/{progress.total}, {progress.running} running\033[K"
            click.echo(text, nl=False, err=True)

    return show
