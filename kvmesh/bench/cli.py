"""`kvmesh bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmesh.bench.options import asks_of, load_of, load_options, slo_of
from kvmesh.local.find import Where, router_options

if TYPE_CHECKING:
    from kvmesh.bench.records import Record
    from kvmesh.bench.run import Load
    from kvmesh.bench.targets import Target
    from kvmesh.bench.workloads import Ask

_FILE = click.Path(dir_okay=False, path_type=Path)


def params_of(pairs: Sequence[str]) -> dict[str, str]:
    """Of KEY=VALUE."""
    from kvmesh.errors import InvalidArgument

    found = dict(pair.partition("=")[::2] for pair in pairs)
    for key, value in found.items():
        if not key or not value:
            raise InvalidArgument(f"param {key!r} is not KEY=VALUE")
    return found


@click.group()
def bench() -> None:
    """Puts load on a mesh, or on any OpenAI-compatible server, and reports."""


@bench.command("run")
@click.option("--openai", default="", metavar="URL", help="An OpenAI-compatible server, such as http://HOST:PORT/v1.")
@click.option("--openai-model", default="", help="The model's name there.")
@click.option("--openai-key", default="", envvar="OPENAI_API_KEY", help="Its key. [env: OPENAI_API_KEY]")
@click.option("--openai-text", is_flag=True, help="Send text where the workload has some, in place of token ids.")
@click.option("--vocab-size", default=32000, show_default=True, type=click.IntRange(4), help="Of --openai's model.")
@click.option("--strategy", default="", help="Of a kvmesh router. [default: the one in force]")
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the strategy.")
@load_options
@click.option("--label", default="", help="Of this run. [default: the strategy or the server]")
@click.option("--json", "output", type=_FILE, help="Write the report there, for `bench compare`.")
@click.option("--plot", type=_FILE, help="Write a picture there: .png, .svg or .pdf.")
@click.option("--quiet", is_flag=True, help="No progress.")
@router_options
def bench_run(
    openai: str,
    openai_model: str,
    openai_key: str,
    openai_text: bool,
    vocab_size: int,
    strategy: str,
    params: tuple[str, ...],
    label: str,
    output: Path | None,
    plot: Path | None,
    quiet: bool,
    where: Where,
    **given: Any,
) -> None:
    """Runs one load against one target."""
    import asyncio

    from kvmesh.bench import plots
    from kvmesh.bench.report import summarise, table
    from kvmesh.bench.targets import OpenAITarget, RouterTarget

    if plot is not None:
        plots.check(plot)
    asks = asks_of(given)

    async def whole() -> list[Record]:
        target: Target
        taken = asks
        if openai:
            target = OpenAITarget(openai, openai_model, vocab_size, openai_key, openai_text)
        else:
            own = where.credentials()
            target = RouterTarget(where.address(), strategy, params_of(params), tls=own.tls, api_key=own.api_key)
            try:
                taken = fitting(asks, await target.prepare())
            except BaseException:
                await target.close()
                raise
        try:
            return await shown(target, load_of(given, taken), quiet)
        finally:
            await target.close()

    records = asyncio.run(whole())
    about = {key: str(value) for key, value in given.items() if value}
    about |= {"target": openai or "router", "strategy": strategy, "params": " ".join(params)}
    report = summarise(
        label or strategy or openai or "mesh", records, warmup=given["warmup"], slo=slo_of(given), about=about
    )
    click.echo(table(report))
    if output is not None:
        output.write_text(report.json() + "\n")
    if plot is not None:
        plots.distributions([report], plot)
    if report.failed == report.requests:
        raise SystemExit(1)


@bench.command("compare")
@click.argument("reports", nargs=-1, required=True, type=_FILE)
@click.option("--plot", type=_FILE, help="Write a picture there: .png, .svg or .pdf.")
def bench_compare(reports: tuple[Path, ...], plot: Path | None) -> None:
    """Shows two or more reports side by side."""
    from kvmesh.bench import plots
    from kvmesh.bench.report import Report, comparison

    if len(reports) < 2:
        raise click.UsageError("give two reports or more")
    read = [Report.read(path) for path in reports]
    click.echo(comparison(read))
    if plot is not None:
        plots.distributions(read, plot)


def fitting(asks: list[Ask], context_length: int) -> list[Ask]:
    """Those that the model can take; says how many it cannot. Raises InvalidArgument when there is none."""
    from kvmesh.bench.workloads import limited
    from kvmesh.errors import InvalidArgument

    taken = limited(asks, context_length)
    if not taken:
        raise InvalidArgument(f"every request is longer than the model's context of {context_length} tokens")
    if len(taken) < len(asks):
        click.echo(f"{len(asks) - len(taken)} requests are longer than {context_length} tokens: left out", err=True)
    return taken


async def shown(target: Target, load: Load, quiet: bool) -> list[Record]:
    """Runs it, with progress on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from kvmesh.bench import run as runner

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}  {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        line = bar.add_task("", total=len(load.asks))

        def moved(p: runner.Progress) -> None:
            bar.update(line, completed=p.ended, description=f"{p.running} running, {p.failed} failed")

        load.on_progress = moved
        return await runner.run(target, load)
