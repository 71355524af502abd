"""Where the router is that a command should talk to, and what the command shows there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.grpcx import split_address
from kvmesh.local.state import MeshDir
from kvmesh.tls import Tls

if TYPE_CHECKING:
    from kvmesh.client import Client

_PEM = click.Path(dir_okay=False)


@dataclass(frozen=True)
class Shown:
    """What a command shows to those that it calls."""

    tls: Tls | None = None
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Where:
    """The router meant: one elsewhere, else that of the local mesh `name`; and what is shown to it."""

    router: str
    name: str
    shown: Shown = Shown()

    def address(self) -> str:
        """HOST:PORT. Raises Unavailable, saying what to do."""
        return router_address(self.router, self.name)

    def credentials(self) -> Shown:
        """What was given; if nothing was, what a secure local mesh keeps for its commands. Raises InvalidArgument."""
        state = None if self.router else MeshDir(self.name).load()
        if state is None or not state.certs or self.shown.tls is not None:
            return self.shown
        folder = Path(state.certs)
        tls = Tls.read(*(str(folder / name) for name in ("ca.pem", "client.pem", "client.key")))
        return Shown(tls, self.shown.api_key or _read_key(str(folder / "admin.apikey")))

    def client(self) -> Client:
        """A blocking client of it. Raises MeshError."""
        from kvmesh.client import Client

        address, shown = self.address(), self.credentials()
        return Client(address, tls=shown.tls, api_key=shown.api_key)


def security_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: --tls-ca, --tls-cert, --tls-key and --api-key-file, given to the command as `shown`."""

    @functools.wraps(command)
    def with_shown(*args: Any, tls_ca: str, tls_cert: str, tls_key: str, api_key_file: str, **given: Any) -> Any:
        shown = Shown(Tls.read(tls_ca, tls_cert, tls_key), _api_key(api_key_file))
        return command(*args, shown=shown, **given)

    wrapped: Callable[..., Any] = with_shown
    for flag, text in (
        ("--api-key-file", "File with the API key to show. [default: $KVMESH_API_KEY]"),
        ("--tls-key", "PEM file of its key."),
        ("--tls-cert", "PEM file of the certificate to show."),
        ("--tls-ca", "PEM file of the CA of the router's certificate; turns TLS on."),
    ):
        variable = f"KVMESH_{flag[2:].replace('-', '_').upper()}"
        wrapped = click.option(flag, default="", type=_PEM, metavar="FILE", envvar=variable, help=text)(wrapped)
    return wrapped


def router_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options that say which router, and what to show to it; the command gets them as `where`."""

    @functools.wraps(command)
    def with_where(*args: Any, router: str, name: str, shown: Shown, **given: Any) -> Any:
        return command(*args, where=Where(router, name, shown), **given)

    here = "The local mesh meant."
    named = click.option("--name", default="default", show_default=True, envvar="KVMESH_NAME", help=here)
    elsewhere = "A router elsewhere, in place of a local mesh."
    router = click.option("--router", default="", envvar="KVMESH_ROUTER", metavar="HOST:PORT", help=elsewhere)
    return router(named(security_options(with_where)))


def _api_key(path: str) -> str:
    return _read_key(path) if path else os.environ.get("KVMESH_API_KEY", "").strip()


def _read_key(path: str) -> str:
    try:
        return Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"api_key_file = {path!r} cannot be read: {getattr(error, 'strerror', 'no text')}"
        ) from None


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
