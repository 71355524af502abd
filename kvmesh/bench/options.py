"""Options that say which load: shared by `kvmesh bench` and `kvmesh sim`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvmesh.bench.report import Slo
    from kvmesh.bench.run import Load
    from kvmesh.bench.workloads import Ask, Length

_KINDS = ("synthetic", "mooncake", "azure", "sharegpt")


class LengthType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """MEAN or MEAN:SPREAD, the second relative to the first."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Length:
        """Parses it."""
        from kvmesh.bench.workloads import Length

        if isinstance(value, Length):
            return value
        mean, _, spread = str(value).partition(":")
        try:
            length = Length(int(mean), float(spread or 0))
        except ValueError:
            self.fail(f"{value!r} is not TOKENS or TOKENS:SPREAD, such as 3000:0.1", param, ctx)
        if length.mean < 1 or not 0 <= length.spread <= 1:
            self.fail(f"{value!r}: at least 1 token, and a spread between 0 and 1", param, ctx)
        return length


_OPTIONS = [
    click.option(
        "--workload", default="synthetic", show_default=True, type=click.Choice(_KINDS), help="What is asked."
    ),
    click.option(
        "--trace", type=click.Path(dir_okay=False, path_type=Path), help="The file of a workload other than synthetic."
    ),
    click.option(
        "--requests",
        default=0,
        help="How many; a trace begins again, with other prompts. [default: 100; all of a trace]",
    ),
    click.option(
        "--input-tokens",
        default="512",
        show_default=True,
        type=LengthType(),
        help="Of synthetic prompts: TOKENS or TOKENS:SPREAD.",
    ),
    click.option("--output-tokens", default="64", show_default=True, type=LengthType(), help="Of synthetic answers."),
    click.option(
        "--prefix-tokens",
        default=0,
        type=click.IntRange(0),
        help="Of a synthetic prompt, how many are a shared beginning.",
    ),
    click.option(
        "--prefixes", default=1, show_default=True, type=click.IntRange(1), help="Shared beginnings that there are."
    ),
    click.option("--rate", type=float, help="Open loop: requests a second."),
    click.option(
        "--arrivals",
        default="",
        help="Open loop: poisson, constant or trace. [default: poisson; trace for a trace without --rate]",
    ),
    click.option("--speed", default=1.0, show_default=True, help="Of --arrivals trace."),
    click.option("--concurrency", type=click.IntRange(1), help="Closed loop: requests at once, in place of a rate."),
    click.option("--warmup", default=0, type=click.IntRange(0), help="First requests that do not count."),
    click.option("--timeout", default=600.0, show_default=True, help="Seconds that one request may take."),
    click.option("--seed", default=0, show_default=True, help="Of prompts, lengths and arrivals."),
    click.option("--slo-ttft", default=0.0, help="Goodput: most ms to the first token."),
    click.option("--slo-tpot", default=0.0, help="Goodput: most ms a token after it."),
    click.option("--slo-jct", default=0.0, help="Goodput: most ms in all."),
]


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them, as keyword arguments for `asks_of`, `load_of` and `slo_of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asks_of(given: dict[str, Any]) -> list[Ask]:
    """The requests. Raises InvalidArgument."""
    from kvmesh.bench import workloads
    from kvmesh.errors import InvalidArgument

    kind, path, count, seed = given["workload"], given["trace"], given["requests"], given["seed"]
    if kind == "synthetic":
        return workloads.synthetic(
            count or 100,
            given["input_tokens"],
            given["output_tokens"],
            seed=seed,
            prefix_tokens=given["prefix_tokens"],
            prefixes=given["prefixes"],
        )
    if path is None:
        raise InvalidArgument(f"workload {kind} needs --trace FILE")
    read = {"mooncake": workloads.mooncake, "azure": workloads.azure, "sharegpt": workloads.sharegpt}[kind]
    return workloads.repeated(lambda again, most: read(path, most, seed + again * workloads.AGAIN), count)


def load_of(given: dict[str, Any], asks: list[Ask]) -> Load:
    """When they come. Raises InvalidArgument."""
    from kvmesh.bench import arrivals
    from kvmesh.bench.run import Load
    from kvmesh.errors import InvalidArgument

    rate, how, concurrency = given["rate"], given["arrivals"], given["concurrency"]
    common = {"warmup": given["warmup"], "timeout": given["timeout"]}
    traced = given["workload"] in ("mooncake", "azure")
    if concurrency and (rate or how):
        raise InvalidArgument("give --concurrency, or --rate and --arrivals, not both")
    how = how or ("trace" if traced and not rate else "poisson" if rate else "")
    if not how:
        return Load(asks, None, concurrency or 1, **common)
    if concurrency:
        return Load(asks, None, concurrency, **common)
    if how == "trace":
        if not traced:
            raise InvalidArgument(f"workload {given['workload']} has no arrival times: give --rate or --concurrency")
        return Load(asks, arrivals.traced(asks, given["speed"]), **common)
    if not rate:
        raise InvalidArgument(f"arrivals = {how} needs --rate")
    if how == "poisson":
        return Load(asks, arrivals.poisson(rate, len(asks), given["seed"]), **common)
    if how == "constant":
        return Load(asks, arrivals.constant(rate, len(asks)), **common)
    raise InvalidArgument(f"arrivals = {how!r} is not poisson, constant or trace")


def slo_of(given: dict[str, Any]) -> Slo:
    """The limits."""
    from kvmesh.bench.report import Slo

    return Slo(given["slo_ttft"] / 1000, given["slo_tpot"] / 1000, given["slo_jct"] / 1000)
