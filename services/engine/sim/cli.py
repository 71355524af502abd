"""`kvmesh profile`."""

from __future__ import annotations

from pathlib import Path

import click


def _numbers(_context: click.Context, _param: click.Parameter, given: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in given.split(","))
    except ValueError:
        raise click.BadParameter(f"{given!r} is no list of numbers such as 1,2,4") from None
    if min(numbers) < 1 or len(set(numbers)) < 2:
        raise click.BadParameter(f"{given!r} must have two different numbers or more, each 1 or more")
    return tuple(sorted(set(numbers)))


@click.command()
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--engine", required=True, metavar="HOST:PORT", help="The engine to measure; nobody else may use it.")
@click.option("--receiver", default="", metavar="HOST:PORT", help="Another engine, to measure the rate of transfers.")
@click.option("--lengths", default="64,128,256,512,1024,1536", show_default=True, callback=_numbers, help="Of prompts.")
@click.option("--batches", default="1,2,4,8", show_default=True, callback=_numbers, help="Requests decoded together.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option("--chunk-tokens", default=512, show_default=True, type=click.IntRange(1), help="As the engine has it.")
@click.option("--max-running", default=256, show_default=True, type=click.IntRange(1), help="As the engine has it.")
@click.option("--seed", default=0, show_default=True, help="Of the prompts: caches must not know them.")
def profile(
    output: Path,
    engine: str,
    receiver: str,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    repeats: int,
    chunk_tokens: int,
    max_running: int,
    seed: int,
) -> None:
    """Measures a running engine; writes a profile for `kvmesh engine --sim` and `kvmesh sim`."""
    from services.engine.sim.measure import Plan

    plan = Plan(lengths, batches, repeats, chunk_tokens, max_running)
    click.echo(_measure(output, engine, receiver, plan, seed))


def _measure(output: Path, engine: str, receiver: str, plan: object, seed: int) -> str:
    import asyncio
    from contextlib import AsyncExitStack
    from functools import partial

    from kvmesh.grpcx import split_address
    from services.engine.sim.measure import Plan, Probe, fit, measure

    assert isinstance(plan, Plan)
    for address in filter(None, (engine, receiver)):
        split_address(address)

    text: list[str] = []

    async def run() -> str:
        async with AsyncExitStack() as stack:
            probes = []
            for address in filter(None, (engine, receiver)):
                probe = Probe(address, seed)
                stack.push_async_callback(probe.close)
                await probe.open()
                probes.append(probe)
            measured = await measure(probes[0], probes[1] if receiver else None, plan, partial(click.echo, err=True))
            found = fit(output.stem, probes[0].info, measured, plan)
        errors = found.fitted
        text.append(found.dump())
        return (
            f"{output}: prefill fits within {100 * errors['prefill_error']:.0f} %, steps within "
            f"{100 * errors['decode_error']:.0f} % (medians)"
        )

    summary = asyncio.run(run())
    output.write_text(text[0])
    return summary
