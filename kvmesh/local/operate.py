"""The commands that run the mesh: migrate and drain."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.local.find import Where, router_options

if TYPE_CHECKING:
    from kvmesh.v1.operator_pb2 import Migrated


def _ids(_context: click.Context, _param: click.Parameter, given: str | None) -> list[int] | None:
    if given is None:
        return None
    try:
        return [int(part) for part in given.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{given!r} is not a list of token ids such as 1,2,3") from None


@contextlib.contextmanager
def _operator(where: Where) -> Iterator[tuple[Any, Any]]:
    """A stub of the router's Operator service and the metadata of its calls, with errors as MeshErrors."""
    import grpc

    from kvmesh.client import authorization
    from kvmesh.errors import from_rpc
    from kvmesh.grpcx import blocking_channel
    from kvmesh.v1.operator_pb2_grpc import OperatorStub

    address, shown = where.address(), where.credentials()
    with blocking_channel(address, shown.tls) as channel:
        try:
            yield OperatorStub(channel), authorization(shown.api_key)
        except grpc.RpcError as error:
            raise from_rpc(error, f"router {address}") from None  # type: ignore[arg-type]


def _line(moved: Migrated) -> str:
    """One context, in words."""
    if moved.error:
        return f"{moved.tokens} tokens not moved{f' to {moved.target}' if moved.target else ''}: {moved.error}"
    parts = [f"{moved.sent} of {moved.tokens} tokens to {moved.target}", f"{moved.bytes / 1e6:.1f} MB"]
    parts += [f"{moved.seconds * 1e3:.0f} ms"]
    if moved.matched:
        parts.append(f"{moved.matched} were there")
    if moved.computed:
        parts.append(f"{moved.computed} prefilled for it")
    return ", ".join(parts)


@click.command()
@click.option("--from", "source", required=True, metavar="NAME", help="Engine or KV store that has the contexts.")
@click.option("--to", "target", required=True, metavar="NAME", help="Engine or KV store that is to have them.")
@click.option("--text", help="The context, as text.")
@click.option("--tokens", callback=_ids, metavar="1,2,3", help="The context, as token ids.")
@click.option("--hottest", type=click.IntRange(1, 1000), help="So many contexts of an engine, those used last.")
@click.option("--salt", default="", help="Under which a store keeps them apart from others: a tenant.")
@click.option("--timeout", default=300.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds.")
@router_options
def migrate(
    source: str,
    target: str,
    text: str | None,
    tokens: list[int] | None,
    hottest: int | None,
    salt: str,
    timeout: float,
    where: Where,
) -> None:
    """Copies the KV of contexts from one member to another."""
    from kvmesh.v1.operator_pb2 import MigrateRequest
    from kvmesh.v1.router_pb2 import TokenIds

    if sum(given is not None for given in (text, tokens, hottest)) != 1:
        raise click.UsageError("give one of --text, --tokens and --hottest")
    request = MigrateRequest(source=source, target=target, salt=salt)
    if text is not None:
        request.text = text
    elif hottest is not None:
        request.hottest = hottest
    else:
        try:
            request.tokens.CopyFrom(TokenIds(ids=tokens))
        except ValueError as error:
            raise InvalidArgument(f"tokens: {error}") from None
    with _operator(where) as (operator, metadata):
        contexts = operator.Migrate(request, timeout=timeout, metadata=metadata).contexts
    for moved in contexts:
        click.echo(_line(moved))
    if not contexts:
        click.echo(f"{source} has no contexts")
    sys.exit(1 if any(moved.error for moved in contexts) else 0)


@click.command()
@click.argument("engine")
@click.option("--hottest", default=16, show_default=True, type=click.IntRange(0, 1000), help="Contexts to move.")
@click.option("--to", "target", default="", metavar="NAME", help="Who gets them. [default: KV stores, else engines]")
@click.option("--stop", is_flag=True, help="End the engine's process too.")
@click.option("--timeout", default=300.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds.")
@router_options
def drain(engine: str, hottest: int, target: str, stop: bool, timeout: float, where: Where) -> None:
    """Takes an engine out: lets it finish, moves what is hot."""
    from kvmesh.v1.operator_pb2 import DrainRequest

    request = DrainRequest(engine=engine, hottest=hottest, target=target, stop=stop)
    with _operator(where) as (operator, metadata):
        for event in operator.Drain(request, timeout=timeout, metadata=metadata):
            kind = event.WhichOneof("event")
            if kind == "moved":
                click.echo(_line(event.moved))
            elif kind == "left":
                click.echo(f"{engine} has left the mesh")
                return
            else:
                click.echo(f"{engine} gets no new requests; {event.running} still run there")
    raise Unavailable(f"the router did not say that {engine} has left")
