"""Where the router is that a command should talk to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kvmesh.errors import Unavailable
from kvmesh.grpcx import split_address
from kvmesh.local.state import MeshDir


def router_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options --router and --name that `router_address` takes."""
    here = "The local mesh meant."
    name = click.option("--name", default="default", show_default=True, envvar="KVMESH_NAME", help=here)
    elsewhere = "A router elsewhere, in place of a local mesh."
    router = click.option("--router", default="", envvar="KVMESH_ROUTER", metavar="HOST:PORT", help=elsewhere)
    return router(name(command))


def router_address(router: str, name: str) -> str:
    """`router` if given, else where the local mesh `name` listens. Raises Unavailable, saying what to do."""
    if router:
        split_address(router)
        return router
    place = MeshDir(name)
    up = "kvmesh up" + (f" --name {name}" if name != "default" else "")
    state = place.load()
    if state is None:
        raise Unavailable(f"no mesh named {name!r} runs here: start one with `{up}`, or name a router with --router")
    if not state.supervisor.alive():
        raise Unavailable(
            f"the mesh {name!r} runs no more (its supervisor, process {state.supervisor.pid}, is gone): "
            f"`kvmesh down --name {name}` cleans up after it, `{up}` starts a new one"
        )
    if state.phase != "ready":
        raise Unavailable(f"the mesh {name!r} is {state.phase}; try again when it is ready")
    return state.address("router")
