"""The commands that talk to a router, or read what it left: status, generate, strategy, trace."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from kvmesh.errors import NotFound
from kvmesh.local.find import Shown, Where, router_options, security_options


@click.command()
@router_options
@click.option("--json", "as_json", is_flag=True, help="The router's answer as JSON.")
def status(where: Where, as_json: bool) -> None:
    """Shows engines, their load, and the strategy in force."""
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from kvmesh.local.show import mesh_page

    address = where.address()
    with where.client() as client:
        mesh = client.mesh()
    if as_json:
        click.echo(MessageToJson(mesh, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
    else:
        Console(highlight=False).print(mesh_page(mesh, address, [] if where.router else ended(where.name)))


def ended(name: str) -> list[str]:
    """Processes of the local mesh that have ended, each with how."""
    from kvmesh.local.state import MeshDir

    state = MeshDir(name).load()
    return [f"{p.name} {p.state}" for p in state.processes if not p.id.alive()] if state else []


def _pairs(_context: click.Context, _param: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE")
        pairs[key] = value
    return pairs


def _ids(_context: click.Context, _param: click.Parameter, given: str | None) -> list[int] | None:
    if given is None:
        return None
    try:
        return [int(part) for part in given.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{given!r} is not a list of token ids such as 1,2,3") from None


@click.command()
@click.argument("text", required=False)
@click.option("--tokens", callback=_ids, metavar="1,2,3", help="A prompt of token ids in place of text.")
@click.option("--strategy", default="", metavar="NAME", help="[default: the strategy in force]")
@click.option("--param", "params", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="A strategy parameter.")
@click.option("--session", default="", help="The conversation that it belongs to. [default: none]")
@click.option("--tenant", default="", help="On whose account it runs. [default: none]")
@click.option("--priority", type=click.Choice(["low", "normal", "high"]), default="normal", show_default=True)
@click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds.")
@click.option("--request-id", default="", help="[default: the router makes one]")
@click.option("--max-new-tokens", type=int, help="[default: 128]")
@click.option("--temperature", type=float, help="0 is greedy. [default: 1]")
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--min-p", type=float)
@click.option("--frequency-penalty", type=float)
@click.option("--presence-penalty", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--seed", type=int)
@click.option("--stop", "stop_strings", multiple=True, metavar="STR", help="End before this text; may be repeated.")
@click.option("--stop-token", "stop_token_ids", multiple=True, type=int, metavar="ID", help="End after this token.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Go on past the end-of-sequence token.")
@click.option("--json-schema", metavar="JSON", help="The answer is JSON by this schema.")
@click.option("--regex", help="The whole answer matches it.")
@click.option("--logprobs", is_flag=True, default=None, help="With --json: log-probabilities of the chosen tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end in place of text.")
@router_options
def generate(
    text: str | None,
    tokens: list[int] | None,
    strategy: str,
    params: dict[str, str],
    session: str,
    tenant: str,
    priority: str,
    timeout: float,
    request_id: str,
    as_json: bool,
    where: Where,
    **sampling: Any,
) -> None:
    """Sends one prompt and streams the answer.

    "-" reads the prompt from standard input.
    """
    from kvmesh.local.show import Screen, result_json, result_page

    if (text is None) == (tokens is None):
        raise click.UsageError("give a prompt: either TEXT or --tokens")
    prompt: str | list[int] = tokens if text is None else text  # type: ignore[assignment]
    if prompt == "-":
        prompt = sys.stdin.read()
    for many in ("stop_strings", "stop_token_ids"):
        sampling[many] = [*sampling[many]] or None
    with where.client() as client:
        answer = client.generate(
            prompt,
            strategy=strategy,
            strategy_params=params,
            request_id=request_id,
            session=session,
            tenant=tenant,
            priority=priority,
            timeout=timeout,
            **sampling,
        )
        screen = Screen(sys.stdout)
        try:
            for delta in answer:
                if not as_json:
                    screen.write(delta.text)
        except KeyboardInterrupt:
            answer.cancel()
            screen.end()
            click.echo("cancelled", err=True)
            sys.exit(130)
        finally:
            screen.end()
    if not as_json and not answer.result.text:
        # A model without a tokenizer.
        click.echo(",".join(map(str, answer.result.token_ids)))
    if as_json:
        click.echo(result_json(answer.result))
    else:
        click.echo(result_page(answer.result), err=True)


@click.group()
def strategy() -> None:
    """Shows the strategies; puts one in force."""


@strategy.command("list")
@router_options
def strategy_list(where: Where) -> None:
    """Lists all strategies with their parameters."""
    from rich.console import Console

    from kvmesh.local.show import strategies_page

    with where.client() as client:
        Console(highlight=False).print(strategies_page(client.strategies(), client.strategy().name))


@strategy.command("get")
@router_options
def strategy_get(where: Where) -> None:
    """Shows the strategy in force, the one on trial, and those before."""
    from kvmesh.local.show import in_force_lines

    with where.client() as client:
        click.echo("\n".join(in_force_lines(client.strategies_in_force())))


@strategy.command("set")
@click.argument("strategy_name", metavar="NAME")
@click.argument("params", nargs=-1, callback=_pairs, metavar="[KEY=VALUE]...")
@click.option(
    "--share",
    type=click.FloatRange(0, 100, min_open=True),
    default=100.0,
    help="On trial, for so many percent of the sessions. [default: for all]",
)
@click.option(
    "--max-error-rate",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Take it back when more than this share of its requests fail, 0 to 1. [default: not looked at]",
)
@click.option(
    "--max-ttft",
    type=click.FloatRange(0, 86400),
    default=0.0,
    help="Take it back when its mean time to the first token is over this, in seconds. [default: not looked at]",
)
@click.option(
    "--min-requests",
    type=click.IntRange(0, 200),
    default=0,
    help="Requests to wait for before judging. [default: 20]",
)
@router_options
def strategy_set(
    strategy_name: str,
    params: dict[str, str],
    share: float,
    max_error_rate: float,
    max_ttft: float,
    min_requests: int,
    where: Where,
) -> None:
    """Puts a strategy in force for the requests that come after."""
    from kvmesh.local.show import choice_line

    with where.client() as client:
        choice = client.set_strategy(
            strategy_name,
            params,
            share_percent=share if share < 100 else 0,
            max_error_rate=max_error_rate,
            max_ttft_seconds=max_ttft,
            min_requests=min_requests,
        )
        click.echo(choice_line(choice))


@strategy.command("rollback")
@router_options
def strategy_rollback(where: Where) -> None:
    """Ends the trial, or puts the choice before in force again."""
    from kvmesh.local.show import choice_line

    with where.client() as client:
        click.echo(choice_line(client.rollback_strategy()))


@click.command()
@click.argument("request_id")
@click.option("--trace-dir", multiple=True, type=click.Path(), help="[default: those of every mesh in $KVMESH_HOME]")
def trace(request_id: str, trace_dir: tuple[str, ...]) -> None:
    """Prints where the time of one request went."""
    from pathlib import Path

    from rich.console import Console

    from kvmesh.local.spans import settled_trace, trace_folders
    from kvmesh.local.waterfall import Waterfall

    folders = [Path(d) for d in trace_dir] or trace_folders()
    spans = []
    with contextlib.suppress(KeyboardInterrupt):
        spans = settled_trace(request_id, folders)
    if not spans:
        raise NotFound(
            f"no trace of request {request_id!r} in {', '.join(map(str, folders))} (was it sampled? is it older than "
            "the files kept?)"
        )
    console = Console(highlight=False)
    console.print(Waterfall(spans))
    if all(s.parent_id for s in spans):
        console.print("(the request's first span is not there yet: it may still be running)", style="dim")


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option("--timeout", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds.")
@click.option("--service", default="", help="Full name of one service. [default: all of the process]")
@security_options
def health(address: str, timeout: float, service: str, shown: Shown) -> None:
    """Asks a service of the mesh whether it serves; the exit status tells."""
    import asyncio

    from kvmesh.grpcx import split_address, wait_serving

    split_address(address)
    asyncio.run(wait_serving(address, timeout, service, shown.tls))
    click.echo("serving")
