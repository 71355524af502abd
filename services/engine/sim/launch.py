"""A simulated engine as the command line describes it."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

from kvmesh.dataplane.setup import data_host
from kvmesh.errors import InvalidArgument
from kvmesh.sim.profile import load_profile
from kvmesh.sim.sockets import SocketPeers
from services.engine.cli import EngineConfig
from services.engine.sim.faults import Faults
from services.engine.sim.runtime import SimRuntime

log = logging.getLogger(__name__)


def simulated(config: EngineConfig) -> SimRuntime:
    """Not started. With faults in a file, SIGUSR1 reads it again. Raises InvalidArgument."""
    profile = load_profile(config.sim)
    sizes = {name: getattr(config, name) for name in ("kv_tokens", "chunk_tokens", "max_running")}
    profile = profile.replace(**{name: size for name, size in sizes.items() if size})
    source = config.sim_faults
    peers = SocketPeers(data_host(config.data_host, config.advertise, config.listen))
    runtime = SimRuntime(profile, peers, faults=_faults(source), seed=config.sim_seed)
    if source.startswith("@"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _reread, source, runtime)
    return runtime


def _faults(source: str) -> Faults:
    if not source.startswith("@"):
        return Faults.parse(source)
    try:
        return Faults.parse(Path(source[1:]).read_text())
    except OSError as error:
        raise InvalidArgument(f"sim_faults = {source}: {error.strerror}") from None


def _reread(source: str, runtime: SimRuntime) -> None:
    try:
        runtime.faults.update(_faults(source))
    except InvalidArgument as error:
        log.error("faults stay as they were: %s", error)
        return
    log.warning("faults on demand: %s", runtime.faults)
    runtime.faults_changed()
