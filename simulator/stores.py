"""KV stores of a simulated mesh: all of the store service but disk and server."""

from __future__ import annotations

import random
import time
from contextlib import AsyncExitStack

from kvmesh.config import TraceConfig
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender
from kvmesh.endpoint.tickets import TicketBook
from kvmesh.sim.peers import LocalPeers
from kvmesh.sim.profile import Profile
from kvmesh.telemetry import Telemetry
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.kvstore_pb2 import StoreStats
from kvmesh.v1.registry_pb2 import MEMBER_KIND_KVSTORE, Member
from services.kvstore.holder import StoreHolder
from services.kvstore.service import StoreService
from services.kvstore.sim import SimCarrier, SimMemory, served
from services.kvstore.status import Status, describe
from services.kvstore.store import Store
from simulator.network import Network


class StoreNode:
    """One store, on a link like its engines'. Raises InvalidArgument when `memory` bytes of KV are too few."""

    def __init__(
        self, name: str, profile: Profile, memory: int, network: Network, peers: LocalPeers, seed: int, host_id: str
    ) -> None:
        self.name = name
        self._profile = profile
        self._memory = SimMemory(profile.layout, memory)
        self._network = network
        self._peers = peers
        self._host_id = host_id
        # At the same seed, the same.
        incarnation = f"{random.Random(f'{seed} {name}').getrandbits(128):032x}"
        self.endpoint = Endpoint(name=name, address=f"{name}:1", incarnation=incarnation)

    async def start(self, stack: AsyncExitStack) -> None:
        """Serves, until `stack` ends it."""
        store = Store(self._memory, None, clock=time.monotonic)
        await store.start()
        stack.push_async_callback(store.close)
        carrier = SimCarrier(self._memory, self._profile, self._peers, now=time.monotonic)
        await carrier.start()
        holder = StoreHolder(store, carrier)
        book = TicketBook(self.endpoint, holder.layout.fingerprint, holder.free)
        stack.push_async_callback(book.close)
        sender = Sender(self.endpoint, holder, self._host_id, self._network.channel)
        stack.push_async_callback(sender.close)
        receiver = Receiver(holder, book, self._host_id)
        stack.push_async_callback(receiver.close)
        self.status = Status(describe(self.endpoint, served(self._profile), store, holder), store, holder, book)
        stack.callback(self.status.close)
        telemetry = Telemetry("kvstore", self.name, TraceConfig(trace_ratio=0))
        self._network.serve(
            self.endpoint.address, StoreService(store, holder, receiver, sender, self.status, telemetry)
        )
        stack.callback(self._network.leave, self.endpoint.address)

    @property
    def member(self) -> Member:
        """As in the registry."""
        return Member(endpoint=self.endpoint, kind=MEMBER_KIND_KVSTORE, host_id=self._host_id)


def total(nodes: list[StoreNode]) -> StoreStats:
    """The figures of all of them, in sum."""
    sums = StoreStats()
    for node in nodes:
        for field, value in node.status.stats().ListFields():
            setattr(sums, field.name, getattr(sums, field.name) + value)
    return sums
