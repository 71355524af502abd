"""A KV store, put together."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from contextlib import AsyncExitStack

from kvmesh.dataplane.setup import data_host
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender
from kvmesh.endpoint.tickets import TicketBook
from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import Server, announce, connector
from kvmesh.host import host_id
from kvmesh.membership import Membership
from kvmesh.metrics import page
from kvmesh.sizes import parse_place, parse_size
from kvmesh.telemetry import Telemetry
from kvmesh.v1 import kv_pb2_grpc, kvstore_pb2_grpc
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.registry_pb2 import MEMBER_KIND_KVSTORE, Member
from services.kvstore.carrier import Carrier
from services.kvstore.cli import KvStoreConfig
from services.kvstore.disk import DiskFolder, Served
from services.kvstore.holder import StoreHolder
from services.kvstore.learn import learn
from services.kvstore.memory import BlockMemory
from services.kvstore.metrics import register as register_metrics
from services.kvstore.service import NAMES, StoreService
from services.kvstore.status import Status, describe
from services.kvstore.store import Store

log = logging.getLogger(__name__)

REGISTER_S = 60.0


async def serve(config: KvStoreConfig) -> None:
    """Serves until cancelled. Raises MeshError when it does not start."""
    async with AsyncExitStack() as stack:
        await start(config, stack)
        await asyncio.Event().wait()


async def start(config: KvStoreConfig, stack: AsyncExitStack) -> Server:
    """Starts a store that `stack` stops; returns when it is ready. Raises MeshError."""
    access = config.access()
    incarnation = secrets.token_hex(16)
    endpoint = Endpoint(name=config.name or f"kvstore-{incarnation[:8]}", incarnation=incarnation)
    telemetry = Telemetry("kvstore", endpoint.name, config)
    stack.callback(telemetry.close)
    store, served = await _store(config, stack, endpoint.name)
    holder = StoreHolder(store, await _carrier(config, store.pool))
    stack.push_async_callback(holder.close)
    book = TicketBook(endpoint, holder.layout.fingerprint, holder.free)
    stack.push_async_callback(book.close)
    sender = Sender(endpoint, holder, host_id(), connector(access.tls), checksum=config.checksum)
    stack.push_async_callback(sender.close)
    status = Status(describe(endpoint, served, store, holder), store, holder, book)
    receiver = Receiver(holder, book, host_id(), config.checksum)
    stack.push_async_callback(receiver.close)
    service = StoreService(store, holder, receiver, sender, status, telemetry)
    register_metrics(await stack.enter_async_context(page("kvstore", endpoint.name, config)), status)

    def register(server: object) -> None:
        kv_pb2_grpc.add_KvEndpointServicer_to_server(service, server)  # type: ignore[arg-type]
        kv_pb2_grpc.add_KvPeerServicer_to_server(service, server)  # type: ignore[arg-type]
        kvstore_pb2_grpc.add_KvStoreServicer_to_server(service, server)  # type: ignore[arg-type]

    server = Server(config.listen, register, NAMES, access)
    stack.push_async_callback(server.stop)
    stack.callback(status.close)
    stack.callback(holder.stop)
    endpoint.address = status.info.endpoint.address = config.advertise or server.address
    await server.start()
    log.info("keeps the KV of %s on %s: %d blocks in memory", served.model, server.address, store.pool.blocks)
    announce(config.announce, server.address)
    if config.registry:
        await _join(config, endpoint, stack)
    await server.ready()
    log.info("ready")
    return server


async def _store(config: KvStoreConfig, stack: AsyncExitStack, name: str) -> tuple[Store, Served]:
    """The tiers, which `stack` closes."""
    disk = DiskFolder(*parse_place(config.disk, "disk")) if config.disk else None
    owned = AsyncExitStack()
    if disk is not None:
        owned.callback(disk.close)
    async with owned:
        served = await learn(config, disk)
        if disk is not None:
            await asyncio.to_thread(disk.claim, served)
        pool = await _memory(config, served, name)
        owned.callback(pool.close)
        store = Store(pool, disk, config.ttl)
        await store.start()
        # It closes what it was given.
        owned.pop_all()
        stack.push_async_callback(store.close)
    return store, served


async def _memory(config: KvStoreConfig, served: Served, name: str) -> BlockMemory:
    memory = parse_size(config.memory, "memory")
    try:
        if served.simulated:
            from services.kvstore.sim import SimMemory

            log.warning("SIMULATED: keeps numbers in place of KV, at the pace of profile %s", config.sim)
            return SimMemory(served.layout, memory)
        from services.kvstore.pool import BlockPool

        return await asyncio.to_thread(BlockPool, served.layout, memory, f"kvmesh-{name}")
    except (OSError, MemoryError) as error:
        raise InvalidArgument(f"memory = {config.memory} cannot be had: {error}") from error


async def _carrier(config: KvStoreConfig, memory: BlockMemory) -> Carrier:
    host = data_host(config.data_host, config.advertise, config.listen)
    if config.sim:
        from kvmesh.sim.profile import load_profile
        from kvmesh.sim.sockets import SocketPeers
        from services.kvstore.sim import SimCarrier, SimMemory

        assert isinstance(memory, SimMemory)
        simulated = SimCarrier(memory, load_profile(config.sim), SocketPeers(host))
        await simulated.start()
        return simulated
    from services.kvstore.mover import Mover
    from services.kvstore.pool import BlockPool

    assert isinstance(memory, BlockPool)
    return Mover(await asyncio.to_thread(memory.transports, config.transport, host), memory.kv)


async def _join(config: KvStoreConfig, endpoint: Endpoint, stack: AsyncExitStack) -> None:
    member = Member(
        endpoint=endpoint,
        kind=MEMBER_KIND_KVSTORE,
        host_id=host_id(),
        started_unix_ms=int(time.time() * 1000),
        pid=os.getpid(),
    )
    membership = Membership(config.registry, member, connect=connector(config.tls()))
    await membership.start(REGISTER_S)
    stack.push_async_callback(membership.stop)
