"""A store over small memory and disk, and endpoints that exchange KV with it over real gRPC and shared memory."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.pair import Patience
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender
from kvmesh.endpoint.tickets import TicketBook
from kvmesh.errors import from_rpc
from kvmesh.grpcx import Server, channel
from kvmesh.host import host_id
from kvmesh.telemetry import Telemetry
from kvmesh.v1 import kv_pb2, kv_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc
from kvmesh.v1.common_pb2 import Endpoint, Ticket
from services.kvstore.cli import KvStoreConfig
from services.kvstore.disk import DiskFolder, Served
from services.kvstore.holder import StoreHolder
from services.kvstore.mover import Mover
from services.kvstore.pool import BlockPool
from services.kvstore.service import NAMES, StoreService
from services.kvstore.status import Status, describe
from services.kvstore.store import Store

LAYOUT = Layout("00" * 16, "float32", layers=2, heads=2, k_dim=8, v_dim=8, page_size=1)
BLOCK = 64
BLOCK_BYTES = BLOCK * LAYOUT.bytes_per_token
# Of a block's file, rounded up to whole pages.
FILE_BYTES = BLOCK_BYTES + 4096
VOCAB = 1000


def memory_of(blocks: int, layout: Layout = LAYOUT) -> int:
    """Bytes in which just so many blocks have room, beside the padding."""
    return sum(layout.part_bytes((blocks + 1) * BLOCK))


def prompt(blocks: float, key: int = 0) -> list[int]:
    """So many blocks of tokens; prompts of different keys share no token block."""
    return [(key * 131 + i * 7 + i // BLOCK) % VOCAB for i in range(int(blocks * BLOCK))]


class KvNode:
    """A store, with everything that its service has, and a client of it."""

    def __init__(self, name: str, store: Store, server: Server, status: Status, holder: StoreHolder) -> None:
        self.name, self.store, self.status, self.holder = name, store, status, holder
        self.address = server.address
        self.channel = channel(server.address)
        self.kv: Any = kv_pb2_grpc.KvEndpointStub(self.channel)
        self.peer: Any = kv_pb2_grpc.KvPeerStub(self.channel)
        self.admin: Any = kvstore_pb2_grpc.KvStoreStub(self.channel)

    @property
    def stats(self) -> kvstore_pb2.StoreStats:
        return self.status.stats()

    async def call(self, method: Any, request: Any, timeout: float = 10.0) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error

    async def prepare(self, tokens: list[int], end: int | None = None, **fields: Any) -> Ticket:
        request = kv_pb2.PrepRecvRequest(token_ids=tokens, end=len(tokens) if end is None else end, **fields)
        return (await self.call(self.kv.PrepRecv, request)).ticket

    async def send(
        self,
        tokens: list[int],
        ticket: Ticket,
        begin: int | None = None,
        end: int | None = None,
        timeout: float = 10.0,
        **fields: Any,
    ) -> kv_pb2.RemoteSendResponse:
        request = kv_pb2.RemoteSendRequest(
            token_ids=tokens,
            begin=ticket.matched if begin is None else begin,
            end=ticket.end if end is None else end,
            ticket=ticket,
            **fields,
        )
        return await self.call(self.kv.RemoteSend, request, timeout)

    async def release(self, ticket: Ticket) -> bool:
        return (await self.call(self.kv.Release, kv_pb2.ReleaseRequest(ticket=ticket))).released

    async def match(self, tokens: list[int], **fields: Any) -> tuple[int, int]:
        """(tokens here, of these in memory)."""
        reply = await self.call(self.admin.Match, kvstore_pb2.MatchRequest(token_ids=tokens, **fields))
        return reply.matched, reply.in_memory

    async def fill(self, tokens: list[int], value: int, **fields: Any) -> None:
        """Puts KV in, as if a peer had written it: block i of the prompt is filled with bytes `value` + i."""
        prompt = self.holder.prompt(tokens, fields.get("salt", ""))
        reservation = await self.holder.reserve(prompt, len(tokens) // BLOCK * BLOCK, 5.0)
        for i, row in enumerate(reservation.slots[::BLOCK]):
            for view in self.store.pool.views(int(row) // BLOCK):
                np.asarray(view)[:] = (value + reservation.matched // BLOCK + i) % 256
        await self.holder.publish(reservation.id, len(tokens) // BLOCK * BLOCK)
        await self.holder.free(reservation.id)

    def content(self, tokens: list[int], salt: str = "") -> list[int]:
        """The byte that each block of the prompt that is in memory is filled with; fails when one is mixed."""
        values = []
        for entry in self.store.index.chain(self.holder.prompt(tokens, salt).keys):
            assert entry.block is not None
            found = {value for view in self.store.pool.views(entry.block) for value in set(bytes(view))}
            assert len(found) == 1, f"a block holds {found}"
            values.append(found.pop())
        return values


@asynccontextmanager
async def kv_node(
    name: str,
    *,
    blocks: int = 8,
    disk: Path | None = None,
    disk_blocks: int = 1000,
    ttl: float = 0.0,
    layout: Layout = LAYOUT,
    transport: str = "auto",
    host: str = "",
    address: str = "127.0.0.1",
    patience: Patience | None = None,
    checksum: bool = False,
    **clock: Any,
) -> AsyncIterator[KvNode]:
    """A store that serves; stopped at the end."""
    async with AsyncExitStack() as stack:
        folder = None if disk is None else DiskFolder(str(disk), disk_blocks * FILE_BYTES)
        served = Served(layout, "toy", "", VOCAB, 4096)
        if folder is not None:
            folder.claim(served)
        pool = BlockPool(layout, memory_of(blocks, layout), name)
        store = Store(pool, folder, ttl, **clock)
        await store.start()
        stack.push_async_callback(store.close)
        endpoint = Endpoint(name=name, incarnation=secrets.token_hex(16))
        holder = StoreHolder(store, Mover(pool.transports(transport, address, patience), pool.kv))
        stack.push_async_callback(holder.close)
        book = TicketBook(endpoint, layout.fingerprint, holder.free)
        stack.push_async_callback(book.close)
        host = host or host_id()
        sender = Sender(endpoint, holder, host, checksum=checksum)
        stack.push_async_callback(sender.close)
        status = Status(describe(endpoint, served, store, holder), store, holder, book)
        telemetry = Telemetry("kvstore", name, KvStoreConfig(registry="127.0.0.1:1", trace_ratio=0))
        receiver = Receiver(holder, book, host, checksum)
        stack.push_async_callback(receiver.close)
        service = StoreService(store, holder, receiver, sender, status, telemetry)

        def register(server: Any) -> None:
            kv_pb2_grpc.add_KvEndpointServicer_to_server(service, server)
            kv_pb2_grpc.add_KvPeerServicer_to_server(service, server)
            kvstore_pb2_grpc.add_KvStoreServicer_to_server(service, server)

        server = Server(f"{address}:0", register, NAMES)
        stack.push_async_callback(server.stop, 0)
        stack.callback(status.close)
        endpoint.address = status.info.endpoint.address = server.address
        await server.start()
        node = KvNode(name, store, server, status, holder)
        stack.push_async_callback(node.channel.close, None)
        yield node


async def until(holds: Any, timeout: float = 5.0) -> None:
    """Waits until `holds()`; for what has no event of its own."""
    async with asyncio.timeout(timeout):
        while not holds():
            await asyncio.sleep(0.01)
