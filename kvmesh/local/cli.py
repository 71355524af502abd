"""The commands of a local mesh; those that talk to a router are in kvmesh.local.commands."""

from __future__ import annotations

import sys

import click

from kvmesh.config import options
from kvmesh.errors import MeshError
from kvmesh.local.commands import generate, health, status, strategy, trace
from kvmesh.local.options import MeshOptions

__all__ = ["demo", "down", "generate", "health", "status", "strategy", "trace", "up"]


@click.command()
@options(MeshOptions, "UP")
@click.option("--detach", is_flag=True, help="Return once the mesh is ready, and leave it running.")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_ARGS...]")
def up(config: MeshOptions, detach: bool, engine_args: tuple[str, ...]) -> None:
    """Starts a mesh on this machine, and keeps it until Ctrl-C.

    That is etcd, registry, engines and router, each a process of its own.
    What follows -- is handed to every `kvmesh engine`.
    """
    import asyncio

    from kvmesh.local import serve

    if detach:
        sys.exit(serve.detach(config, list(engine_args)))
    try:
        code = asyncio.run(serve.serve(config, list(engine_args)))
    except (asyncio.CancelledError, KeyboardInterrupt):
        code = serve.INTERRUPTED
    sys.exit(code)


@click.command()
@click.option("--name", default="default", show_default=True, envvar="KVMESH_NAME", help="The mesh meant.")
@click.option("--all", "every", is_flag=True, help="Every mesh of yours on this machine.")
def down(name: str, every: bool) -> None:
    """Stops a mesh, or cleans up after a killed one."""
    from kvmesh.local.state import MeshDir, meshes
    from kvmesh.local.supervisor import stop_mesh

    if not every:
        click.echo(stop_mesh(MeshDir(name)))
        return
    failures: list[MeshError] = []
    left = [place for place in meshes() if place.file.exists()]
    for place in left:
        try:
            click.echo(stop_mesh(place))
        except MeshError as error:
            failures.append(error)
            click.echo(f"Error: {error}", err=True)
    if not left:
        click.echo("no mesh is running")
    sys.exit(1 if failures else 0)


@click.command()
@click.option("--model", default="", help="Folder of the model. [default: a tiny random Llama, made on first use]")
@click.option("--keep", is_flag=True, help="Leave the mesh running at the end until Ctrl-C.")
def demo(model: str, keep: bool) -> None:
    """Sends the same prompts by all three strategies."""
    import asyncio

    from kvmesh.local import demo as show
    from kvmesh.local.serve import INTERRUPTED

    try:
        code = asyncio.run(show.run(MeshOptions(name="demo", model=model), keep))
    except (asyncio.CancelledError, KeyboardInterrupt):
        code = INTERRUPTED
    sys.exit(code)
