"""`kvmesh registry`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from kvmesh.config import ServiceConfig, options, setting
from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import split_address

if TYPE_CHECKING:
    from services.registry.base import Backend


@dataclass(frozen=True)
class RegistryConfig(ServiceConfig):
    """Settings of the registry service."""

    listen: str = setting("127.0.0.1:2400", "HOST:PORT to serve on; port 0 takes a free one.")
    etcd: str = setting("", "HOST:PORT of the etcd that keeps members and settings.")
    etcd_prefix: str = setting("/kvmesh/v1", "What keys in etcd begin with; meshes on one etcd each have their own.")
    etcd_ca: str = setting("", "PEM file of the CA of etcd's certificate; turns TLS to etcd on.")
    etcd_cert: str = setting("", "PEM file of the certificate to show to etcd.")
    etcd_key: str = setting("", "PEM file of its key.")
    embedded: bool = setting(False, "Keep everything in this process, without etcd; it is gone when the process is.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.etcd) == self.embedded:
            raise InvalidArgument("give exactly one of --etcd HOST:PORT and --embedded")
        if self.etcd:
            split_address(self.etcd)
        if not self.etcd_prefix.strip("/"):
            raise InvalidArgument(f"etcd_prefix = {self.etcd_prefix!r} is empty")


@click.command()
@options(RegistryConfig, "REGISTRY")
def registry(config: RegistryConfig) -> None:
    """Runs the registry: who is in the mesh, and the settings that all of it shares."""
    from kvmesh.aio import run, setup_logging

    setup_logging("registry", config.log_level)
    run(serve(config))


async def serve(config: RegistryConfig) -> None:
    """Serves until cancelled. Raises Unavailable when the address cannot be bound."""
    import asyncio
    import logging

    from kvmesh.grpcx import announce
    from kvmesh.metrics import page
    from services.registry.server import serving

    log = logging.getLogger(__name__)
    backend = _backend(config)
    async with page("registry", "registry", config), serving(backend, config.listen, config.access()) as server:
        log.info("listening on %s", server.address)
        announce(config.announce, server.address)
        await backend.wait_ready()
        await server.ready()
        log.info("ready")
        await asyncio.Event().wait()


def _backend(config: RegistryConfig) -> Backend:
    if config.embedded:
        from services.registry.memory import MemoryBackend

        return MemoryBackend()
    from kvmesh.tls import Tls
    from services.registry.etcd import EtcdBackend

    return EtcdBackend(config.etcd, config.etcd_prefix, Tls.read(config.etcd_ca, config.etcd_cert, config.etcd_key))
