"""`kvmesh router`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import click

from kvmesh.config import ServiceConfig, options, setting
from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import split_address


@dataclass(frozen=True)
class RouterConfig(ServiceConfig):
    """Settings of the router service."""

    listen: str = setting("127.0.0.1:8400", "HOST:PORT to serve on; port 0 takes a free one.")
    advertise: str = setting("", "HOST:PORT that others reach it at. [default: the address it listens on]")
    http: str = setting("", "HOST:PORT of the HTTP door, OpenAI's API; port 0 takes a free one. [default: none]")
    registry: str = setting("127.0.0.1:2400", "HOST:PORT of the registry.")
    name: str = setting("", "Name in the mesh. [default: router- and a random number]")
    default_strategy: str = setting("data_parallel", "Strategy in force until one has been set for the mesh.")
    strategy_dir: str = setting("", "Folder of strategies of your own, taken in again when a file changes.")
    max_running: int = setting(2048, "Requests that run at once; more wait. 0: no limit.")
    max_running_tokens: int = setting(
        0, "Tokens of the requests that run at once, prompts and what is asked for; more wait. 0: no limit."
    )
    max_waiting: int = setting(2048, "Requests that wait; more are refused, with a hint when to come again.")
    max_message: str = setting("16MiB", "Largest message or HTTP body that is taken from a caller.")
    max_prompt_tokens: int = setting(0, "Longest prompt taken, in tokens. 0: what the model's context holds.")
    api_keys: str = setting("", "File of API keys: callers need one of them. See docs/security.md. [default: none]")
    client_certs: bool = setting(True, "With TLS: callers over gRPC have to show a certificate of the CA.")
    trace_prompts: bool = setting(False, "Put the beginning of each prompt into its trace.")
    workers: int = setting(1, "Processes that serve together on one port; each has the limits above to itself.")
    wait_engines: int = setting(0, "Report ready only once so many engines are connected.")

    def __post_init__(self) -> None:
        super().__post_init__()
        split_address(self.registry)
        for address in filter(None, (self.advertise, self.http)):
            split_address(address)
        if self.name and not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", self.name):
            raise InvalidArgument(f"name = {self.name!r} is not [A-Za-z0-9._-], 1 to 63 characters")
        for name in ("max_running", "max_running_tokens", "max_waiting", "max_prompt_tokens", "wait_engines"):
            if (value := getattr(self, name)) < 0:
                raise InvalidArgument(f"{name} = {value} is negative")
        if not 1 <= self.workers <= 256:
            raise InvalidArgument(f"workers = {self.workers} is not between 1 and 256")


@click.command()
@options(RouterConfig, "ROUTER")
def router(config: RouterConfig) -> None:
    """Runs a router: the mesh's public door, where strategies run."""
    from kvmesh.aio import run, setup_logging
    from services.router.tuning import tune

    setup_logging("router", config.log_level)
    if config.workers > 1:
        from services.router import workers

        run(workers.serve(config))
        return
    tune()
    from services.router import main

    run(main.serve(config))
