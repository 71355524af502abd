"""Which model the store is for: told, found in the disk's folder, or asked of an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

import grpc
import grpc.aio

from kvmesh.dataplane.choice import SIMULATED
from kvmesh.dataplane.layout import Layout
from kvmesh.errors import FailedPrecondition, InvalidArgument, MeshError, Unavailable, from_rpc
from kvmesh.grpcx import channel, connector
from kvmesh.membership import MeshWatch
from kvmesh.tls import Tls
from kvmesh.v1.engine_pb2 import EngineInfo, WatchStatusRequest
from kvmesh.v1.engine_pb2_grpc import EngineStub
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from services.kvstore.cli import KvStoreConfig
from services.kvstore.disk import DiskFolder, Served

log = logging.getLogger(__name__)

# How long the store waits for the mesh to have an engine; how long one may take to say what it is.
LEARN_S, ASK_S = 3600.0, 10.0
_AGAIN_S = 1.0


async def learn(config: KvStoreConfig, disk: DiskFolder | None) -> Served:
    """The model, by what comes first: --sim, --model, --layout-of, the disk's folder, the mesh's engines.

    Raises MeshError; FailedPrecondition when engines are simulated and the store is not.
    """
    if config.sim:
        from kvmesh.sim.profile import load_profile
        from services.kvstore.sim import served as simulated

        return simulated(load_profile(config.sim), config.model_name)
    if config.model:
        served = await asyncio.to_thread(_told, config)
    elif config.layout_of:
        served = of_engine(await ask(config.layout_of, config.tls()))
    elif disk is not None and (known := await asyncio.to_thread(disk.served)) is not None:
        served = known
    else:
        served = await _first_engine(config)
    if served.simulated:
        raise FailedPrecondition(
            f"the engines of {served.model} are simulated, and have no KV that a real store could keep: "
            "give the store their profile, as in --sim tiny-cpu"
        )
    if served.layout.ranks != 1:
        raise FailedPrecondition(
            f"the engines of {served.model} have {served.layout.ranks} tensor-parallel ranks; "
            "the store keeps the KV of engines with one"
        )
    return served


def _told(config: KvStoreConfig) -> Served:
    from kvmesh.modelfolder import layout_of, read_config

    folder = Path(config.model).expanduser().resolve()
    content = read_config(folder)
    try:
        layout = layout_of(folder, config.dtype, config.page_size)
    except OSError as error:
        raise InvalidArgument(f"model = {config.model!r} cannot be read: {error.strerror}: {error.filename}") from error
    return Served(
        layout,
        config.model_name or folder.name,
        str(folder),
        int(content.get("vocab_size", 0)),
        int(content.get("max_position_embeddings", 0)),
    )


def of_engine(info: EngineInfo) -> Served:
    """The model of an engine."""
    model = info.model
    simulated = SIMULATED in info.transports
    return Served(
        Layout.of(info.layout), model.name, model.path, model.vocab_size, model.context_length, simulated=simulated
    )


async def ask(address: str, tls: Tls | None = None) -> EngineInfo:
    """What the engine there says of itself. Raises MeshError."""
    async with channel(address, tls) as ch:
        call = EngineStub(ch).WatchStatus(WatchStatusRequest(), timeout=ASK_S, wait_for_ready=True)
        try:
            status = await call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, address) from error
        finally:
            call.cancel()
    if not hasattr(status, "info") or not status.info.layout.fingerprint:
        raise Unavailable(f"{address} does not say what it is: is it an engine?")
    info: EngineInfo = status.info
    return info


async def _first_engine(config: KvStoreConfig) -> Served:
    """Waits for an engine of the mesh that serves the model wanted."""
    if not config.registry:
        raise InvalidArgument(
            "nothing says whose KV is to be kept: give --model FOLDER, --layout-of HOST:PORT or --registry HOST:PORT"
        )
    tls = config.tls()
    watch = MeshWatch(config.registry, connect=connector(tls))
    watch.start()
    log.info("waiting for an engine of the mesh, to learn its layout")
    try:
        async with asyncio.timeout(LEARN_S):
            while True:
                members = await watch.wait_for(lambda m: bool(_engines(m.values())), LEARN_S)
                for engine in _engines(members.values()):
                    try:
                        served = of_engine(await ask(engine.endpoint.address, tls))
                    except MeshError as error:
                        log.info("%s: %s", engine.endpoint.name, error)
                        continue
                    if config.model_name in ("", served.model):
                        return served
                await asyncio.sleep(_AGAIN_S)
    except TimeoutError:
        raise Unavailable(f"no engine to learn the layout of within {LEARN_S:g} s") from None
    finally:
        await watch.close()


def _engines(members: Iterable[Member]) -> list[Member]:
    return sorted((m for m in members if m.kind == MEMBER_KIND_ENGINE), key=lambda m: m.endpoint.name)
