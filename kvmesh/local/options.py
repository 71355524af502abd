"""Settings of a local mesh."""

from __future__ import annotations

import dataclasses

from kvmesh.config import TraceConfig, setting
from kvmesh.errors import InvalidArgument
from kvmesh.local.state import MeshDir
from kvmesh.sizes import parse_place, parse_size


@dataclasses.dataclass(frozen=True)
class MeshOptions(TraceConfig):
    """What `kvmesh up` can be told."""

    name: str = setting("default", "Name of the mesh; several may run side by side.")
    model: str = setting("", "Folder of the model. [default: a tiny random Llama, made on first use]")
    sim: str = setting("", "Simulate engines and stores, in place of a model: a profile's name or TOML file.")
    engines: int = setting(2, "Engines to start.")
    dtype: str = setting("auto", "float32, bfloat16 or auto (what the model's configuration says).")
    kv_tokens: int = setting(0, "KV slots of each engine, in tokens; 0 takes the engine's default.")
    stores: int = setting(0, "KV stores to start.")
    store_memory: str = setting("256MiB", "Memory of each KV store.")
    store_disk: str = setting("", "FOLDER:SIZE of the stores' disk tiers, one folder each inside. [default: none]")
    listen: str = setting("127.0.0.1:0", "HOST:PORT of the router; port 0 takes a free one.")
    http: str = setting("127.0.0.1:0", "HOST:PORT of the router's HTTP door, OpenAI's API; empty: none.")
    workers: int = setting(1, "Processes of the router, which serve together.")
    secure: bool = setting(False, "Mutual TLS and API keys, made for this run; commands find theirs by themselves.")
    strategy_dir: str = setting("", "Folder of strategies of your own, taken in again when a file changes.")
    start_timeout: float = setting(300.0, "Seconds that the start may take.")
    trace_dir: str = setting("", "Folder of the span files. [default: with the mesh, where `kvmesh trace` looks]")
    log_level: str = setting("info", "debug, info, warning or error.")

    def __post_init__(self) -> None:
        super().__post_init__()
        MeshDir(self.name)
        if self.sim and self.model:
            raise InvalidArgument("give either model or sim")
        if not 1 <= self.workers <= 64:
            raise InvalidArgument(f"workers = {self.workers} is not between 1 and 64")
        if not 1 <= self.engines <= 64:
            raise InvalidArgument(f"engines = {self.engines} is not between 1 and 64")
        if self.kv_tokens < 0:
            raise InvalidArgument(f"kv_tokens = {self.kv_tokens} is negative")
        if not 0 <= self.stores <= 64:
            raise InvalidArgument(f"stores = {self.stores} is not between 0 and 64")
        parse_size(self.store_memory, "store_memory")
        if self.store_disk:
            parse_place(self.store_disk, "store_disk")
        if self.start_timeout <= 0:
            raise InvalidArgument(f"start_timeout = {self.start_timeout} is not above 0")

    def arguments(self) -> list[str]:
        """The flags that give these options."""
        flags: list[str] = []
        for field in dataclasses.fields(self):
            name, value = field.name.replace("_", "-"), getattr(self, field.name)
            if isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--no-{name}")
            else:
                flags += [f"--{name}", str(value)]
        return flags
