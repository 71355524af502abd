"""`kvmesh kvstore`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import click

from kvmesh.config import ServiceConfig, options, setting
from kvmesh.dataplane.choice import wanted
from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import split_address
from kvmesh.sizes import parse_place, parse_size

_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class KvStoreConfig(ServiceConfig):
    """Settings of the KV store."""

    listen: str = setting("127.0.0.1:0", "HOST:PORT to serve on; port 0 takes a free one.")
    advertise: str = setting("", "HOST:PORT that others reach it at. [default: the address it listens on]")
    registry: str = setting("", "HOST:PORT of the registry. [default: none; nobody finds the store by itself]")
    name: str = setting("", "Name in the mesh. [default: kvstore- and a random number]")
    memory: str = setting("1GiB", "Size of the memory tier; all of it is taken at the start.")
    disk: str = setting("", "PATH:SIZE of the disk tier, such as /data/kv:100GiB. [default: none]")
    ttl: float = setting(0.0, "Seconds after its last use at which a block is dropped; 0 keeps it while there is room.")
    layout_of: str = setting("", "HOST:PORT of an engine whose KV is to be kept. [default: the mesh's first]")
    model: str = setting("", "Folder of the model whose KV is to be kept, in place of asking an engine.")
    model_name: str = setting("", "What requests call the model. [default: as engines do, or the folder's name]")
    dtype: str = setting("auto", "With --model: float32, bfloat16, float16, or auto as the engines have it.")
    page_size: int = setting(1, "With --model: tokens in a page of the engines' KV.")

    sim: str = setting(
        "", "Keep the KV of simulated engines: their profile's name or TOML file. It says the model, too."
    )

    transport: str = setting(
        "auto", "Ways to move KV: auto, which is shm and gloo; or of cuda_ipc, shm, gloo those named: cuda_ipc,gloo."
    )
    data_host: str = setting("", "Address that peers on other hosts send KV to. [default: the host of --advertise]")
    checksum: bool = setting(False, "Compare checksums of all KV that is sent or received.")

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted(self.transport)
        for field in ("registry", "advertise", "layout_of"):
            if value := getattr(self, field):
                split_address(value)
        if self.name and not _NAME.fullmatch(self.name):
            raise InvalidArgument(f"name = {self.name!r} is not [A-Za-z0-9._-], 1 to 63 characters")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype = {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.ttl < 0:
            raise InvalidArgument(f"ttl = {self.ttl:g} is negative")
        if not 1 <= self.page_size <= 1024:
            raise InvalidArgument(f"page_size = {self.page_size} is not between 1 and 1024")
        if self.sim and (self.model or self.layout_of):
            other = "model" if self.model else "layout_of"
            raise InvalidArgument(f"sim = {self.sim!r} says whose KV it is: leave out {other}")
        if not (self.model or self.layout_of or self.sim or self.registry or self.disk):
            raise InvalidArgument("registry is missing: give --registry, --layout-of or --model, to say whose KV it is")
        parse_size(self.memory, "memory")
        if self.disk:
            parse_place(self.disk, "disk")


@click.command()
@options(KvStoreConfig, "KVSTORE")
def kvstore(config: KvStoreConfig) -> None:
    """Runs a KV store: keeps prefixes beyond the engines' memory."""
    from kvmesh.aio import run, setup_logging
    from services.kvstore.main import serve

    setup_logging(config.name or "kvstore", config.log_level)
    run(serve(config))
