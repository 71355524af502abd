"""Settings of a local mesh."""

from __future__ import annotations

import dataclasses

from kvmesh.config import TraceConfig, setting
from kvmesh.errors import InvalidArgument
from kvmesh.local.state import MeshDir


@dataclasses.dataclass(frozen=True)
class MeshOptions(TraceConfig):
    """What `kvmesh up` can be told."""

    name: str = setting("default", "Name of the mesh; several may run side by side.")
    model: str = setting("", "Folder of the model. [default: a tiny random Llama, made on first use]")
    engines: int = setting(2, "Engines to start.")
    dtype: str = setting("auto", "float32, bfloat16 or auto (what the model's configuration says).")
    kv_tokens: int = setting(0, "KV slots of each engine, in tokens; 0 takes the engine's default.")
    listen: str = setting("127.0.0.1:0", "HOST:PORT of the router; port 0 takes a free one.")
    http: str = setting("127.0.0.1:0", "HOST:PORT of the router's HTTP door, OpenAI's API; empty: none.")
    strategy_dir: str = setting("", "Folder of strategies of your own, taken in again when a file changes.")
    start_timeout: float = setting(300.0, "Seconds that the start may take.")
    trace_dir: str = setting("", "Folder of the span files. [default: with the mesh, where `kvmesh trace` looks]")
    log_level: str = setting("info", "debug, info, warning or error.")

    def __post_init__(self) -> None:
        super().__post_init__()
        MeshDir(self.name)
        if not 1 <= self.engines <= 64:
            raise InvalidArgument(f"engines = {self.engines} is not between 1 and 64")
        if self.kv_tokens < 0:
            raise InvalidArgument(f"kv_tokens = {self.kv_tokens} is negative")
        if self.start_timeout <= 0:
            raise InvalidArgument(f"start_timeout = {self.start_timeout} is not above 0")

    def arguments(self) -> list[str]:
        """The flags that give these options."""
        fields = [f.name for f in dataclasses.fields(self)]
        return [part for f in fields for part in (f"--{f.replace('_', '-')}", str(getattr(self, f)))]
