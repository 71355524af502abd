"""`kvmesh engine`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import click

from kvmesh.config import ServiceConfig, options, setting
from kvmesh.dataplane.choice import wanted
from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import split_address

_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig(ServiceConfig):
    """Settings of the engine service."""

    listen: str = setting("127.0.0.1:0", "HOST:PORT to serve on; port 0 takes a free one.")
    advertise: str = setting("", "HOST:PORT that others reach it at. [default: the address it listens on]")
    registry: str = setting("", "HOST:PORT of the registry. [default: none; nobody finds the engine by itself]")
    name: str = setting("", "Name in the mesh. [default: engine- and a random number]")
    labels: str = setting("", "Labels of the member, as key=value,key=value; role=prefill or role=decode gives a role.")
    model: str = setting("", "Folder of the model, in Hugging Face's form.")
    model_name: str = setting("", "What requests call the model. [default: the folder's name]")
    dtype: str = setting("auto", "float32, bfloat16, float16, or auto: what the model's configuration says.")
    kv_tokens: int = setting(0, "KV slots, in tokens. [default: 16384 on a CPU, on a GPU what its memory holds]")
    page_size: int = setting(1, "Tokens in a page of KV.")
    chunk_tokens: int = setting(0, "Tokens prefilled in one pass; longer prompts go in chunks. [default: 512 on a CPU]")
    max_running: int = setting(0, "Requests decoded together. [default: SGLang's]")
    transport: str = setting(
        "auto", "Ways to move KV: auto, which is shm and gloo; or of cuda_ipc, shm, nccl, gloo those named: shm,gloo."
    )
    data_host: str = setting("", "Address that peers on other hosts send KV to. [default: the host of --advertise]")
    checksum: bool = setting(False, "Compare checksums of all KV that is sent or received.")
    run_dir: str = setting("", "Folder for sockets and files of the run. [default: one in the temporary folder]")
    sim: str = setting("", "Simulate, in place of a model: a profile's name or TOML file. See docs/simulator.md.")
    sim_faults: str = setting(
        "", "Faults of the simulation, as slow=2,die_after_tokens=100, or @FILE; SIGUSR1 rereads it."
    )
    sim_seed: int = setting(0, "Seed of the simulation's jitter.")
    sglang: str = setting("", 'More of SGLang\'s ServerArgs, as a JSON object such as {"mem_fraction_static": 0.8}.')

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == bool(self.sim):
            raise InvalidArgument("give either --model FOLDER or --sim PROFILE")
        if self.sim and self.page_size != 1:
            raise InvalidArgument(f"page_size = {self.page_size}: a simulated engine has pages of 1 token")
        for field in ("registry", "advertise"):
            if value := getattr(self, field):
                split_address(value)
        if self.name and not _NAME.fullmatch(self.name):
            raise InvalidArgument(f"name = {self.name!r} is not [A-Za-z0-9._-], 1 to 63 characters")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype = {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for field in ("kv_tokens", "chunk_tokens", "max_running"):
            if getattr(self, field) < 0:
                raise InvalidArgument(f"{field} = {getattr(self, field)} is negative")
        if not 1 <= self.page_size <= 1024:
            raise InvalidArgument(f"page_size = {self.page_size} is not between 1 and 1024")
        wanted(self.transport)
        self.parsed_labels()
        self.parsed_sglang()

    def parsed_labels(self) -> dict[str, str]:
        """`labels` as a mapping. Raises InvalidArgument."""
        labels: dict[str, str] = {}
        for pair in filter(None, self.labels.split(",")):
            key, equals, value = pair.partition("=")
            if not key or not equals:
                raise InvalidArgument(f"labels: {pair!r} is not key=value")
            labels[key] = value
        return labels

    def parsed_sglang(self) -> dict[str, object]:
        """`sglang` as a mapping. Raises InvalidArgument."""
        import json

        try:
            extra = json.loads(self.sglang or "{}")
        except ValueError as error:
            raise InvalidArgument(f"sglang = {self.sglang!r} is not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise InvalidArgument(f"sglang = {self.sglang!r} is not a JSON object")
        return extra


@click.command()
@options(EngineConfig, "ENGINE")
def engine(config: EngineConfig) -> None:
    """Runs an engine: SGLang, or a simulation, behind kvmesh's sub-request calls."""
    from kvmesh.aio import run, setup_logging
    from services.engine.main import serve

    setup_logging(config.name or "engine", config.log_level)
    run(serve(config))
